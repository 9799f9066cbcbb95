"""Edits of hidden representations: how they are computed and added.

Edits are computed in float32 (float64 for float64 models) and added in the dtype of the model. All rows of a batch get
the same edit, or each row has one of several, whose factors are stacked and gathered by row.

Shapes: `b` rows of the batch, `k` representations of each, `c` columns: the coordinates of all units of a row's
intervention, zero-padded to the largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch.nn.functional import pad

from peft_reft.interventions import (
    Factors,
    Intervention,
    LowRankIntervention,
    RedIntervention,
    Scope,
    compute_dtype,
)
from peft_reft.tokens.positions import Positions
from peft_reft.tokens.requests import RowPositions, RowRequests
from peft_reft.tokens.selections import RowSelection, Selection

# hidden [b, k, d], unit of each representation [b, k] (0 for none) -> edit [b, k, d]
Stacked = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class AdapterSettings:
    """How an adapter acts at one site.

    Attributes:
        positions: the tokens that it edits.
        strength: factor of its edits; 0 leaves the model as it is.
        subspaces: name -> its coordinates in the subspace of dimension `r`.
        coordinates: float32 `[r]`, 1 for the coordinates that are edited; None for all.
        freeze_subspace: whether the projection is never trained.
    """

    positions: Positions
    strength: float = 1.0
    subspaces: dict[str, range] = field(default_factory=dict)
    coordinates: torch.Tensor | None = None
    freeze_subspace: bool = False

    def mask(self, names: Sequence[str]) -> torch.Tensor:
        """1 for the coordinates of the named subspaces, 0 for the others; float32 `[r]`. Unknown names are ignored."""
        mask = torch.zeros(sum(map(len, self.subspaces.values())))
        for name in names:
            mask[list(self.subspaces.get(name, ()))] = 1
        return mask


def finite(name: str, value: float | torch.Tensor) -> float:
    """A number, or a tensor of one, as a float.

    Args:
        name: its name in messages.
        value: the number.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite in float32.
    """
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite, in float32 too, got {value!r}.")
    return float(number)


@dataclass(eq=False)
class Edit:
    """The edit of an adapter at one site.

    Attributes:
        intervention: the intervention.
        strength: factor of the edit.
        coordinates: which coordinates of the subspace are edited: `[r]`, or `[b, r]` if rows differ; None for all.
        positions: the tokens that are edited; None if only `function` is needed.
    """

    intervention: Intervention
    strength: float = 1.0
    coordinates: torch.Tensor | None = None
    positions: Positions | None = None

    @torch.no_grad()
    def function(self, hidden: torch.Tensor) -> torch.Tensor:
        """What an affine edit adds to `hidden` `[..., d]` outside of training, in the dtype of `hidden`."""
        coordinates = None if self.coordinates is None else self.coordinates.to(hidden)
        return self.strength * self.intervention.edit(hidden, Scope(coordinates=coordinates))

    def add_to(
        self, hidden: torch.Tensor, where: Selection, kept: dict[tuple, Any] | None = None, keep_output: bool = False
    ) -> torch.Tensor:
        """`hidden` with the selected tokens edited.

        Args:
            hidden: `[b, tokens, d]`, or `[rows, d]` when every token is selected.
            where: the tokens.
            kept, keep_output: see `Intervention.apply_to`.
        """
        intervention, units, coordinates, dtype = self.intervention, self.intervention.units, self.coordinates, None
        if coordinates is not None or units > 1 or where.codes is not None:
            dtype = compute_dtype(hidden.dtype)
            coordinates = None if coordinates is None else coordinates.to(hidden.device, dtype)
        by_row = coordinates is not None and coordinates.dim() == 2
        with _no_autocast(hidden.device.type):
            if where.flat_index is None:
                codes = hidden.new_ones(hidden.shape[:-1]) if where.codes is None else where.codes
                gate = None if units == 1 and where.codes is None else _one_hot(codes - 1, units, dtype)
                if by_row and hidden.dim() == 3:
                    coordinates = coordinates.unsqueeze(1)
                return intervention.apply_to(hidden, Scope(gate, coordinates, self.strength), kept, keep_output)
            gate = None if units == 1 else _one_hot(where.units, units, dtype)
            if by_row:
                coordinates = coordinates.index_select(0, where.flat_index // hidden.shape[1])
            flat, gathered = gather_rows(hidden.flatten(0, -2), where.flat_index)
            edit = intervention(gathered, Scope(gate, coordinates, self.strength), kept)
            return view_without_aliasing(flat.index_add(0, where.flat_index, edit), hidden.shape)


@dataclass(eq=False)
class RowEdits:
    """Edits of a batch whose rows have different interventions, all of one kind, stacked.

    Attributes:
        members: the distinct edits.
        index: int64 `[b]`, which of them edits a row, counted from 1, 0 for none.
        positions: the tokens that are edited in each row.
    """

    members: list[Edit]
    index: torch.Tensor
    positions: RowPositions
    _stacked: dict[torch.dtype, Stacked] = field(default_factory=dict)

    def add_to(
        self, hidden: torch.Tensor, where: RowSelection, kept: dict[tuple, Any] | None = None, keep_output: bool = False
    ) -> torch.Tensor:
        """`hidden` `[b, tokens, d]` (or `[b, d]`) with the selected tokens of each row edited by its own edit."""
        grid = hidden.unsqueeze(1) if hidden.dim() == 2 else hidden
        dtype = compute_dtype(hidden.dtype)
        with _no_autocast(hidden.device.type):
            stacked = self._stack(dtype)
            if where.index is None:
                edited = grid + stacked(grid.to(dtype), where.codes).to(grid.dtype)
            else:
                index = where.index.unsqueeze(-1).expand(-1, -1, grid.shape[-1])
                edit = stacked(grid.gather(1, index).to(dtype), where.codes)
                edited = grid.scatter_add(1, index, edit.to(grid.dtype))
        return view_without_aliasing(edited, hidden.shape)

    def _stack(self, dtype: torch.dtype) -> Stacked:
        if torch.is_grad_enabled():
            return stack(self.members, self.index, dtype)
        if dtype not in self._stacked:
            self._stacked[dtype] = stack(self.members, self.index, dtype)
        return self._stacked[dtype]


def gather_rows(hidden: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden` and its rows `hidden[index]`, to add something to these rows.

    Their joint gradient is one copy of the first's gradient, with values added to some rows. Two separate uses of
    `hidden` would cost a tensor of zeros and a sum, each of the size of `hidden`.

    Args:
        hidden: `[n, d]`.
        index: int64 `[k]`, all different.
    """
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not (hidden.requires_grad and torch.is_grad_enabled()) or is_recorded:
        return hidden, hidden.index_select(0, index)
    return _GatherRows.apply(hidden, index)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(index)
        return hidden.view_as(hidden), hidden.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, whole: torch.Tensor, picked: torch.Tensor) -> tuple[torch.Tensor, None]:
        return whole.index_add(0, *ctx.saved_tensors, picked), None


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    # Entering the context takes longer than checking whether it is needed.
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def view_without_aliasing(fresh: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A new tensor in another shape, like `view`, but not a view for autograd. Nothing else may hold the tensor.

    FSDP2 hooks the outputs of blocks; a view that the model then changes in place would lose the hooks.
    """
    return fresh if fresh.shape == shape else torch.ops.aten._unsafe_view(fresh, shape)


def _one_hot(index: torch.Tensor, units: int, dtype: torch.dtype) -> torch.Tensor:
    return (index.unsqueeze(-1) == torch.arange(units, device=index.device)).to(dtype)


@dataclass(frozen=True)
class StackedLowRank:
    """Low-rank edits in their normal form (see `interventions.Factors`), one for each row.

    `left`, `right` and `removed` are `[b, c, d]` (`removed` is None if no row needs it), `bias` and `gain` `[b, c]`,
    `unit` int8 `[b, c]`, the unit that a column belongs to, counted from 1. `activations` are pairs of an activation
    and the rows, bool `[b]`, that have it.
    """

    left: torch.Tensor
    right: torch.Tensor
    removed: torch.Tensor | None
    bias: torch.Tensor
    gain: torch.Tensor
    unit: torch.Tensor
    activations: tuple[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], ...]

    @classmethod
    def of(cls, members: Sequence[Edit], rows: torch.Tensor, dtype: torch.dtype) -> StackedLowRank:
        """Stack distinct `members`; `rows` int64 `[b]` gives the member of each row, counted from 1, 0 for none."""
        columns = max(m.intervention.projection.shape[:2].numel() for m in members)
        groups = _alike(members)
        parts = [_columns([members[i] for i in group], columns, dtype) for group in groups]
        # The first member, all zero, is for rows without an edit.
        place = torch.zeros(len(members) + 1, dtype=torch.long)
        place[[1 + i for group in groups for i in group]] = torch.arange(1, len(members) + 1)
        place = place[rows]

        def by_row(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            zero = tensors[0].new_zeros(1, *tensors[0].shape[1:])
            return torch.cat([zero, *tensors]).index_select(0, place.to(zero.device))

        left, right, removed, bias, gain, unit = zip(*parts, strict=True)
        device = left[0].device
        activations = _activations(members, rows.to(device))
        return cls(
            by_row(left),
            by_row(right),
            by_row(removed) if activations else None,
            by_row(bias),
            by_row(gain).to(device),
            by_row(unit).to(device),
            activations,
        )

    def __call__(self, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        target = torch.baddbmm(self.bias.unsqueeze(1), hidden, self.right.mT)
        for act_fn, rows in self.activations:
            target = torch.where(rows[:, None, None], act_fn(target), target)
        if self.removed is not None:
            target = target - hidden @ self.removed.mT
        gate = (codes.unsqueeze(-1) == self.unit.unsqueeze(1)) * self.gain.unsqueeze(1)
        return (target * gate) @ self.left


@dataclass(frozen=True)
class StackedRed:
    """RED edits, one for each row: `factor` and `shift` are `[b, 1 + u, d]`, zero for unit 0."""

    factor: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, members: Sequence[Edit], rows: torch.Tensor, dtype: torch.dtype) -> StackedRed:
        """Like `StackedLowRank.of`."""
        scales = [member.intervention.scale for member in members]
        biases = [member.intervention.shift for member in members]
        device, units = scales[0].device, 1 + max(map(len, scales))
        # The first member, all zero, is for rows without an edit.
        factor = torch.zeros(len(members) + 1, units, scales[0].shape[1], dtype=dtype, device=device)
        shift = torch.zeros_like(factor)
        places = [(1 + i, 1 + unit) for i, scale in enumerate(scales) for unit in range(len(scale))]
        index = torch.tensor(places, device=device).unbind(1)
        gain = torch.tensor([[members[i - 1].strength] for i, _ in places], dtype=dtype, device=device)
        factor[index] = gain * (torch.cat(scales).to(dtype) - 1)
        shift[index] = gain * torch.cat(biases).to(dtype)
        rows = rows.to(device)
        return cls(factor[rows], shift[rows])

    def __call__(self, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        unit = codes.long().unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return self.factor.gather(1, unit) * hidden + self.shift.gather(1, unit)


def stack(members: Sequence[Edit], rows: torch.Tensor, dtype: torch.dtype) -> Stacked:
    """The edits of rows that have different interventions, in one pass.

    Args:
        members: the distinct edits, all low-rank or all RED, of one width.
        rows: int64 `[b]`, the member of each row, counted from 1, 0 for rows without an edit.
        dtype: the dtype to compute the edit in.
    """
    kind = StackedLowRank if isinstance(members[0].intervention, LowRankIntervention) else StackedRed
    return kind.of(members, rows, dtype)


def edits_of_rows(edits: Mapping[Hashable, Edit], rows: Sequence[Hashable], requests: RowRequests) -> list[RowEdits]:
    """The edits of a batch whose rows have different ones, stacked into one `RowEdits` per kind.

    Args:
        edits: the distinct edits by name.
        rows: the name of each row's edit; any other name for none.
        requests: the requests of the call, which cache the row positions.

    Raises:
        NotImplementedError: an intervention has no stacked form.
    """
    families: dict[bool, list[Hashable]] = {}
    for name, edit in edits.items():
        if not isinstance(edit.intervention, (LowRankIntervention, RedIntervention)):
            raise NotImplementedError(
                f"{type(edit.intervention).__name__} cannot edit one of several rows with different adapters: only "
                "subclasses of LowRankIntervention and RedIntervention can be stacked. Activate adapters with "
                "set_adapter."
            )
        families.setdefault(edit.intervention.low_rank, []).append(name)
    found = []
    for names in families.values():
        number = {name: i for i, name in enumerate(names, 1)}
        specs = tuple(edits[name].positions if name in number else None for name in rows)
        index = torch.tensor([number.get(name, 0) for name in rows])
        found.append(RowEdits([edits[name] for name in names], index, requests.positions(specs)))
    return found


def _alike(members: Sequence[Edit]) -> list[list[int]]:
    """Indices of the members, grouped so that the parameters of a group can be stacked without padding."""
    groups: dict[tuple, list[int]] = {}
    for i, member in enumerate(members):
        own = member.intervention
        key = (type(own), own.projection.shape, own.affine, own.bias is None)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _columns(members: Sequence[Edit], columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The fields of `StackedLowRank` for `n` alike members, with `n` for `b`; the last two on the CPU."""
    factors = _factors(members, dtype)
    behind = columns - factors.bias.shape[1]
    zero = torch.zeros_like(factors.left)
    matrices = (zero if m is None else m for m in (factors.left, factors.right, factors.removed))
    vectors = (
        factors.bias,
        _gain(members).to(dtype),
        _unit_of_column(members[0].intervention).expand(len(members), -1),
    )
    return (*(pad(m, (0, 0, 0, behind)) for m in matrices), *(pad(v, (0, behind)) for v in vectors))


def _factors(members: Sequence[Edit], dtype: torch.dtype) -> Factors:
    """The normal forms of `n` alike members, with the units' coordinates on one axis: `[n, u * r, d]`."""
    first = members[0].intervention
    parameters = {
        name: torch.stack([getattr(member.intervention, name) for member in members]).to(dtype)
        for name, _ in first.named_parameters()
    }
    if torch.is_grad_enabled():
        # As in `LowRankIntervention`, unused rows get no gradient.
        projection = parameters["projection"]
        used = _coordinates(members, projection.shape[2]).to(projection.device) != 0
        parameters["projection"] = torch.where(used[:, None, :, None], projection, projection.detach())
    factors = first.normal_form(parameters, first.affine)
    return Factors(*(None if factor is None else factor.flatten(1, 2) for factor in factors))


def _gain(members: Sequence[Edit]) -> torch.Tensor:
    """Factor of each column of `n` alike members, float64 `[n, u * r]`."""
    units, rank, _ = members[0].intervention.projection.shape
    strength = torch.tensor([m.strength for m in members], dtype=torch.float64)
    return strength[:, None] * _coordinates(members, rank).repeat(1, units)


def _coordinates(members: Sequence[Edit], rank: int) -> torch.Tensor:
    everything = torch.ones(rank)
    return torch.stack([everything if m.coordinates is None else m.coordinates.cpu() for m in members])


def _unit_of_column(intervention: LowRankIntervention) -> torch.Tensor:
    units, rank, _ = intervention.projection.shape
    return torch.arange(1, units + 1, dtype=torch.int8).repeat_interleave(rank)


def _activations(members: Sequence[Edit], rows: torch.Tensor) -> tuple:
    by_name: dict[str, list[int]] = {}
    for i, member in enumerate(members):
        if not member.intervention.affine:
            by_name.setdefault(member.intervention.act_name, []).append(1 + i)
    return tuple(
        (members[indices[0] - 1].intervention.act_fn, torch.isin(rows, torch.tensor(indices, device=rows.device)))
        for indices in by_name.values()
    )

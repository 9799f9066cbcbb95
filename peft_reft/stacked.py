"""One pass for rows of a batch that have different interventions: their factors stacked, gathered by row.

Shapes: `b` rows of the batch, `k` representations of each, `c` columns: the coordinates of all units of a row's
intervention, filled up with zeros to those of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from peft_reft.interventions import Factors, Intervention, LowRankIntervention, RedIntervention

# hidden [b, k, d], unit of each representation [b, k] (0 for none) -> edit [b, k, d]
Stacked = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Member:
    """What edits one row: an intervention, its strength, and which coordinates `[r]` it edits (None: all)."""

    intervention: Intervention
    strength: float = 1.0
    coordinates: torch.Tensor | None = None


@dataclass(frozen=True)
class StackedLowRank:
    """Low-rank edits in their normal form (see `interventions.Factors`), one for each row.

    `left`, `right` and `removed` are `[b, c, d]` (the latter None where no row needs it), `bias` and `gain` `[b, c]`,
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
    def of(cls, members: Sequence[Member], rows: torch.Tensor, dtype: torch.dtype) -> StackedLowRank:
        """Stack distinct `members`; `rows` int64 `[b]` gives the member of each row, -1 for none."""
        columns = max(m.intervention.projection.shape[:2].numel() for m in members)
        groups = _alike(members)
        parts = [_columns([members[i] for i in group], columns, dtype) for group in groups]
        place = torch.empty(len(members) + 1, dtype=torch.long)
        place[[i for group in groups for i in group]] = torch.arange(len(members))
        # One more, all zero, for rows without an edit: index -1.
        place[-1] = len(members)
        place = place[rows]

        def by_row(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            zero = tensors[0].new_zeros(1, *tensors[0].shape[1:])
            return torch.cat([*tensors, zero]).index_select(0, place.to(zero.device))

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
    """RED edits, one for each row: `factor` and `shift` are `[b, 1 + u, d]`, those of unit 0 are zero."""

    factor: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, members: Sequence[Member], rows: torch.Tensor, dtype: torch.dtype) -> StackedRed:
        """As `StackedLowRank.of`."""
        scales = [member.intervention.scale for member in members]
        biases = [member.intervention.bias for member in members]
        device, units = scales[0].device, 1 + max(map(len, scales))
        # One member more, all zero, for rows without an edit: index -1.
        factor = torch.zeros(len(members) + 1, units, scales[0].shape[1], dtype=dtype, device=device)
        shift = torch.zeros_like(factor)
        places = [(i, 1 + unit) for i, scale in enumerate(scales) for unit in range(len(scale))]
        index = torch.tensor(places, device=device).unbind(1)
        gain = torch.tensor([[members[i].strength] for i, _ in places], dtype=dtype, device=device)
        factor[index] = gain * (torch.cat(scales).to(dtype) - 1)
        shift[index] = gain * torch.cat(biases).to(dtype)
        rows = rows.to(device)
        return cls(factor[rows], shift[rows])

    def __call__(self, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        unit = codes.long().unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return self.factor.gather(1, unit) * hidden + self.shift.gather(1, unit)


def stack(members: Sequence[Member], rows: torch.Tensor, dtype: torch.dtype) -> Stacked:
    """The edits of rows that have different interventions, in one pass.

    Args:
        members: the distinct ones, all low-rank or all RED, of one width.
        rows: int64 `[b]`, the member of each row, -1 for rows that none edits.
        dtype: in which the edit is computed.
    """
    kind = StackedLowRank if isinstance(members[0].intervention, LowRankIntervention) else StackedRed
    return kind.of(members, rows, dtype)


def family(intervention: Intervention) -> type:
    """Interventions of one family can be stacked.

    Raises:
        NotImplementedError: for a method that has no stacked form.
    """
    for kind in (LowRankIntervention, RedIntervention):
        if isinstance(intervention, kind):
            return kind
    raise NotImplementedError(
        f"{type(intervention).__name__} cannot edit one of several rows with different adapters: only subclasses of "
        "LowRankIntervention and RedIntervention can be stacked. Activate adapters with set_adapter."
    )


def _alike(members: Sequence[Member]) -> list[list[int]]:
    """Indices of the members, grouped so that the parameters of a group can be stacked without padding."""
    groups: dict[tuple, list[int]] = {}
    for i, member in enumerate(members):
        own = member.intervention
        groups.setdefault((type(own), own.projection.shape, own.affine), []).append(i)
    return list(groups.values())


def _columns(members: Sequence[Member], columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The fields of `StackedLowRank` for members that are alike, with `n` for `b`; the last two on the CPU."""
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


def _factors(members: Sequence[Member], dtype: torch.dtype) -> Factors:
    """The normal forms of members that are alike, with the units' coordinates on one axis: `[n, u * r, d]`."""
    first = members[0].intervention
    parameters = {
        name: torch.stack([getattr(member.intervention, name) for member in members]).to(dtype)
        for name, _ in first.named_parameters()
    }
    if torch.is_grad_enabled():
        # As in `LowRankIntervention`: rows that are not used stay as they are.
        projection = parameters["projection"]
        used = _coordinates(members, projection.shape[2]).to(projection.device) != 0
        parameters["projection"] = torch.where(used[:, None, :, None], projection, projection.detach())
    factors = first.factors_of(parameters, first.affine)
    return Factors(*(None if factor is None else factor.flatten(1, 2) for factor in factors))


def _gain(members: Sequence[Member]) -> torch.Tensor:
    """Factor of each column of members that are alike, float64 `[n, u * r]`."""
    units, rank, _ = members[0].intervention.projection.shape
    strength = torch.tensor([m.strength for m in members], dtype=torch.float64)
    return strength[:, None] * _coordinates(members, rank).repeat(1, units)


def _coordinates(members: Sequence[Member], rank: int) -> torch.Tensor:
    everything = torch.ones(rank)
    return torch.stack([everything if m.coordinates is None else m.coordinates.cpu() for m in members])


def _unit_of_column(intervention: LowRankIntervention) -> torch.Tensor:
    units, rank, _ = intervention.projection.shape
    return torch.arange(1, units + 1, dtype=torch.int8).repeat_interleave(rank)


def _activations(members: Sequence[Member], rows: torch.Tensor) -> tuple:
    by_name: dict[str, list[int]] = {}
    for i, member in enumerate(members):
        if not member.intervention.affine:
            by_name.setdefault(member.intervention.act_name, []).append(i)
    return tuple(
        (members[indices[0]].intervention.act_fn, torch.isin(rows, torch.tensor(indices, device=rows.device)))
        for indices in by_name.values()
    )

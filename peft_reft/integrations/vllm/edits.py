"""Edits of many tokens by many adapters: factors of alike interventions in one table, tokens in batches of groups.

Shapes: `d` hidden size, `r` rank, `u` units of an intervention, `g` groups of a batch, `k` tokens of a group.
Factors and edits are float32, as everywhere in the package.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from transformers.activations import ACT2FN

from peft_reft.interventions import Intervention, LowRankIntervention, RedIntervention


class Kind(NamedTuple):
    """What interventions must share to be stacked: the names of their factors, rank, activation."""

    factors: tuple[str, ...]
    rank: int
    act_fn: str | None


class Batch(NamedTuple):
    """Tokens that one product serves.

    Attributes:
        members: the member of the table that edits each group, int64 `[g]`; or a slice.
        rows: where the tokens stand in the pass, int64 `[g * k]`, small groups repeat their first token; or a slice.
        size: `k`.
        gain: float32 `[g, 1, 1]`, the strength of each group; None where all are 1.
        kept: int64, which of the `g * k` tokens count; None for all.
    """

    members: torch.Tensor | slice
    rows: torch.Tensor | slice
    size: int
    gain: torch.Tensor | None
    kept: torch.Tensor | None


def factors_of(intervention: Intervention) -> dict[str, torch.Tensor]:
    """The tensors that an intervention edits with, float32, `[u, ...]` each.

    Raises:
        NotImplementedError: a method that has no stacked form.
    """
    if isinstance(intervention, LowRankIntervention):
        factors = intervention.factors(torch.float32)._asdict()
        return {name: factor.contiguous() for name, factor in factors.items() if factor is not None}
    if isinstance(intervention, RedIntervention):
        return {"factor": intervention.scale.float() - 1, "shift": intervention.shift.float()}
    raise NotImplementedError(
        f"{type(intervention).__name__} cannot be served: only subclasses of LowRankIntervention and RedIntervention "
        "have a form that many adapters share."
    )


def kind_of(intervention: Intervention) -> Kind:
    names = tuple(factors_of(intervention))
    rank = intervention.projection.shape[1] if isinstance(intervention, LowRankIntervention) else 0
    return Kind(names, rank, intervention.act_name)


class Table:
    """The factors of all members of one kind at one site. Members are appended, and taken out again."""

    def __init__(self, kind: Kind) -> None:
        self.act_fn = None if kind.act_fn is None else ACT2FN[kind.act_fn]
        self.factors: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(next(iter(self.factors.values()), ()))

    def append(self, factors: dict[str, torch.Tensor]) -> None:
        if self.factors:
            factors = {name: torch.cat([old, factors[name]]) for name, old in self.factors.items()}
        self.factors = factors

    def remove(self, begin: int, end: int) -> None:
        self.factors = {name: torch.cat([old[:begin], old[end:]]) for name, old in self.factors.items()}

    def edit(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The edits of `hidden` `[g, k, d]`, float32 `[g, k, d]`."""
        own = {name: factor[batch.members] for name, factor in self.factors.items()}
        edit = self._red(hidden, own) if "factor" in own else self._low_rank(hidden, own)
        return edit if batch.gain is None else edit * batch.gain

    def _low_rank(self, hidden: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
        bias = own["bias"].unsqueeze(1)
        if "right" in own:
            target = torch.baddbmm(bias, hidden, own["right"].mT)
        else:
            target = bias.expand(-1, hidden.shape[1], -1)
        if self.act_fn is not None:
            target = self.act_fn(target)
        if "removed" in own:
            target = target - hidden @ own["removed"].mT
        return target @ own["left"]

    @staticmethod
    def _red(hidden: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
        return own["factor"].unsqueeze(1) * hidden + own["shift"].unsqueeze(1)


def edit_rows(hidden: torch.Tensor, residual: torch.Tensor | None, batches: Iterable[tuple[Table, Batch]]) -> None:
    """Edit some rows of `hidden + residual`, in place: they are in `hidden` then, and `residual` is zero there.

    Args:
        hidden: `[tokens, d]`.
        residual: as `hidden`, or None for zero.
        batches: the tokens that each table edits; no token is in two of them.
    """
    for table, batch in batches:
        if isinstance(batch.rows, slice):
            _edit_slice(hidden[batch.rows], None if residual is None else residual[batch.rows], table, batch)
            continue
        before = hidden.index_select(0, batch.rows)
        if residual is not None:
            before = before + residual.index_select(0, batch.rows)
        edit = table.edit(before.float().unflatten(0, (-1, batch.size)), batch).flatten(0, 1)
        after, rows = before + edit.to(before.dtype), batch.rows
        if batch.kept is not None:
            after, rows = after.index_select(0, batch.kept), rows.index_select(0, batch.kept)
        hidden.index_copy_(0, rows, after)
        if residual is not None:
            residual.index_fill_(0, rows, 0)


def _edit_slice(hidden: torch.Tensor, residual: torch.Tensor | None, table: Table, batch: Batch) -> None:
    """As `edit_rows`, for neighboring rows in the order of their groups: they need not be gathered."""
    if residual is not None:
        hidden.add_(residual)
        residual.zero_()
    edit = table.edit(hidden.float().unflatten(0, (-1, batch.size)), batch).flatten(0, 1)
    hidden.add_(edit.to(hidden.dtype))

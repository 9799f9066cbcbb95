"""Edits of many tokens by many adapters: one table for the factors of alike interventions, tokens grouped in batches.

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
        rows: index of each token in the pass, int64 `[g * k]`, small groups repeat their first token; or a slice.
        size: `k`.
        gain: float32 `[g, 1, 1]`, the strength of each group; None if all are 1.
        kept: int64, which of the `g * k` tokens count; None for all.
        order: int64, index of each token of the pass in `rows`, if `rows` are all tokens; else None.
    """

    members: torch.Tensor | slice
    rows: torch.Tensor | slice
    size: int
    gain: torch.Tensor | None
    kept: torch.Tensor | None
    order: torch.Tensor | None


def factors_of(intervention: Intervention) -> dict[str, torch.Tensor]:
    """The tensors that an intervention edits with, float32, `[u, ...]` each.

    Raises:
        NotImplementedError: the method has no stacked form.
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
    """The factors of all members of one kind at one site."""

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

    def apply_(self, before: torch.Tensor, batch: Batch) -> None:
        """Add the edits to `before` `[g * k, d]` in place, computed in float32 and added in the dtype of `before`."""
        own = {name: factor[batch.members] for name, factor in self.factors.items()}
        groups = before.view(-1, batch.size, before.shape[-1])
        hidden = groups.float()
        if "factor" in own:
            edit = own["factor"].unsqueeze(1) * hidden + own["shift"].unsqueeze(1)
            edit = edit if batch.gain is None else edit * batch.gain
        else:
            target = self._target(hidden, own)
            target = target if batch.gain is None else target * batch.gain
            if hidden is groups:
                groups.baddbmm_(target, own["left"])
                return
            edit = target @ own["left"]
        groups.add_(edit.to(before.dtype))

    def _target(self, hidden: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
        """The coordinates of the edits, `[g, k, r]`."""
        bias = own["bias"].unsqueeze(1)
        if "right" in own:
            target = torch.baddbmm(bias, hidden, own["right"].mT)
        else:
            target = bias.expand(-1, hidden.shape[1], -1)
        if self.act_fn is not None:
            target = self.act_fn(target)
        if "removed" in own:
            target = target - hidden @ own["removed"].mT
        return target


def edit_rows(
    hidden: torch.Tensor, residual: torch.Tensor | None, batches: Iterable[tuple[Table, Batch]], whole: bool
) -> None:
    """Edit some rows of `hidden + residual` in place: `hidden` then holds the edited sum, and `residual` zeros.

    Args:
        hidden: `[tokens, d]`.
        residual: like `hidden`, or None for zero.
        batches: the tokens that each table edits; no token is in two batches.
        whole: whether all tokens are edited.
    """
    if whole and residual is not None:
        hidden.add_(residual)
        residual.zero_()
        residual = None
    for table, batch in batches:
        if isinstance(batch.rows, slice):
            own = hidden[batch.rows]
            if residual is not None:
                own.add_(residual[batch.rows])
                residual[batch.rows].zero_()
            table.apply_(own, batch)
            continue
        before, rows = hidden.index_select(0, batch.rows), batch.rows
        if residual is not None:
            before.add_(residual.index_select(0, rows))
        table.apply_(before, batch)
        if batch.kept is not None:
            before, rows = before.index_select(0, batch.kept), rows.index_select(0, batch.kept)
        if batch.order is not None:  # faster than a copy by index
            torch.index_select(before, 0, batch.order, out=hidden[: len(batch.order)])
        else:
            hidden.index_copy_(0, rows, before)
        if residual is not None:
            residual.index_fill_(0, rows, 0)

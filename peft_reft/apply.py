"""Puts edits into hidden representations: computed in float32 at least, added in the dtype of the model."""

from __future__ import annotations

import torch

from peft_reft.autograd import no_autocast, pick
from peft_reft.interventions import Intervention, precise
from peft_reft.stacked import Stacked
from peft_reft.tokens.passes import RowSelection, Selection


def edit_tokens(
    intervention: Intervention,
    selection: Selection,
    hidden: torch.Tensor,
    coordinates: torch.Tensor | None = None,
    strength: float = 1.0,
    session: object = None,
    keep_output: bool = False,
) -> torch.Tensor:
    """`hidden` with the selected tokens edited.

    Args:
        intervention: what edits them.
        selection: the tokens.
        hidden: `[batch, tokens, d]`, or `[rows, d]` when `selection` is everything.
        coordinates: `[r]`, or `[batch, r]` where rows differ, see `Intervention.forward`; None for all.
        strength, session, keep_output: see `Intervention.forward`.
    """
    dtype, units = precise(hidden.dtype), intervention.units
    with no_autocast(hidden.device.type):
        if selection.rows is None:
            codes = hidden.new_ones(hidden.shape[:-1]) if selection.codes is None else selection.codes
            gate = None if units == 1 and selection.codes is None else _one_hot(codes - 1, units, dtype)
            if coordinates is not None and coordinates.dim() == 2 and hidden.dim() == 3:
                coordinates = coordinates.unsqueeze(1)
            return intervention(hidden, gate, coordinates, strength, session, add=True, keep_output=keep_output)
        gate = None if units == 1 else _one_hot(selection.units, units, dtype)
        if coordinates is not None and coordinates.dim() == 2:
            coordinates = coordinates.index_select(0, selection.rows // hidden.shape[1])
        flat, picked = pick(hidden.flatten(0, -2), selection.rows)
        edit = intervention(picked, gate, coordinates, strength, session)
        return shaped(flat.index_add(0, selection.rows, edit), hidden.shape)


def edit_rows(stacked: Stacked, selection: RowSelection, hidden: torch.Tensor) -> torch.Tensor:
    """`hidden` `[rows, tokens, d]` with the selected tokens of each row edited by its own intervention."""
    dtype = precise(hidden.dtype)
    with no_autocast(hidden.device.type):
        if selection.index is None:
            return hidden + stacked(hidden.to(dtype), selection.codes).to(hidden.dtype)
        index = selection.index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        edit = stacked(hidden.gather(1, index).to(dtype), selection.codes)
        return hidden.scatter_add(1, index, edit.to(hidden.dtype))


def shaped(fresh: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor that nobody else holds in another shape, as `view`, but not a view for autograd.

    FSDP2 hooks the outputs of blocks; a view that the model then changes in place would lose the hooks.
    """
    return fresh if fresh.shape == shape else torch.ops.aten._unsafe_view(fresh, shape)


def _one_hot(index: torch.Tensor, units: int, dtype: torch.dtype) -> torch.Tensor:
    return (index.unsqueeze(-1) == torch.arange(units, device=index.device)).to(dtype)

"""What a layer gets of the tokens of a pass: those that it is to edit."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """The edited tokens of one pass, for one position spec.

    In graphs, and where most tokens are edited, `codes` is int8 `[batch, tokens]`: 0 for no edit, else 1 + the index of
    the unit. Else `flat_index` `[n]` holds the indices of the edited tokens among all, and `units` `[n]` their units
    (None for the only one). Without any of these the only unit edits every token.
    """

    codes: torch.Tensor | None = None
    flat_index: torch.Tensor | None = None
    units: torch.Tensor | None = None


EVERY_TOKEN = Selection()


@dataclass(frozen=True)
class RowSelection:
    """The edited tokens of one pass whose rows have different adapters.

    `codes` is int8 `[rows, k]`: the unit of each of the row's tokens at `index` `[rows, k]`, 0 for no edit. Without
    `index` they are those of all tokens.
    """

    codes: torch.Tensor
    index: torch.Tensor | None = None

"""The tokens of a pass that a layer edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """The edited tokens of one pass, for one position spec.

    In graphs, and where most tokens are edited, `codes` is int8 `[batch, tokens]`: 0 for no edit, else 1 + the index of
    the unit. Otherwise `flat_index` `[n]` holds the indices of the edited tokens among all, and `units` `[n]` their
    units (None for the only one). Without any of these the only unit edits every token.
    """

    codes: torch.Tensor | None = None
    flat_index: torch.Tensor | None = None
    units: torch.Tensor | None = None


EVERY_TOKEN = Selection()


@dataclass(frozen=True)
class RowSelection:
    """The edited tokens of one pass whose rows have different adapters.

    `codes` is int8 `[rows, k]`: 1 + the index of the unit of each of the row's tokens at `index` `[rows, k]`, 0 for no
    edit. Without `index`, `codes` covers all tokens.
    """

    codes: torch.Tensor
    index: torch.Tensor | None = None


def edited_first(codes: torch.Tensor, device: torch.device) -> RowSelection | None:
    """The selection of codes `[rows, tokens]`, with an index if few tokens are edited; None if none is."""
    most = int((codes > 0).sum(-1).max())
    if most == 0:
        return None
    if 2 * most > codes.shape[1]:
        return RowSelection(codes.to(device))
    # Rows with fewer edited tokens than others are padded with tokens of code 0.
    index = (codes > 0).to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    return RowSelection(codes.gather(1, index).to(device), index.to(device))


def repeat_rows(codes: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat the codes `[rows, tokens]` of a `generate` call for the `batch` rows of one of its passes.

    Raises:
        ValueError: `batch` is not a multiple of the number of rows.
    """
    rows = codes.shape[0]
    if batch % rows:
        raise ValueError(
            f"generate was called with {rows} sequences, but one of its passes has {batch}: no row can be matched. "
            "Decoding loops must keep all rows, or repeat each of them equally often."
        )
    return codes.repeat_interleave(batch // rows, dim=0)


def rows_of_batch(rows: Sequence[int], batch: int) -> str:
    """How messages name some rows of a batch."""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))} of this batch of {batch}"

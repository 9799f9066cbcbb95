"""The edits of one pass: the tokens of each adapter's units, grouped so that few products serve many adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

import numpy as np
import torch

from peft_reft.integrations.vllm.chunks import edited_runs
from peft_reft.integrations.vllm.edits import Batch, Kind
from peft_reft.tokens.positions import Positions


@dataclass(frozen=True)
class Editing:
    """How one request is edited: the adapter, its strength, and the tokens."""

    fingerprint: str
    strength: float
    positions: Positions
    prompt: int

    @cached_property
    def end(self) -> float:
        """The first position after which nothing is edited."""
        return inf if self.positions.tail else self.prompt + self.positions.counted


class Chunk(NamedTuple):
    """The tokens of one request in a pass: its id, the position of the first of them, and how many."""

    request: str
    begin: int
    count: int


class Entry(NamedTuple):
    """Where a site stores an adapter: a kind of table, and its first member there."""

    kind: Kind
    first: int


# The entries of a site by fingerprint. Sites with equal layouts share one plan.
Layout = frozenset[tuple[str, Entry]]
# fingerprint, unit, strength
Group = tuple[str, int, float]


class SitePlan(NamedTuple):
    """The edits at a site: batches for its tables, and whether they include all tokens of the pass."""

    batches: list[tuple[Kind, Batch]]
    whole: bool


class Plan:
    """The edited tokens of one pass.

    Args:
        requests: how each request with an adapter is edited.
        chunks: the requests of the pass, in the order of their tokens.
        device: where the hidden representations are.
    """

    def __init__(self, requests: Mapping[str, Editing], chunks: Iterable[Chunk], device: torch.device) -> None:
        self.device = device
        self.rows, self.tokens = _rows(requests, chunks)
        self._sites: dict[Layout, SitePlan] = {}

    def at(self, layout: Layout) -> SitePlan:
        """The edits at a site with this layout."""
        if layout not in self._sites:
            self._sites[layout] = self._planned(dict(layout))
        return self._sites[layout]

    def _planned(self, entries: Mapping[str, Entry]) -> SitePlan:
        alike: dict[tuple[Kind, int], list[tuple[int, float, np.ndarray]]] = {}
        edited = 0
        for (fingerprint, unit, strength), rows in self.rows.items():
            if fingerprint in entries:
                kind, first = entries[fingerprint]
                # Groups whose sizes differ by less than a factor of two share a product, padded to the largest.
                alike.setdefault((kind, len(rows).bit_length()), []).append((first + unit, strength, rows))
                edited += len(rows)
        batches = [(kind, self._batch(groups)) for (kind, _), groups in alike.items()]
        return SitePlan(batches, edited == self.tokens)

    def _batch(self, groups: list[tuple[int, float, np.ndarray]]) -> Batch:
        groups.sort(key=lambda group: group[:2])
        members, strengths, rows = zip(*groups, strict=True)
        sizes = [len(own) for own in rows]
        size = max(sizes)
        filled = np.empty((len(rows), size), dtype=np.int64)
        for line, own in zip(filled, rows, strict=True):
            line[: len(own)], line[len(own) :] = own, own[0]
        kept = gain = order = None
        if min(sizes) < size:
            kept = self._tensor(np.flatnonzero(np.arange(size) < np.array(sizes)[:, None]))
        if any(strength != 1 for strength in strengths):
            gain = self._tensor(np.array(strengths, dtype=np.float32))[:, None, None]
        places = self._tensor(filled.ravel()) if kept is not None else self._index(filled.ravel())
        if kept is None and filled.size == self.tokens:
            order = self._tensor(np.argsort(filled.ravel()))
        return Batch(self._index(np.array(members)), places, size, gain, kept, order)

    def _index(self, numbers: np.ndarray) -> slice | torch.Tensor:
        """A slice if the numbers are consecutive, which selects without a copy."""
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first + 1 == len(numbers) and (np.diff(numbers) == 1).all():
            return slice(first, last + 1)
        return self._tensor(numbers)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _rows(requests: Mapping[str, Editing], chunks: Iterable[Chunk]) -> tuple[dict[Group, np.ndarray], int]:
    """The rows of the pass that each group edits, int64, and the number of all rows."""
    rows: dict[Group, list[np.ndarray]] = {}
    place = 0
    for request, begin, count in chunks:
        editing = requests.get(request)
        if editing is not None and begin < editing.end:
            for run in edited_runs(editing.positions, editing.prompt, begin, begin + count):
                group = (editing.fingerprint, run.unit, editing.strength)
                rows.setdefault(group, []).append(np.arange(place + run.begin - begin, place + run.end - begin))
        place += count
    return {group: np.concatenate(parts) for group, parts in rows.items()}, place

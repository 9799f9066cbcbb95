"""What one pass edits: the tokens of each adapter's units, grouped so that few products serve many adapters."""

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
    """How one request is edited: by which adapter, how strongly, and on which tokens."""

    fingerprint: str
    strength: float
    positions: Positions
    prompt: int

    @cached_property
    def end(self) -> float:
        """The position from which on nothing is edited."""
        return inf if self.positions.tail else self.prompt + self.positions.counted


class Chunk(NamedTuple):
    """The tokens of one request in a pass: its id, the position of the first of them, and how many."""

    request: str
    begin: int
    count: int


class Entry(NamedTuple):
    """Where a site keeps an adapter: a kind of table, and its first member there."""

    kind: Kind
    first: int


# fingerprint, unit, strength
Group = tuple[str, int, float]


class Plan:
    """The edited tokens of one pass.

    Args:
        requests: how each request is edited, those without an adapter left out.
        chunks: the requests of the pass, in the order of their tokens.
        device: where the hidden representations are.
    """

    def __init__(self, requests: Mapping[str, Editing], chunks: Iterable[Chunk], device: torch.device) -> None:
        self.device = device
        self.rows = _rows(requests, chunks)
        self.fingerprints = sorted({fingerprint for fingerprint, _, _ in self.rows})
        self._batches: dict[tuple, list[tuple[Kind, Batch]]] = {}

    def batches(self, entries: Mapping[str, Entry]) -> list[tuple[Kind, Batch]]:
        """The batches of a site that keeps adapters (by fingerprint) there."""
        key = tuple(entries.get(fingerprint) for fingerprint in self.fingerprints)
        if key not in self._batches:
            self._batches[key] = self._batched(entries)
        return self._batches[key]

    def _batched(self, entries: Mapping[str, Entry]) -> list[tuple[Kind, Batch]]:
        alike: dict[tuple[Kind, int], list[tuple[int, float, np.ndarray]]] = {}
        for (fingerprint, unit, strength), rows in self.rows.items():
            if fingerprint in entries:
                kind, first = entries[fingerprint]
                # Groups of up to twice the size of each other share a product, filled up to the largest.
                alike.setdefault((kind, len(rows).bit_length()), []).append((first + unit, strength, rows))
        return [(kind, self._batch(groups)) for (kind, _), groups in alike.items()]

    def _batch(self, groups: list[tuple[int, float, np.ndarray]]) -> Batch:
        groups.sort(key=lambda group: group[:2])
        members, strengths, rows = zip(*groups, strict=True)
        sizes = [len(own) for own in rows]
        size = max(sizes)
        filled = np.stack([np.pad(own, (0, size - len(own)), constant_values=own[0]) for own in rows])
        kept = gain = None
        if min(sizes) < size:
            kept = self._tensor(np.flatnonzero(np.arange(size) < np.array(sizes)[:, None]))
        if any(strength != 1 for strength in strengths):
            gain = self._tensor(np.array(strengths, dtype=np.float32))[:, None, None]
        places = self._tensor(filled.ravel()) if kept is not None else self._index(filled.ravel())
        return Batch(self._index(np.array(members)), places, size, gain, kept)

    def _index(self, numbers: np.ndarray) -> slice | torch.Tensor:
        """A slice where the numbers follow each other: what they select need not be copied then."""
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first + 1 == len(numbers) and (np.diff(numbers) == 1).all():
            return slice(first, last + 1)
        return self._tensor(numbers)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _rows(requests: Mapping[str, Editing], chunks: Iterable[Chunk]) -> dict[Group, np.ndarray]:
    """The rows of the pass that each group edits, int64."""
    rows: dict[Group, list[np.ndarray]] = {}
    place = 0
    for request, begin, count in chunks:
        editing = requests.get(request)
        if editing is not None and begin < editing.end:
            for run in edited_runs(editing.positions, editing.prompt, begin, begin + count):
                group = (editing.fingerprint, run.unit, editing.strength)
                rows.setdefault(group, []).append(np.arange(place + run.begin - begin, place + run.end - begin))
        place += count
    return {group: np.concatenate(parts) for group, parts in rows.items()}

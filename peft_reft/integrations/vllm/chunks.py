"""Which tokens of a chunk are edited: arithmetic on absolute positions, no tensors.

An engine passes a sequence to the model in chunks: a part of its prompt, one generated token, a part of both after a
preemption. A request's prompt is one span, so every word of the position language selects one range of it.
"""

from __future__ import annotations

from typing import NamedTuple

from peft_reft.tokens.positions import Positions


class Run(NamedTuple):
    """Tokens `begin` to `end` (exclusive) of a sequence, which one unit of an adapter edits."""

    begin: int
    end: int
    unit: int


def edited_runs(positions: Positions, prompt: int, begin: int, end: int) -> list[Run]:
    """The edited tokens among `begin` to `end` (exclusive) of a sequence.

    Args:
        positions: the parsed spec.
        prompt: number of prompt tokens.
        begin, end: the chunk, counted from the first token of the sequence.

    Returns:
        Runs of absolute positions within the chunk, each with the index of its unit; none is empty, none overlap.
    """
    runs = []
    for kind, (count, code) in positions.kinds.items():
        first, behind = _selected(kind, count, positions, prompt)
        first, behind = max(first, begin), end if behind is None else min(behind, end)
        if first < behind:
            runs.append(Run(first, behind, code - 1))
    return runs


def _selected(kind: str, count: int, positions: Positions, prompt: int) -> tuple[int, int | None]:
    """The range that a word selects, as begin and end; the end is None if it is unbounded."""
    if kind == "all":
        return 0, None
    if kind == "prompt":
        return 0, prompt
    if kind == "completion":
        return prompt, None
    if kind == "count":
        return prompt, prompt + count
    count = min(count, prompt)
    edges = [positions.kinds[edge][0] for edge in ("first", "last") if edge in positions.kinds]
    if len(edges) == 2 and prompt < sum(edges):
        count = min(count, prompt // 2)
    return (0, count) if kind == "first" else (prompt - count, prompt)

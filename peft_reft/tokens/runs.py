"""The position language on runs of tokens: how a pass finds the tokens to edit, unless it is compiled.

A run is a stretch of tokens of one role in one sequence. A batch has few of them, so that all there is to do for every
token is to see where its run ends; the rest is arithmetic on a handful of numbers, on the host. Compiled passes have
the tensor functions of `positions` in their graph instead, which say the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from peft_reft.tokens.positions import IGNORE_INDEX, Positions

PADDING, PROMPT, COMPLETION, BEFORE = range(4)


@dataclass(frozen=True)
class Segments:
    """Stretches of tokens with one code each, one after the other through all rows of a batch.

    Attributes:
        shape: `(batch, tokens)`; no stretch goes on from one row to the next.
        lengths: int64 `[segments]`, some may be 0.
        codes: int8 `[segments]`: 0 for no edit, else 1 + the index of the unit.
        promptless: rows with a sequence that has no prompt, so that words of the prompt have no meaning there.
    """

    shape: tuple[int, int]
    lengths: np.ndarray
    codes: np.ndarray
    promptless: tuple[int, ...] = ()

    @classmethod
    def of(cls, codes: torch.Tensor) -> Segments:
        """From codes int8 `[batch, tokens]`."""
        shape = int(codes.shape[0]), int(codes.shape[1])
        flat = codes.cpu().contiguous().numpy().reshape(-1)
        begin = np.flatnonzero(_opens(flat, shape[1]))
        return cls(shape, _lengths(begin, flat.size), flat[begin])

    @classmethod
    def alike(cls, shape: tuple[int, int], code: int) -> Segments:
        """One code for all tokens."""
        batch, tokens = shape
        return cls(shape, np.full(batch, tokens), np.full(batch, code, dtype=np.int8))

    @property
    def edited(self) -> int:
        """Number of edited tokens."""
        return int(self.lengths @ (self.codes > 0))

    def grid(self) -> torch.Tensor:
        """The code of each token, int8 `[batch, tokens]` on the CPU."""
        return torch.from_numpy(np.repeat(self.codes, self.lengths).reshape(self.shape))

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat indices of the edited tokens, int64 `[edited]`, and their codes, int8 `[edited]`, on the CPU."""
        edited = self.codes > 0
        lengths, codes = self.lengths[edited], self.codes[edited]
        begin = (self.lengths.cumsum() - self.lengths)[edited]
        end = lengths.cumsum()
        index = np.arange(end[-1] if len(end) else 0) + np.repeat(begin - (end - lengths), lengths)
        return torch.from_numpy(index), torch.from_numpy(np.repeat(codes, lengths))

    def without_past(self, past: int) -> Segments:
        """Less the first `past` tokens of each row."""
        if past == 0:
            return self
        batch, tokens = self.shape
        end = np.cumsum(self.lengths)
        begin = end - self.lengths
        # An empty segment at the end of a row may count to the next one, where it is as empty.
        first = begin // tokens * tokens + past
        lengths = np.maximum(end, first) - np.maximum(begin, first)
        return Segments((batch, tokens - past), lengths, self.codes, self.promptless)


@dataclass(frozen=True)
class Runs:
    """The runs of a batch, in the order of its tokens.

    Attributes:
        shape: `(batch, tokens)`.
        begin: int64 `[runs]`, flat index of each run's first token.
        roles: `[runs]`, PADDING, PROMPT, COMPLETION, or BEFORE for real tokens ahead of any prompt of their sequence.
        sequence: int64 `[runs]`, numbers of the sequences; several in a row when they are packed.
        promptless: rows with a sequence that has no prompt.
    """

    shape: tuple[int, int]
    begin: np.ndarray
    roles: np.ndarray
    sequence: np.ndarray
    promptless: tuple[int, ...] = ()

    @classmethod
    def of_labels(
        cls, labels: torch.Tensor, real: torch.Tensor, starts: torch.Tensor | None = None, turn: int = 0
    ) -> Runs:
        """The runs that next-token labels describe, see `positions.prompt_from_labels`.

        Args:
            labels: `[batch, tokens]`, -100 where nothing is supervised.
            real: bool `[batch, tokens]`, False on padding.
            starts: bool `[batch, tokens]`, first tokens of packed sequences, or None for one sequence a row.
            turn: see `of_prompt`.
        """
        # NumPy compares integers in half the time that torch takes.
        on_host = labels.device.type == "cpu"
        labeled = torch.from_numpy(labels.numpy() != IGNORE_INDEX) if on_host else labels != IGNORE_INDEX
        runs = cls._of(real.to(torch.uint8) + (real & labeled).to(torch.uint8), starts, turn)
        return runs._told_by_labels()

    @classmethod
    def of_prompt(
        cls, prompt: torch.Tensor, real: torch.Tensor, starts: torch.Tensor | None = None, turn: int = 0
    ) -> Runs:
        """The runs of a batch whose prompt is known.

        Args:
            prompt: bool `[batch, tokens]`, prompt tokens.
            real: bool `[batch, tokens]`, False on padding.
            starts: bool `[batch, tokens]`, first tokens of packed sequences, or None for one sequence a row.
            turn: index of a token that opens a new span even right behind a prompt token; 0 for none.
        """
        completion = (real & ~prompt).to(torch.uint8)
        return cls._of(real.to(torch.uint8) + completion, starts, turn)._after_prompts()

    @classmethod
    def one_prompt(cls, shape: tuple[int, int]) -> Runs:
        """The runs of a batch whose tokens are all prompt."""
        rows = np.arange(shape[0])
        return cls(shape, rows * shape[1], np.full(shape[0], PROMPT), rows)

    @classmethod
    def of_completion(cls, real: torch.Tensor) -> Runs:
        """The runs of a batch without a prompt, such as the decoder's in an encoder-decoder model."""
        return cls._of(real.to(torch.uint8) * COMPLETION)

    @classmethod
    def _of(cls, roles: torch.Tensor, starts: torch.Tensor | None = None, turn: int = 0) -> Runs:
        batch, tokens = map(int, roles.shape)  # tensors in a trace
        # For tokens on a GPU this is the one host synchronization of a pass.
        flat = roles.cpu().numpy().reshape(-1)
        opens = _opens(flat, tokens)
        if turn:
            opens[turn::tokens] = True
        if starts is None:
            begin = np.flatnonzero(opens)
            sequence = begin // max(tokens, 1)
        else:
            packed = starts.cpu().numpy().reshape(-1)
            begin = np.flatnonzero(opens | packed)
            sequence = np.cumsum((begin % tokens == 0) | packed[begin]) - 1
        return cls((batch, tokens), begin, flat[begin], sequence)

    def segments(self, positions: Positions) -> Segments:
        """Which unit edits which token: as `positions.assign` says it."""
        kinds = positions.kinds
        lengths = _lengths(self.begin, self.shape[0] * self.shape[1])
        prompt = self.roles == PROMPT
        # A prompt is its first words, what is between, and its last words; a completion its counted words and the rest.
        codes = np.zeros((4, 3), dtype=np.int8)
        codes[PROMPT] = _codes(kinds, "first", "prompt", "last")
        codes[COMPLETION] = _codes(kinds, "count", "completion", "completion")
        codes[BEFORE] = _codes(kinds, "all", "all", "all")
        parts = np.zeros((len(lengths), 3), dtype=np.int64)
        head, body, tail = parts.T
        first, last = (kinds.get(kind, (0, 0))[0] for kind in ("first", "last"))
        if last:
            np.minimum(lengths, last, out=tail, where=prompt)
        if first:
            opening = self._openings(prompt)
            length = lengths[opening]
            crowded = (length < first + last) & (last > 0)
            head[opening] = np.where(crowded, length // 2, np.minimum(length, first)).clip(max=first)
            tail[opening] = np.where(crowded, (length // 2).clip(max=last), tail[opening])
        if "count" in kinds:
            completion = self.roles == COMPLETION
            left = kinds["count"][0] - self._completed(lengths, prompt, completion)
            head[completion] = np.clip(left, 0, lengths)[completion]
        np.subtract(lengths, head + tail, out=body)
        return Segments(self.shape, parts.reshape(-1), codes[self.roles].reshape(-1), self.promptless)

    def _told_by_labels(self) -> Runs:
        """With roles in place of real tokens (PROMPT) and labeled ones (COMPLETION)."""
        labeled, real = self.roles == COMPLETION, self.roles != PADDING
        opening = self._openings(real)
        if not labeled[opening].any() and np.count_nonzero(self.roles == PROMPT) == len(opening):
            # One turn in each sequence, and nothing without a label behind it.
            return self
        last = np.full(self._sequences, -1)
        where = np.flatnonzero(labeled)
        # Of the values that go to one place the last one stays.
        last[self.sequence[where]] = where
        last = last[self.sequence]
        trailing = real & ~labeled & (last >= 0) & (np.arange(len(last)) > last)
        roles = np.where(trailing, COMPLETION, self.roles)
        promptless = self.begin[opening[labeled[opening]]] // max(self.shape[1], 1)
        rows = tuple(dict.fromkeys(promptless.tolist()))
        return Runs(self.shape, self.begin, roles, self.sequence, rows)._after_prompts()

    def _after_prompts(self) -> Runs:
        """With only that as completion which comes behind a prompt of its sequence."""
        early = self.roles[self._openings(self.roles != PADDING)] == COMPLETION
        if not early.any():
            return self
        opening = self._openings(self.roles == PROMPT)
        first = np.full(self._sequences, len(self.roles))
        first[self.sequence[opening]] = opening
        before = (self.roles == COMPLETION) & (np.arange(len(self.roles)) < first[self.sequence])
        return replace(self, roles=np.where(before, BEFORE, self.roles))

    @property
    def _sequences(self) -> int:
        return int(self.sequence[-1]) + 1 if len(self.sequence) else 0

    def _openings(self, chosen: np.ndarray) -> np.ndarray:
        """Index of the first chosen run of each sequence that has one."""
        where = np.flatnonzero(chosen)
        return where[_changes(self.sequence[where])]

    def _completed(self, lengths: np.ndarray, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
        """Number of completion tokens before each run, since the last prompt or the start of its sequence."""
        lengths = np.where(completion, lengths, 0)
        before = np.cumsum(lengths) - lengths
        opens = _changes(self.sequence)
        # It never falls, so its running maximum over some runs is its value at the latest of them.
        return before - np.maximum.accumulate(np.where(prompt | opens, before, 0))


def _opens(flat: np.ndarray, tokens: int) -> np.ndarray:
    """Whether a token differs from the one before it, or is the first of its row."""
    opens = _changes(flat)
    opens[:: max(tokens, 1)] = True
    return opens


def _changes(values: np.ndarray) -> np.ndarray:
    """Whether a value is the first one, or differs from the one before it."""
    changes = np.empty(len(values), dtype=bool)
    changes[:1] = True
    np.not_equal(values[1:], values[:-1], out=changes[1:])
    return changes


def _lengths(begin: np.ndarray, total: int) -> np.ndarray:
    # Faster than np.diff with its `append`.
    lengths = np.empty(len(begin), dtype=np.int64)
    np.subtract(begin[1:], begin[:-1], out=lengths[:-1])
    lengths[-1:] = total - begin[-1:]
    return lengths


def _codes(kinds: dict[str, tuple[int, int]], *parts: str) -> tuple[int, ...]:
    """The unit's code for each part of a run, where `all` takes every part."""
    whole = kinds.get("all", (0, 0))
    return tuple(kinds.get(part, whole)[1] for part in parts)

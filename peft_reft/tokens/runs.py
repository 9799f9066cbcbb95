"""The position finder: from marks on the tokens of a batch to the tokens that a spec selects.

A run is a stretch of tokens of one role in one sequence. A batch has few runs, so each token is looked at only to see
where its run ends; the rest is arithmetic on a handful of numbers, on the host. Graphs (compiled, traced, exported)
call the same code as an opaque operator, `torch.ops.peft_reft.find_positions`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from peft_reft.tokens.positions import Positions, parse
from peft_reft.tokens.selections import EVERY_TOKEN, Selection, repeat_rows, rows_of_batch

IGNORE_INDEX = -100

PADDING, PROMPT, COMPLETION, BEFORE = range(4)
# A bit that is added to the role of a token which opens a packed sequence.
_OPENS = 4

_REMEDIES = (
    "Use prompt/completion data, or assistant_only_loss=True with conversations, so that the prompt carries no labels "
    "(-100); or edit every token with positions='all'; or pass prompt_mask to forward."
)
_NOTHING_EDITED = (
    "positions='{}' edits no token of this training batch: its prompts (or answers) are too short, prompt_mask marks "
    "nothing, or the model has no answers, like encoders and classifiers. Use longer ones, or positions='all'."
)


@dataclass(frozen=True)
class Segments:
    """Stretches of tokens with one code each, in order through all rows of a batch.

    Attributes:
        shape: `(batch, tokens)`; no stretch extends into the next row.
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

    def selection(self, positions: Positions, batch: int, device: torch.device, training: bool) -> Selection | None:
        """The tokens to edit, None for none.

        Args:
            positions: the spec that the codes encode.
            batch: number of rows of the pass, a multiple of those here: each is repeated equally often.
            device: where the selection is needed.
            training: whether to warn when nothing is edited, and to select no tokens rather than None.

        Raises:
            ValueError: a row has no prompt, which `positions` needs; or `batch` is no multiple of the rows here.
        """
        self.refuse_promptless(positions)
        if batch != self.shape[0]:
            repeated = Segments.of(repeat_rows(self.grid(), batch))
            return repeated.selection(positions, batch, device, training)
        total, edited = self.shape[0] * self.shape[1], self.edited
        if edited == 0:
            if not training:
                return None
            # An empty selection gives the parameters zero gradients, so that DDP does not wait for them.
            warnings.warn(_NOTHING_EDITED.format(positions), stacklevel=2)
        if positions.units == 1 and edited == total:
            return EVERY_TOKEN
        if 2 * edited > total:
            return Selection(_moved(self.grid(), device))
        flat_index, units = self.tokens()
        units = None if positions.units == 1 else _moved(units.long() - 1, device)
        return Selection(None, _moved(flat_index, device), units)

    def of_rows(self, positions: Positions, rows: torch.Tensor) -> torch.Tensor:
        """The code of each token of some `rows`, bool `[batch]`, 0 in the others; int8 `[batch, tokens]`.

        Raises:
            ValueError: see `selection`.
        """
        self.refuse_promptless(positions, rows)
        return repeat_rows(self.grid(), len(rows)) * rows[:, None]

    def refuse_promptless(self, positions: Positions, rows: Sequence[bool] | None = None) -> None:
        """Raise a ValueError where a row (of those that `rows` chooses) has no prompt, which `positions` needs."""
        promptless = [row for row in self.promptless if rows is None or rows[row]]
        if promptless and positions.needs_prompt:
            raise ValueError(
                f"positions={str(positions)!r} needs to know where the prompt ends, but the labels of "
                f"{rows_of_batch(promptless, self.shape[0])} supervise the very first token or, in packed sequences, "
                "every token except the first, as padding-free collators do with plain text: there is no prompt. "
                f"{_REMEDIES}"
            )

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
        """Without the first `past` tokens of each row."""
        batch, tokens = self.shape
        end = np.cumsum(self.lengths)
        begin = end - self.lengths
        # An empty segment at the end of a row may count as part of the next one, where it stays empty.
        first = begin // tokens * tokens + past
        lengths = np.maximum(end, first) - np.maximum(begin, first)
        return Segments((batch, tokens - past), lengths, self.codes, self.promptless)


@dataclass(frozen=True, eq=False)
class Marks:
    """The marks that determine the prompt of each sequence of a batch.

    Attributes:
        real: bool `[batch, tokens]`, False on padding.
        prompt: bool `[batch, tokens]`, None if unknown. Tokens before the first prompt are then not completion.
        labels: `[batch, tokens]`, -100 where nothing is supervised: unlabeled tokens that a labeled one of their
            sequence follows are prompt. A sequence without any label is all prompt: it has no completion. Without
            `prompt` and `labels` all tokens are completion, like the decoder's in an encoder-decoder model.
        starts: bool `[batch, tokens]`, first tokens of packed sequences, or None for one sequence per row.
        turn: index of a token that opens a new span even right after a prompt token; 0 for none.
    """

    real: torch.Tensor
    prompt: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    turn: int = 0
    _runs: list[Runs] = field(default_factory=list, init=False)

    def runs(self) -> Runs:
        """The runs of the batch, found once."""
        if not self._runs:
            labeled = None
            if self.labels is not None:
                # NumPy compares integers in half the time that torch takes.
                on_host = self.labels.device.type == "cpu"
                labels = self.labels.numpy() if on_host else self.labels
                labeled = torch.as_tensor(labels != IGNORE_INDEX)
            self._runs.append(Runs.of(self._grid(labeled), *self._kind, self.turn))
        return self._runs[0]

    def segments(self, positions: Positions, past: int = 0) -> Segments:
        """The code of each token after the first `past` of its row."""
        segments = self.runs().segments(positions)
        return segments.without_past(past) if past else segments

    def grid(self, positions: Positions) -> torch.Tensor:
        """The code of each token, int8 `[batch, tokens]` on the CPU."""
        return self.runs().segments(positions).grid()

    def prompt_grid(self) -> torch.Tensor:
        """Which tokens are prompt, bool `[batch, tokens]` on the CPU."""
        runs = self.runs()
        lengths = _lengths(runs.begin, self.real.numel())
        return torch.from_numpy(np.repeat(runs.roles == PROMPT, lengths).reshape(runs.shape))

    def codes(self, positions: Positions, past: int = 0) -> torch.Tensor:
        """The code of each token after the first `past`, int8 `[batch, tokens - past]`, by an operator for graphs.

        Raises:
            ValueError: when the graph runs, see `Segments.refuse_promptless`.
        """
        labeled = None if self.labels is None else self.labels != IGNORE_INDEX
        return find_positions(self._grid(labeled), *self._kind, self.turn, past, str(positions), positions.shared)

    @property
    def _kind(self) -> tuple[bool, bool, bool]:
        return self.starts is not None, self.labels is not None, self.prompt is not None

    def _grid(self, labeled: torch.Tensor | None) -> torch.Tensor:
        """One number per token: its role, plus `_OPENS` where a sequence begins. One transfer to the host suffices."""
        roles = self.real.to(torch.uint8)
        if labeled is not None:
            roles = roles + (self.real & labeled)
        else:
            roles = roles * COMPLETION if self.prompt is None else roles + (self.real & ~self.prompt)
        return roles if self.starts is None else roles + self.starts.to(torch.uint8) * _OPENS


@torch.library.custom_op("peft_reft::find_positions", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def find_positions(
    grid: torch.Tensor,
    packed: bool,
    told_by_labels: bool,
    prompt_known: bool,
    turn: int,
    past: int,
    spec: str,
    shared: bool,
) -> torch.Tensor:
    """See `Marks.codes`. Opaque to compilers; on a GPU it waits for the tokens."""
    positions = parse(spec, shared)
    segments = Runs.of(grid, packed, told_by_labels, prompt_known, turn).segments(positions)
    segments.refuse_promptless(positions)
    return (segments.without_past(past) if past else segments).grid().to(grid.device)


@find_positions.register_fake
def _(
    grid: torch.Tensor, _packed: bool, _labels: bool, _known: bool, _turn: int, past: int, *_spec: str | bool
) -> torch.Tensor:
    return grid.new_empty((grid.shape[0], grid.shape[1] - past), dtype=torch.int8)


@dataclass(frozen=True)
class Runs:
    """The runs of a batch, in the order of its tokens.

    Attributes:
        shape: `(batch, tokens)`.
        begin: int64 `[runs]`, flat index of each run's first token.
        roles: `[runs]`, PADDING, PROMPT, COMPLETION, or BEFORE for real tokens before any prompt of their sequence.
        sequence: int64 `[runs]`, numbers of the sequences; several in a row when they are packed.
        turn: see `Marks`.
        promptless: rows with a sequence that has no prompt, or that looks as if plain text were packed into it.
    """

    shape: tuple[int, int]
    begin: np.ndarray
    roles: np.ndarray
    sequence: np.ndarray
    turn: int = 0
    promptless: tuple[int, ...] = ()

    @classmethod
    def of(cls, grid: torch.Tensor, packed: bool, told_by_labels: bool, prompt_known: bool, turn: int = 0) -> Runs:
        """The runs of a batch. For tokens on a GPU this is the one host synchronization of a pass.

        Args:
            grid: uint8 `[batch, tokens]`, the role of each token, plus `_OPENS` where a packed sequence begins.
            packed: whether rows hold several sequences.
            told_by_labels: whether COMPLETION means that a token has a label, and PROMPT that it has none.
            prompt_known: whether tokens before any prompt of their sequence are not completion.
            turn: see `Marks`.
        """
        batch, tokens = map(int, grid.shape)
        flat = grid.cpu().numpy().reshape(-1)
        starts = flat >= _OPENS if packed else None
        flat = flat & (_OPENS - 1) if packed else flat
        opening = _opens(flat, tokens)
        if turn:
            opening[turn::tokens] = True
        begin = np.flatnonzero(opening if starts is None else opening | starts)
        sequence = begin // max(tokens, 1)
        if starts is not None:
            sequence = np.cumsum((begin % tokens == 0) | starts[begin]) - 1
        runs = cls((batch, tokens), begin, flat[begin], sequence, turn)
        if told_by_labels:
            return runs._told_by_labels()._without_plain_text(packed)
        return runs._after_prompts() if prompt_known else runs

    @classmethod
    def one_prompt(cls, shape: tuple[int, int]) -> Runs:
        """The runs of a batch whose tokens are all prompt."""
        rows = np.arange(shape[0])
        return cls(shape, rows * shape[1], np.full(shape[0], PROMPT), rows)

    def segments(self, positions: Positions) -> Segments:
        """Which unit edits which token."""
        kinds = positions.kinds
        lengths = _lengths(self.begin, self.shape[0] * self.shape[1])
        prompt = self.roles == PROMPT
        # A prompt splits into its first tokens, the middle and its last ones; a completion into counted ones and rest.
        codes = np.zeros((4, 3), dtype=np.int8)
        codes[PROMPT] = _codes(kinds, "first", "prompt", "last")
        codes[COMPLETION] = _codes(kinds, "count", "completion", "completion")
        codes[BEFORE] = _codes(kinds, "all", "all", "all")
        parts = np.zeros((len(lengths), 3), dtype=np.int64)
        head, body, tail = parts.T
        first, last = (kinds.get(kind, (0, 0))[0] for kind in ("first", "last"))
        if first or last:
            before, after, opening = self._in_spans(lengths, prompt)
            crowded = opening & (before + lengths + after < first + last) & (first > 0) & (last > 0)
            half = (before + lengths + after) // 2
            heads = np.where(crowded, np.minimum(half, first), first) * opening
            tails = np.where(crowded, np.minimum(half, last), last) * prompt
            np.clip(heads - before, 0, lengths, out=head)
            np.clip(tails - after, 0, lengths - head, out=tail)
        if "count" in kinds:
            completion = self.roles == COMPLETION
            left = kinds["count"][0] - self._completed(lengths, prompt, completion)
            head[completion] = np.clip(left, 0, lengths)[completion]
        np.subtract(lengths, head + tail, out=body)
        return Segments(self.shape, parts.reshape(-1), codes[self.roles].reshape(-1), self.promptless)

    def _in_spans(self, lengths: np.ndarray, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each prompt run: tokens of its span before and after it, and whether the span is its sequence's first.

        A span is one run, unless there is padding in the middle of a prompt.
        """
        opening = np.zeros(len(lengths), dtype=bool)
        opening[self._openings(prompt)] = True
        none = np.zeros(len(lengths), dtype=np.int64)
        where = np.flatnonzero(prompt)
        left, right = where[:-1], where[1:]
        column = self.begin % max(self.shape[1], 1)
        # A turn or the start of a packed sequence separates adjacent runs.
        apart = (right == left + 1) | (self.sequence[left] != self.sequence[right])
        if self.turn:
            apart |= (column[left] < self.turn) & (column[right] >= self.turn)
        between = right - left - 1
        padding = np.cumsum(self.roles == PADDING)
        apart |= padding[right] - padding[left] != between
        if apart.all():
            return none, none, opening
        span = np.concatenate([[0], np.cumsum(apart)])
        total = np.bincount(span, lengths[where]).astype(np.int64)
        before, after = none, none.copy()
        ends = lengths[where].cumsum()
        begins = np.concatenate([[0], total.cumsum()[:-1]])
        before[where] = ends - lengths[where] - begins[span]
        after[where] = total[span] - before[where] - lengths[where]
        opening[where] = np.bincount(span, opening[where]).astype(bool)[span]
        return before, after, opening

    def _told_by_labels(self) -> Runs:
        """With real (PROMPT) and labeled (COMPLETION) tokens turned into the roles that they imply."""
        labeled, real = self.roles == COMPLETION, self.roles != PADDING
        opening = self._openings(real)
        if not labeled[opening].any() and np.count_nonzero(self.roles == PROMPT) == len(opening):
            # One turn in each sequence, and no unlabeled tokens after it.
            return self
        last = np.full(self._sequences, -1)
        where = np.flatnonzero(labeled)
        # Where an index repeats, NumPy keeps the last value.
        last[self.sequence[where]] = where
        last = last[self.sequence]
        trailing = real & ~labeled & (last >= 0) & (np.arange(len(last)) > last)
        roles = np.where(trailing, COMPLETION, self.roles)
        promptless = self.begin[opening[labeled[opening]]] // max(self.shape[1], 1)
        rows = tuple(dict.fromkeys(promptless.tolist()))
        return replace(self, roles=roles, promptless=rows)._after_prompts()

    def _without_plain_text(self, packed: bool) -> Runs:
        """With all rows promptless if each packed sequence with labels has them on all tokens except its first.

        Padding-free collators label plain text this way: the previous sequence would predict a label there.
        """
        if not packed:
            return self
        lengths = _lengths(self.begin, self.shape[0] * self.shape[1])
        prompts, completions = (
            np.bincount(self.sequence, lengths * (self.roles == role)) for role in (PROMPT, COMPLETION)
        )
        answered = completions > 0
        if not answered.any() or (prompts[answered] != 1).any():
            return self
        return replace(self, promptless=tuple(range(self.shape[0])))

    def _after_prompts(self) -> Runs:
        """With completion tokens that no prompt of their sequence precedes turned into BEFORE."""
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
        begins = _changes(self.sequence)
        # It never falls, so its running maximum over some runs is its value at the latest of them.
        return before - np.maximum.accumulate(np.where(prompt | begins, before, 0))


def _codes(kinds: dict[str, tuple[int, int]], *parts: str) -> tuple[int, ...]:
    """The unit's code for each part of a run, where `all` takes every part."""
    whole = kinds.get("all", (0, 0))
    return tuple(kinds.get(part, whole)[1] for part in parts)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # With `non_blocking`, CUDA copies from pageable memory without waiting for the device.
    return tensor.to(device, non_blocking=device.type == "cuda")


def _opens(flat: np.ndarray, tokens: int) -> np.ndarray:
    """Whether a token differs from the one before it, or is the first of its row."""
    differs = _changes(flat)
    differs[:: max(tokens, 1)] = True
    return differs


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

"""What one pass edits: a plan for each stream of tokens, and the selection that a layer gets from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peft_reft.tokens import positions as pos
from peft_reft.tokens.positions import Positions
from peft_reft.tokens.runs import Runs, Segments

if TYPE_CHECKING:
    from peft_reft.tokens.requests import RowPositions, Rows

# Streams of tokens: an encoder-decoder model has both, any other model only the first.
DECODER, ENCODER = "decoder", "encoder"

# Position spec -> codes [batch, tokens] as `positions.assign` returns them, or what stands for them outside of compiled
# graphs; or the code of a unit that edits every token, or None when nothing is edited.
Codes = Callable[[Positions], torch.Tensor | Segments | int | None]

_REMEDIES = (
    "Use prompt/completion data, or assistant_only_loss=True with conversations, so that the prompt carries no labels "
    "(-100); or edit every token with positions='all'; or pass prompt_mask to forward."
)
_NOTHING_EDITED = (
    "positions='{}' edits no token of this training batch: its prompts (or answers) are too short. Plain language "
    "modeling data looks so when a padding-free collator takes the label off each first token, which leaves prompts of "
    "one token. Use prompt/completion data, or positions='all'."
)


@dataclass(frozen=True)
class Selection:
    """The edited tokens of one pass, for one position spec; everything is None where unit 0 edits every token.

    `codes` is int8 `[batch, tokens]` as `positions.assign` returns it. Outside compiled graphs `rows` `[n]` holds the
    flat indices of the edited tokens and `units` `[n]` their units, unless so many are edited that going through all
    of them is cheaper.
    """

    codes: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    units: torch.Tensor | None = None

    def to(self, device: torch.device) -> Selection:
        # CUDA copies from ordinary memory without a wait for the device when told so.
        options = {"non_blocking": device.type == "cuda"}
        moved = (None if t is None else t.to(device, **options) for t in (self.codes, self.rows, self.units))
        return Selection(*moved)


EVERYTHING = Selection()


@dataclass(frozen=True)
class RowSelection:
    """The edited tokens of one pass whose rows have different adapters.

    `codes` is int8 `[rows, k]`: the unit of each of the row's tokens at `index` `[rows, k]`, 0 for no edit. Without
    `index` they are those of all tokens.
    """

    codes: torch.Tensor
    index: torch.Tensor | None = None


class Plan:
    """What one pass edits in one stream of tokens.

    Args:
        shape: `(batch, tokens)` of the pass, or None when the model does not tell (any module output fits then).
        codes: see `Codes`; asked when the first layer needs it, for adapters may be disabled.
        training: whether to warn when nothing is edited.
        rows: what the caller asks of each row, if he does.
        behind: number of tokens between the prompt and those of the pass, -1 where some may be prompt.
    """

    def __init__(
        self,
        shape: tuple[int, int] | None,
        codes: Codes,
        training: bool = False,
        rows: Rows | None = None,
        behind: int = -1,
    ) -> None:
        self.shape = shape
        self.behind = behind
        self.training = training
        self.rows = rows
        # What each layer does in this pass.
        self.actions: dict[Hashable, Any] = {}
        self._codes = codes
        self._selections: dict[tuple[Positions | RowPositions, torch.device], Selection | RowSelection | None] = {}

    def of(self, hidden: torch.Tensor) -> Plan:
        """The plan for an output `hidden` `[batch, tokens, d]`."""
        return self

    def selection(self, positions: Positions, hidden: torch.Tensor, name: str) -> Selection | None:
        """The tokens of `hidden` `[batch, tokens, d]` to edit, None for none; `name` tells in errors whose it is.

        Raises:
            ValueError: `hidden` has another token axis than the model's input, or its prompt cannot be told.
        """
        if not positions.needs_prompt and self._cut(hidden):
            return EVERYTHING
        self._check_shape(positions, hidden, name)
        key = (positions, hidden.device)
        if key not in self._selections:
            self._selections[key] = self._select(positions, hidden)
        return self._selections[key]

    def selection_by_row(self, positions: RowPositions, hidden: torch.Tensor, name: str) -> RowSelection | None:
        """As `selection`, for rows that have their own position spec each."""
        # Only a head's single token: rows of other modules, such as a vision tower's, may not be those of the batch.
        last_alone = self._cut(hidden) and hidden.shape[1] == 1
        if last_alone and not any(spec.needs_prompt for spec in positions.masks):
            return RowSelection(torch.ones(hidden.shape[:2], dtype=torch.int8, device=hidden.device))
        self._check_shape(next(iter(positions.masks)), hidden, name)
        key = (positions, hidden.device)
        if key not in self._selections:
            self._selections[key] = self._select_by_row(positions, hidden)
        return self._selections[key]

    def _cut(self, hidden: torch.Tensor) -> bool:
        """Whether `hidden` has other tokens than the pass: generation calls a head for the last one alone."""
        return self.shape is not None and hidden.dim() == 3 and hidden.shape[1] != self.shape[1]

    def _check_shape(self, positions: Positions, hidden: torch.Tensor, name: str) -> None:
        if self.shape is not None and (hidden.dim() != 3 or tuple(hidden.shape[:2]) != self.shape):
            raise ValueError(
                f"{name} {tuple(hidden.shape)}, but this pass has {self.shape[0]} sequences of "
                f"{self.shape[1]} tokens, so positions={str(positions)!r} has no meaning there. Choose modules whose "
                "output is [batch, tokens, features] with target_modules or layers_to_transform."
            )

    def codes(self, positions: Positions, device: torch.device) -> torch.Tensor:
        """Code of each token, int8 `[batch, tokens]`, for a plan that knows its shape."""
        codes = self._codes(positions)
        if isinstance(codes, Segments):
            return codes.grid()
        if isinstance(codes, torch.Tensor):
            return codes
        return torch.full(self.shape, codes or 0, dtype=torch.int8, device=device)

    def _select(self, positions: Positions, hidden: torch.Tensor) -> Selection | None:
        codes = self._codes(positions)
        if codes is None:
            return None
        if isinstance(codes, int) and positions.units == 1:
            return EVERYTHING
        if torch.compiler.is_compiling():
            return Selection(_spread(codes, hidden).to(hidden.device))
        codes = _segments(codes, hidden)
        _check_prompts(codes.promptless, positions, hidden)
        total = codes.shape[0] * codes.shape[1]
        edited = codes.edited
        if edited == 0:
            if not self.training:
                return None
            # Goes on with no rows: the parameters get their gradients, which are zero, and DDP does not wait for them.
            warnings.warn(_NOTHING_EDITED.format(positions), stacklevel=2)
        if positions.units == 1 and edited == total:
            return EVERYTHING
        if 2 * edited > total:
            return Selection(codes.grid()).to(hidden.device)
        rows, units = codes.tokens()
        return Selection(rows=rows, units=None if positions.units == 1 else units.long() - 1).to(hidden.device)

    def _select_by_row(self, positions: RowPositions, hidden: torch.Tensor) -> RowSelection | None:
        combined = None
        for spec, mask in positions.masks.items():
            codes = self._codes(spec)
            if codes is None:
                continue
            if torch.compiler.is_compiling():
                codes = _spread(codes, hidden)
            else:
                codes = _segments(codes, hidden)
                _check_prompts([row for row in codes.promptless if mask[row]], spec, hidden)
                codes = codes.grid()
            codes = codes * mask[:, None].to(codes.device)
            combined = codes if combined is None else combined + codes
        if combined is None:
            return None
        if torch.compiler.is_compiling():
            return RowSelection(combined.to(hidden.device))
        most = int((combined > 0).sum(-1).max())
        if most == 0:
            return None
        if 2 * most > combined.shape[1]:
            return RowSelection(combined.to(hidden.device))
        # Edited tokens first; a row with fewer of them than others is filled up with tokens of code 0.
        index = (combined > 0).to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
        return RowSelection(combined.gather(1, index).to(hidden.device), index.to(hidden.device))


def _spread(codes: torch.Tensor | int, hidden: torch.Tensor) -> torch.Tensor:
    """Codes as int8 `[batch, tokens]` of `hidden`, whose rows may be repeats of those in `codes`."""
    if isinstance(codes, int):
        return torch.full(hidden.shape[:2], codes, dtype=torch.int8, device=hidden.device)
    if hidden.shape[0] % codes.shape[0]:
        raise ValueError(
            f"generate was called with {codes.shape[0]} sequences, but a pass of it has {hidden.shape[0]}, so they "
            "cannot be told apart. Decoding loops must keep all rows, or repeat each of them equally often."
        )
    return codes.repeat_interleave(hidden.shape[0] // codes.shape[0], dim=0)


def _segments(codes: torch.Tensor | Segments | int, hidden: torch.Tensor) -> Segments:
    """Codes of the tokens of `hidden`, as `_spread`, but on the host."""
    shape = int(hidden.shape[0]), int(hidden.shape[1])
    if isinstance(codes, int):
        return Segments.alike(shape, codes)
    if isinstance(codes, Segments):
        if codes.shape == shape:
            return codes
        codes = codes.grid()
    return Segments.of(_spread(codes, hidden))


def _check_prompts(promptless: Sequence[int], positions: Positions, hidden: torch.Tensor) -> None:
    if promptless and positions.needs_prompt:
        raise ValueError(
            f"positions={str(positions)!r} needs to know where the prompt ends, but the labels of "
            f"{rows_of_batch(promptless, len(hidden))} supervise the very first token: there is no prompt. {_REMEDIES}"
        )


def rows_of_batch(rows: Sequence[int], batch: int) -> str:
    """How messages name some rows of a batch."""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))} of this batch of {batch}"


class WholeSequence(Plan):
    """The plan of a pass that says nothing about its tokens: all that a module puts out is one prompt."""

    def __init__(self, rows: Rows | None = None) -> None:
        super().__init__(None, self._every_token, rows=rows)

    def of(self, hidden: torch.Tensor) -> Plan:
        shape = tuple(hidden.shape[:2])

        def codes(positions: Positions) -> torch.Tensor | Segments | int:
            if not positions.needs_prompt:
                return positions.tail
            if torch.compiler.is_compiling():
                prompt = torch.ones(shape, dtype=torch.bool, device=hidden.device)
                return pos.assign(positions, prompt, torch.zeros_like(prompt))
            return Runs.one_prompt(shape).segments(positions)

        return Plan(shape, codes, rows=self.rows)

    @staticmethod
    def _every_token(positions: Positions) -> int:
        return positions.tail

"""One pass through a model: the tokens of its streams, and the selection of them that a layer gets.

a call --> Pass --> Stream (one for each stream of tokens) --> Selection, for the positions of an edit
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from peft_reft.tokens.positions import Positions
from peft_reft.tokens.requests import RowPositions, RowRequests
from peft_reft.tokens.runs import Marks, Runs, Segments
from peft_reft.tokens.selections import EVERY_TOKEN, RowSelection, Selection, edited_first, repeat_rows


@dataclass(eq=False)
class Stream:
    """The tokens of one stream in one pass. Subclasses find them: `segments` on the host, `code_of_all` and `codes` in
    graphs.

    Attributes:
        shape: `(batch, tokens)`.
        training: whether to warn when nothing is edited.
        tokens_after_prompt: number of tokens between the prompt and those of the pass, -1 where some may be prompt.
    """

    shape: tuple[int, int]
    training: bool = False
    tokens_after_prompt: int = -1
    _selections: dict[tuple, Selection | RowSelection | None] = field(default_factory=dict, init=False)

    def segments(self, positions: Positions, shape: tuple[int, int]) -> Segments:
        """The code of each token, on the host; `shape` is the `(batch, tokens)` of the edited output."""
        raise NotImplementedError

    def code_of_all(self, positions: Positions) -> int | None:
        """The code of every token (0 for no edit), None where they may differ."""
        raise NotImplementedError

    def codes(self, positions: Positions) -> torch.Tensor:
        """The code of each token, int8 `[batch, tokens]`, by operations that fit in a graph."""
        raise NotImplementedError

    def select(self, positions: Positions, hidden: torch.Tensor, name: str) -> Selection | None:
        """The tokens of `hidden` `[batch, tokens, d]` to edit, None for none; errors begin with `name`.

        Raises:
            ValueError: `hidden` has another token axis than the model's input, or a row has no prompt.
        """
        if not positions.needs_prompt and self._is_cut(hidden):
            return EVERY_TOKEN
        key = (positions.key, hidden.device, *hidden.shape[:-1])
        if key not in self._selections:
            self.check_shape(positions, hidden, name)
            segments = self.segments(positions, (int(hidden.shape[0]), int(hidden.shape[1])))
            self._selections[key] = segments.selection(positions, len(hidden), hidden.device, self.training)
        return self._selections[key]

    def select_in_graph(self, positions: Positions, hidden: torch.Tensor, name: str) -> Selection | None:
        """Like `select`, by operations that fit in a graph."""
        if not positions.needs_prompt and self._is_cut(hidden):
            return EVERY_TOKEN
        code = self.code_of_all(positions)
        if code == 0:
            return None
        if code is not None and positions.units == 1:
            return EVERY_TOKEN
        key = (positions.key, hidden.device)
        if key not in self._selections:
            self.check_shape(positions, hidden, name)
            self._selections[key] = Selection(self._in_graph(positions, hidden))
        return self._selections[key]

    def select_by_row(
        self, positions: RowPositions, hidden: torch.Tensor, name: str, in_graph: bool
    ) -> RowSelection | None:
        """Like `select`, for rows with different position specs."""
        # Only a head's single token: rows of other modules, such as a vision tower's, may not be those of the batch.
        last_alone = self._is_cut(hidden) and hidden.shape[1] == 1
        if last_alone and not any(spec.needs_prompt for spec in positions.masks):
            return RowSelection(torch.ones(hidden.shape[:2], dtype=torch.int8, device=hidden.device))
        key = (positions, hidden.device, *hidden.shape[:-1])
        if key not in self._selections:
            self.check_shape(next(iter(positions.masks)), hidden, name)
            self._selections[key] = self._select_by_row(positions, hidden, in_graph)
        return self._selections[key]

    def grid(self, positions: Positions) -> torch.Tensor:
        """The code of each token, int8 `[batch, tokens]` on the CPU."""
        return self.segments(positions, self.shape).grid()

    def _is_cut(self, hidden: torch.Tensor) -> bool:
        """Whether `hidden` has other tokens than the pass: generation calls a head for the last one alone."""
        return hidden.dim() == 3 and hidden.shape[1] != self.shape[1]

    def check_shape(self, positions: Positions, hidden: torch.Tensor, name: str) -> None:
        """Raise a ValueError if the tokens of `hidden` are not the tokens of the pass."""
        if hidden.dim() != 3 or tuple(hidden.shape[:2]) != self.shape:
            raise ValueError(
                f"{name} {tuple(hidden.shape)}, but this pass has {self.shape[0]} sequences of "
                f"{self.shape[1]} tokens, so positions={str(positions)!r} has no meaning there. Choose modules whose "
                "output is [batch, tokens, features] with target_modules or layers_to_transform."
            )

    def _in_graph(self, positions: Positions, hidden: torch.Tensor) -> torch.Tensor:
        code = self.code_of_all(positions)
        if code is not None:
            return torch.full(hidden.shape[:2], code, dtype=torch.int8, device=hidden.device)
        return repeat_rows(self.codes(positions), hidden.shape[0]).to(hidden.device)

    def _select_by_row(self, positions: RowPositions, hidden: torch.Tensor, in_graph: bool) -> RowSelection | None:
        combined = None
        for spec, mask in positions.masks.items():
            if in_graph:
                codes = self._in_graph(spec, hidden) * mask[:, None].to(hidden.device)
            else:
                codes = self.segments(spec, (int(hidden.shape[0]), int(hidden.shape[1]))).of_rows(spec, mask)
            combined = codes if combined is None else combined + codes
        if combined is None:
            return None
        return RowSelection(combined) if in_graph else edited_first(combined, hidden.device)


@dataclass(eq=False)
class Untold(Stream):
    """Tokens that the call does not describe: each row of a module's output counts as one prompt."""

    shape: tuple[int, int] = (0, 0)

    def segments(self, positions: Positions, shape: tuple[int, int]) -> Segments:
        return Runs.one_prompt(shape).segments(positions)

    def code_of_all(self, positions: Positions) -> int | None:
        return None if positions.needs_prompt else positions.tail

    def _in_graph(self, positions: Positions, hidden: torch.Tensor) -> torch.Tensor:
        everything = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return Marks(everything, prompt=everything).codes(positions)

    def _is_cut(self, hidden: torch.Tensor) -> bool:
        return False

    def check_shape(self, positions: Positions, hidden: torch.Tensor, name: str) -> None:
        """Any shape fits."""


@dataclass(eq=False)
class Pass:
    """Everything about one pass through a model, from entry to exit.

    Attributes:
        streams: name of each stream -> its tokens.
        requests: the caller's per-row requests, None if there are none.
        in_graph: whether operations are recorded into a graph, which must not depend on the values of tensors.
        products: cache of interventions for later passes of the same `generate` call; None to keep nothing.
        ids: name of each stream -> its token ids, if the call has them.
        entry: where the pass entered.
        entered: further parts of the model that have taken up the pass.
        hooked: the entry whose hook opened the pass, until its `forward` is reached.
        generation: the `generate` call that made the pass.
        edits: the edits of each layer in the pass. A checkpointed module that runs again in the backward pass repeats
            them, whatever was set since.
        called: the layers that were called, while the tracker watches.
        handles: handles of hooks that last for this pass only.
        compiled: whether a part of the model that is compiled on its own ran in the pass.
        nodes: numbers of the first autograd node of the pass and of the first one after it.
        graph_task: number of the backward pass that the pass was opened in, -1 for none.
    """

    streams: Mapping[str, Stream]
    requests: RowRequests | None = None
    in_graph: bool = False
    products: dict[tuple, Any] | None = None
    ids: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    entry: Hashable = None
    generation: Hashable = None
    entered: set[Hashable] = field(default_factory=set)
    hooked: Hashable = None
    edits: dict[Hashable, Any] = field(default_factory=dict)
    called: set[Hashable] = field(default_factory=set)
    handles: list[RemovableHandle] = field(default_factory=list)
    nodes: tuple[int, int] = (0, 0)
    graph_task: int = -1
    compiled: bool = False

    def recorded(self) -> Pass:
        """The pass as a part of the model that is compiled on its own sees it."""
        self.compiled = True
        return Pass(self.streams, self.requests, in_graph=True, ids=self.ids, entry=self.entry)

"""The prompt inside `generate`: the tokens passed to it, whatever passes it makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from peft_reft.tokens.passes import Stream
from peft_reft.tokens.positions import Positions
from peft_reft.tokens.prompts import (
    RECORD,
    CallTokens,
    Record,
    checked_prompt_mask,
    find_cache,
    recalled,
)
from peft_reft.tokens.runs import Marks, Segments


class Generation:
    """One call of `generate`: the tokens passed to it are prompt, the tokens that it generates are not.

    Args:
        ids: the token ids passed to it, None for embeddings.
        real: bool `[batch, tokens]`, the tokens passed to it, including those in a cache; False on padding.
        prompt: bool `[batch, tokens]`, which of them are prompt: all real ones except earlier generated turns.
        past: number of tokens already in the cache.
        positions: the specs of the model's adapters. Their tables are built now, because graphs cannot build them.

    Attributes:
        seen: number of tokens that have passed through the model.
        products: cache of interventions, until the call ends.
    """

    def __init__(
        self,
        ids: torch.Tensor | None,
        real: torch.Tensor,
        prompt: torch.Tensor,
        past: int,
        positions: Iterable[Positions] = (),
    ) -> None:
        self.ids = ids
        self.real = real
        self.prompt = prompt
        self.past = past
        self.seen = past
        self.products: dict[tuple, Any] = {}
        self._cache: Any = None
        self._started = False
        self._tables: dict[tuple[str, bool], torch.Tensor] = {}
        # What compiled steps read.
        self.positions = tuple(positions)
        self.tables = {spec.key: self.table(spec).to(real.device) for spec in self.positions}

    @classmethod
    def of(
        cls,
        ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        prompt_mask: Any,
        call: Mapping[str, Any],
        positions: Iterable[Positions],
        codebooks: int = 1,
    ) -> Generation:
        """From the arguments of `generate`.

        Args:
            ids: the token ids passed to it, None for embeddings.
            mask: `[batch, tokens]`, 0 on padding; None if all tokens are real.
            prompt_mask: see `checked_prompt_mask`; None for all real tokens.
            call: the arguments.
            positions: see the class.
            codebooks: see `CallTokens.of`.
        """
        tokens = CallTokens.of(dict(call) | {"input_ids": ids}, codebooks)
        if mask is not None:
            real = mask != 0
        else:  # without inputs, Transformers starts from one token
            shape, device = ((1, 1), None) if tokens is None else (tokens.shape, tokens.device)
            real = torch.ones(shape, dtype=torch.bool, device=device)
        prompt = real
        if prompt_mask is not None:
            prompt = checked_prompt_mask(prompt_mask, real, past=0) & real
        past = 0 if tokens is None else int(tokens.past or 0)
        if past:
            prompt = _recall(tokens.cache, prompt, past, ids)
        return cls(None if tokens is None else tokens.ids, real, prompt, past, positions)

    def draft(self) -> Generation:
        """A nested call that drafts for this one from the same prompt (assisted generation)."""
        return Generation(self.ids, self.real, self.prompt, self.past, self.positions)

    def stream(self, tokens: CallTokens, in_graph: bool) -> Generated | None:
        """The tokens of one of the passes that `generate` makes; None for a pass that other code makes.

        Raises:
            RuntimeError: the pass starts after more tokens than have passed through the model.
        """
        if not self._owns(tokens, in_graph):
            return None
        count, seen, length = tokens.shape[1], self.seen, self.real.shape[1]
        # Caches for compiled steps only grow, so the tokens seen tell where the pass starts, without waiting for the
        # device. The same holds for recurrent states.
        start = tokens.past if isinstance(tokens.past, int) or (in_graph and tokens.past is not None) else seen
        if isinstance(start, torch.Tensor):
            after = 0 if seen >= length else -1
        elif start > seen:
            raise self._mismatch(f"a pass continues behind {start} tokens, but {seen} have passed through the model")
        else:
            after = max(start - length, -1)
        if not in_graph:
            self._started, self._cache = True, self._cache if tokens.cache is None else tokens.cache
        # A number that changed at every step would make a compiled decoding step recompile.
        self.seen = min(seen + count, length) if in_graph else (start + count)
        return Generated(tokens.shape, False, after, self, start, seen)

    def _owns(self, tokens: CallTokens, in_graph: bool) -> bool:
        """Whether a pass is one of those that `generate` makes, rather than one of a logits processor or a streamer."""
        if tokens.labels is not None or tokens.prompt_mask is not None:
            return False
        if in_graph:
            return True
        if not self._started:
            # Lost rows raise an error where they are edited.
            return tokens.shape[0] % self.real.shape[0] != 0 or self._begins_alike(tokens)
        if tokens.cache is not None:
            # Decoding loops of users get their cache from the first pass.
            return tokens.cache is self._cache or (self._cache is None and tokens.past in (None, self.seen))
        return self._cache is None and tokens.shape[1] > self.real.shape[1] - self.past and self._begins_alike(tokens)

    def _begins_alike(self, tokens: CallTokens) -> bool:
        """Whether a pass begins with the tokens passed to `generate`: a prefix of them, or all and more."""
        if tokens.ids is None or self.ids is None or tokens.ids.dim() != 2 or self.ids.dim() != 2:
            return True
        count = min(tokens.shape[1], self.ids.shape[1] - self.past)
        handed, again = self.ids[:, self.past : self.past + count], tokens.ids[:, :count]
        if count <= 0 or len(again) % len(handed):
            return count <= 0
        return torch.equal(again, handed.repeat_interleave(len(again) // len(handed), dim=0).to(again.device))

    def table(self, positions: Positions) -> torch.Tensor:
        """Codes of the tokens passed in, of those that `c<n>` selects and of one more, int8 `[batch, known + 1]`."""
        if positions.key not in self._tables:
            # Generated tokens follow; how many of them `c<n>` selects depends on answer tokens already passed in.
            more = positions.counted + 1
            prompt = torch.nn.functional.pad(self.prompt, (0, more), value=False)
            real = torch.nn.functional.pad(self.real, (0, more), value=True)
            marks = Marks(real, prompt=prompt, turn=self.past)
            self._tables[positions.key] = marks.grid(positions)
        return self._tables[positions.key]

    def end(self, call: Mapping[str, Any], sequences: torch.Tensor, generated: int) -> None:
        """Check what `generate` returns, and record on its cache which tokens were prompt, for a later call.

        Args:
            call: the arguments of `generate`, or what it returned, with the cache.
            sequences: the token ids that it returned, `[sequences, tokens]`.
            generated: how many of them were generated.

        Raises:
            RuntimeError: the tokens of the passes do not add up to the result.
        """
        # The last generated token does not pass through the model. Compiled steps are not counted.
        needed = self.real.shape[1] + generated - 1
        if self.seen == self.past and generated > 0:
            raise self._mismatch("no pass began with the tokens that it was given")
        if self._started and self._cache is None and self.seen < needed:
            raise self._mismatch(f"{needed} tokens make its result, but {self.seen} have passed through the model")
        cache = self._cache or find_cache(call)
        if not hasattr(cache, "__dict__") or generated <= 0:
            return
        prompt = torch.cat([self.prompt, self.prompt.new_zeros(self.prompt.shape[0], generated)], dim=1)
        prompt = prompt.repeat_interleave(len(sequences) // prompt.shape[0], dim=0)
        setattr(cache, RECORD, Record(prompt, sequences[:, -1]))

    def _mismatch(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"The tokens of this generate call do not add up: {what}. So ReFT cannot tell which tokens to edit. "
            f"Perhaps transformers {transformers.__version__} keeps its cache in a way that peft_reft does not know "
            "yet: install a version that the README lists, and please report this."
        )


@dataclass(eq=False)
class Generated(Stream):
    """The tokens of one of the passes that `generate` makes: a window onto the tokens of the whole call.

    Attributes:
        generation: the call.
        start: number of tokens before those of the pass; a tensor in graphs with a cache of fixed size.
        seen: number of tokens that have passed through the model.
    """

    generation: Generation | None = None
    start: int | torch.Tensor = 0
    seen: int = 0

    def segments(self, positions: Positions, shape: tuple[int, int]) -> Segments:
        code = self.code_of_all(positions)
        if code is not None:
            return Segments.alike(self.shape, code)
        return Segments.of(self._window(self.generation.table(positions)))

    def code_of_all(self, positions: Positions) -> int | None:
        begins = self.seen if isinstance(self.start, torch.Tensor) else self.start
        # Compiled steps do not count the tokens of `c<n>`.
        known = self.generation.real.shape[1] + positions.counted
        return positions.tail if begins >= known else None

    def codes(self, positions: Positions) -> torch.Tensor:
        table = self.generation.tables[positions.key]
        if not isinstance(self.start, torch.Tensor):
            return self._window(table)
        last = self.generation.real.shape[1] + positions.counted
        columns = (self.start + torch.arange(self.shape[1], device=self.start.device)).clamp(max=last)
        return table.index_select(1, columns.to(table.device))

    def _window(self, table: torch.Tensor) -> torch.Tensor:
        window = table[:, self.start : self.start + self.shape[1]]
        missing = self.shape[1] - window.shape[1]
        return torch.cat([window, window[:, -1:].expand(-1, missing)], dim=1) if missing > 0 else window


def _recall(cache: Any, prompt: torch.Tensor, past: int, ids: torch.Tensor | None) -> torch.Tensor:
    """Remove from the prompt the tokens that earlier `generate` calls generated, according to the cache.

    Args:
        cache: the cache that `generate` continues.
        prompt: bool `[batch, tokens]`, the real tokens passed in.
        past: number of tokens in the cache.
        ids: the ids passed in, None for embeddings.
    """
    record: Record | None = getattr(cache, RECORD, None)
    prompt = recalled(cache, prompt, past)
    if record is None or record.last is None or prompt.shape[0] % record.prompt.shape[0]:
        return prompt
    # The last generated token is not in the cache; it comes again with the new tokens, unless the caller dropped it.
    last = record.prompt.shape[1] - 1
    if past == last < prompt.shape[1]:
        prompt[:, last] &= ~_comes_again(record.last, ids, last - prompt.shape[1], prompt)
    return prompt


def _comes_again(token: torch.Tensor, ids: torch.Tensor | None, column: int, prompt: torch.Tensor) -> torch.Tensor:
    """Whether each row's `token` is in a column of `ids`, bool `[batch]`; assumed to be so for embeddings."""
    if ids is None or ids.dim() != token.dim() + 1:
        return torch.ones(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    tokens = token.repeat_interleave(prompt.shape[0] // len(token), dim=0).to(prompt.device)
    same = tokens == ids[:, column].to(prompt.device)
    return same if same.dim() == 1 else same.all(-1)  # several codebooks

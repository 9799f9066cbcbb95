"""The prompt inside `generate`: what was handed to it, whatever passes it makes of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_reft.tokens.passes import Plan, WholeSequence
from peft_reft.tokens.positions import Positions
from peft_reft.tokens.prompts import Tokens, assign, cache_length, checked_prompt_mask, find_cache
from peft_reft.tokens.requests import Rows
from peft_reft.tokens.runs import Runs
from peft_reft.tracker import ARGUMENTS, PromptTracker


@dataclass
class Turns:
    """What a cache remembers of the `generate` calls that filled it: which of its tokens were prompt."""

    prompt: torch.Tensor  # bool [batch, tokens], the last generated token included
    last: torch.Tensor  # [batch], the last generated token, which is not in the cache yet

    # The name of the attribute on the cache: so it is copied and dropped with the cache.
    ATTRIBUTE = "peft_reft_turns"


class Generation:
    """One call of `generate`: what it was handed is prompt, and what it generates is not.

    Args:
        real: bool `[batch, tokens]`, the tokens handed to `generate`, those in a cache included; False on padding.
        prompt: bool `[batch, tokens]`, those which are prompt: all real ones, but for earlier generated turns.
        past: number of tokens already in the cache.
    """

    def __init__(self, real: torch.Tensor, prompt: torch.Tensor, past: int) -> None:
        self.real = real
        self.prompt = prompt
        self.past = past
        self.seen = past
        self._tables: dict[tuple[Positions, torch.device], torch.Tensor] = {}

    @property
    def length(self) -> int:
        return self.real.shape[1]

    def plan(self, tokens: Tokens) -> Plan:
        """Plan of one of the passes that `generate` makes."""
        if tokens.shape is None:
            return WholeSequence()
        count, seen = tokens.shape[1], self.seen
        start = seen if tokens.past is None else tokens.past
        # A number that changed at every step would make a compiled decoding step recompile.
        self.seen = min(seen + count, self.length) if torch.compiler.is_compiling() else seen + count

        def codes(positions: Positions) -> torch.Tensor | int | None:
            return self._codes(positions, start, seen, count)

        return Plan(tokens.shape, codes, behind=self._behind(start, seen))

    def _behind(self, start: int | torch.Tensor, seen: int) -> int:
        if isinstance(start, torch.Tensor):
            return 0 if seen >= self.length else -1
        return max(start - self.length, -1)

    def _codes(
        self, positions: Positions, start: int | torch.Tensor, seen: int, count: int
    ) -> torch.Tensor | int | None:
        known = self.length + positions.counted
        if isinstance(start, torch.Tensor):
            # Caches made to be compiled only grow, so the tokens seen tell that the prompt is over without a look at
            # the device.
            if seen >= self.length and not positions.counted:
                return positions.tail or None
            columns = (start + torch.arange(count, device=start.device)).clamp(max=known)
            device = self.real.device
            return self._table(positions, device).index_select(1, columns.to(device))
        if start >= known:
            return positions.tail or None
        window = self._table(positions)[:, start : start + count]
        missing = count - window.shape[1]
        return torch.cat([window, window[:, -1:].expand(-1, missing)], dim=1) if missing > 0 else window

    def _table(self, positions: Positions, device: torch.device | None = None) -> torch.Tensor:
        """Codes of the handed tokens, of those that `c<n>` selects, and of one token behind: `[batch, known + 1]`."""
        device = device or (self.real.device if torch.compiler.is_compiling() else torch.device("cpu"))
        if (positions, device) not in self._tables:
            # Generated tokens follow; how many of them `c<n>` selects depends on answer tokens already handed over.
            behind = positions.counted + 1
            prompt = torch.nn.functional.pad(self.prompt, (0, behind), value=False)
            real = torch.nn.functional.pad(self.real, (0, behind), value=True)
            if torch.compiler.is_compiling():
                codes = assign(positions, prompt, real, turn=self.past)
            else:
                codes = Runs.of_prompt(prompt, real, turn=self.past).segments(positions).grid()
            self._tables[positions, device] = codes.to(device)
        return self._tables[positions, device]

    def remember(self, cache: Any, sequences: torch.Tensor, generated: int) -> None:
        """Leave on `cache` what a later call needs to tell prompts from the tokens generated here."""
        if not hasattr(cache, "__dict__") or generated <= 0:
            return
        prompt = torch.cat([self.prompt, self.prompt.new_zeros(self.prompt.shape[0], generated)], dim=1)
        prompt = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0)
        setattr(cache, Turns.ATTRIBUTE, Turns(prompt, sequences[:, -1]))


# What `generate` can be given in place of token ids.
_INPUTS = ("inputs_embeds", "input_features", "input_values")


class TrackedGenerate:
    """Stands in for `model.generate`: the same call, with the prompt known to the model's `ReftLayer`s.

    Args:
        model: the model.
        tracker: its state.
        decoder_only: whether prompt and generated tokens are one sequence, so that they have to be told apart.
    """

    def __init__(self, model: nn.Module, tracker: PromptTracker, decoder_only: bool) -> None:
        self.model = model
        self.tracker = tracker
        self.decoder_only = decoder_only
        # A `generate` that somebody has put on this very model.
        self.replaced: Callable[..., Any] | None = model.__dict__.get("generate")

    @classmethod
    def attach(cls, model: nn.Module, tracker: PromptTracker, decoder_only: bool) -> None:
        model.generate = cls(model, tracker, decoder_only)

    @classmethod
    def detach(cls, model: nn.Module) -> None:
        tracked = model.__dict__.get("generate")
        if not isinstance(tracked, cls):
            return
        del model.generate
        if tracked.replaced is not None:
            model.generate = tracked.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.tracker.turn:
            generate = self.replaced or partial(type(self.model).generate, self.model)
            if getattr(kwargs.get("generation_config"), "is_assistant", False) and self.tracker.generation is not None:
                # The model drafts for itself (early exit): the prompt is that of the outer call.
                return generate(*args, **kwargs)
            ids = next((v for v in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if v is not None), None)
            own = {name: kwargs.pop(name) for name in self._arguments & kwargs.keys()}
            with self.tracker.asking(self._rows(ids, kwargs, own)):
                if not self.decoder_only:
                    return generate(*args, **kwargs)
                return self._generate(generate, args, kwargs, ids, own.get("prompt_mask"))

    @property
    def _arguments(self) -> set[str]:
        # An encoder-decoder model gets no `prompt_mask`, and says so itself.
        return ARGUMENTS if self.decoder_only else ARGUMENTS - {"prompt_mask"}

    def _rows(self, ids: torch.Tensor | None, kwargs: Mapping[str, Any], own: Mapping[str, Any]) -> Rows | None:
        rows = Rows.of(own, self.tracker.rows)
        if rows is not None:
            given = next((v for v in (ids, *map(kwargs.get, _INPUTS)) if v is not None), None)
            rows.check(self.tracker.adapters, self.model.training, None if given is None else given.shape[0])
            # From here on beams and returned sequences repeat rows.
            rows.checked = True
        return rows

    def _generate(
        self,
        generate: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        ids: torch.Tensor | None,
        prompt_mask: torch.Tensor | None,
    ) -> Any:
        generation = self._open(ids, kwargs, prompt_mask)
        _refuse_guidance(kwargs)
        with self.tracker.generating(generation):
            result = generate(*args, **kwargs)
        sequences = result if isinstance(result, torch.Tensor) else getattr(result, "sequences", None)
        if isinstance(sequences, torch.Tensor):
            returned = {} if isinstance(result, torch.Tensor) else dict(result)
            cache = find_cache(returned) or find_cache(kwargs)
            generation.remember(cache, sequences, sequences.shape[1] - (0 if ids is None else ids.shape[1]))
        return result

    def _open(
        self, ids: torch.Tensor | None, kwargs: Mapping[str, Any], prompt_mask: torch.Tensor | None
    ) -> Generation:
        tokens = Tokens.of({"input_ids": ids, "inputs_embeds": kwargs.get("inputs_embeds")})
        mask = kwargs.get("attention_mask")
        if mask is not None:
            real = mask != 0
        elif ids is not None and tokens.shape == tuple(ids.shape):
            real = self._inferred_mask(ids, kwargs)
        else:  # embeddings, or nothing: then Transformers begins with one token
            real = torch.ones(tokens.shape or (1, 1), dtype=torch.bool, device=tokens.device)
        prompt = real
        if prompt_mask is not None:
            prompt = checked_prompt_mask(prompt_mask, real, past=0) & real
        past = int(cache_length(kwargs) or 0)
        if past:
            prompt = _recall(kwargs, prompt, past, ids)
        return Generation(real, prompt, past)

    def _inferred_mask(self, ids: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The attention mask that Transformers infers: padding ids are masked, unless they also end sequences."""

        def token_ids(name: str) -> list[int]:
            configs = (kwargs.get("generation_config"), self.model.generation_config)
            values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
            value = next((value for value in values if value is not None), [])
            return torch.as_tensor(value).flatten().tolist()

        pad, eos = token_ids("pad_token_id"), token_ids("eos_token_id")
        if not pad or pad[0] in eos:
            return torch.ones_like(ids, dtype=torch.bool)
        return ids != pad[0]


def _refuse_guidance(kwargs: Mapping[str, Any]) -> None:
    scale = kwargs.get("guidance_scale") or getattr(kwargs.get("generation_config"), "guidance_scale", None)
    if scale not in (None, 1, 1.0):
        raise NotImplementedError(
            f"guidance_scale={scale}: classifier-free guidance runs a second prompt through the model in the same "
            "generate call, whose tokens ReFT's positions cannot tell from the first. Leave guidance_scale out."
        )


def _recall(kwargs: Mapping[str, Any], prompt: torch.Tensor, past: int, ids: torch.Tensor | None) -> torch.Tensor:
    """Take the tokens that earlier `generate` calls put out, according to the cache, from the prompt."""
    turns: Turns | None = getattr(find_cache(kwargs), Turns.ATTRIBUTE, None)
    if turns is None or prompt.shape[0] % turns.prompt.shape[0]:
        return prompt
    repeats = prompt.shape[0] // turns.prompt.shape[0]
    earlier = turns.prompt.repeat_interleave(repeats, dim=0).to(prompt.device)
    prompt = prompt.clone()
    cached = min(past, earlier.shape[1])
    prompt[:, :cached] &= earlier[:, :cached]
    # The last generated token is not in the cache; it comes again with the new tokens, unless the caller dropped it.
    last = earlier.shape[1] - 1
    if past == last < prompt.shape[1]:
        again = turns.last.repeat_interleave(repeats).to(prompt.device)
        same = again == ids[:, last - prompt.shape[1]].to(prompt.device) if ids is not None else again == again
        prompt[:, last] &= ~same
    return prompt

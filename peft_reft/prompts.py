"""Which tokens of the current forward pass are prompt: what the hooks on a model learn and its layers ask.

`PromptTracker` is shared by all `ReftLayer`s of a model. An `Entry` hooks each module through which a pass can enter
(the model itself, and what owns its blocks, for callers that bypass the model) and leaves a `Plan` for every stream of
tokens there. `TrackedGenerate` stands in for the model's `generate` and opens a `Generation`, in which the prompt is
what was handed to `generate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_reft import positions as pos
from peft_reft.positions import Positions

DECODER, ENCODER = "decoder", "encoder"
# Codes of tokens on which a pass must fail.
NO_PROMPT, PROMPT_IS_PADDING = -1, -2
_REMEDIES = (
    "Use prompt/completion data, or assistant_only_loss=True with conversations, so that the prompt carries no labels "
    "(-100); or edit every token with positions='all'; or pass prompt_mask to forward."
)
_PROMPT_UNKNOWN = (
    "positions='{}' needs to know where the prompt ends, but this language model is trained without labels or "
    "prompt_mask in its forward pass, so the whole sequence counts as prompt. Generation would edit other tokens. Pass "
    "labels (-100 on the prompt) or prompt_mask to forward."
)
_NOTHING_EDITED = (
    "positions='{}' edits no token of this training batch: its prompts are too short. Plain language modeling data looks "
    "so when a padding-free collator takes the label off the first token of each sequence, which leaves prompts of one "
    "token. Use prompt/completion data, or positions='all'."
)
_CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class Selection:
    """The edited tokens of one pass, for one position spec.

    `codes` is int8 `[batch, tokens]` as `positions.assign` returns it. Outside compiled graphs `rows` `[n]` holds the
    flat indices of the edited tokens and `units` `[n]` their units, unless so many are edited that going through all
    of them is cheaper. Everything is None where unit 0 edits every token.
    """

    codes: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    units: torch.Tensor | None = None

    def to(self, device: torch.device) -> Selection:
        moved = (None if t is None else t.to(device) for t in (self.codes, self.rows, self.units))
        return Selection(*moved)


EVERYTHING = Selection()


class Plan:
    """What one pass edits in one stream of tokens.

    Args:
        shape: `(batch, tokens)` of the pass, or None when the model does not tell (any module output fits then).
        codes: position spec -> codes `[batch, tokens]` (see `Selection`), None for no edit, or an int for a
            unit that edits everything.
        training: whether to warn when nothing is edited.
    """

    def __init__(
        self,
        shape: tuple[int, int] | None,
        codes: Callable[[Positions], torch.Tensor | int | None],
        training: bool = False,
    ) -> None:
        self.shape = shape
        self.training = training
        self._codes = codes
        self._selections: dict[tuple[Positions, torch.device], Selection | None] = {}

    def selection(self, positions: Positions, hidden: torch.Tensor, name: str) -> Selection | None:
        """The tokens of `hidden` `[batch, tokens, d]` to edit, None for none.

        Raises:
            ValueError: `hidden` has another token axis than the model's input, or its prompt cannot be told.
        """
        if self.shape is not None and tuple(hidden.shape[:2]) != self.shape:
            raise ValueError(
                f"{name} returned {tuple(hidden.shape)}, but this pass has {self.shape[0]} sequences of "
                f"{self.shape[1]} tokens, so positions={str(positions)!r} has no meaning there. Choose modules whose "
                "output is [batch, tokens, features] with target_modules or layers_to_transform."
            )
        key = (positions, hidden.device)
        if key not in self._selections:
            self._selections[key] = self._select(positions, hidden)
        return self._selections[key]

    def codes(self, positions: Positions, device: torch.device) -> torch.Tensor:
        """Code of each token, int8 `[batch, tokens]`, for a plan that knows its shape."""
        codes = self._codes(positions)
        if isinstance(codes, torch.Tensor):
            return codes
        return torch.full(self.shape, codes or 0, dtype=torch.int8, device=device)

    def _select(self, positions: Positions, hidden: torch.Tensor) -> Selection | None:
        codes = self._codes(positions)
        if codes is None:
            return None
        if isinstance(codes, int):
            if positions.units == 1:
                return EVERYTHING
            codes = torch.full(hidden.shape[:2], codes, dtype=torch.int8, device=hidden.device)
        if codes.shape[0] != hidden.shape[0]:
            codes = codes.repeat_interleave(hidden.shape[0] // codes.shape[0], dim=0)
        if torch.compiler.is_compiling():
            return Selection(codes.to(hidden.device))
        # The one host synchronization of a pass.
        on_host = codes.cpu()
        _check_prompts(on_host, positions)
        rows = on_host.flatten().nonzero().squeeze(1)
        if rows.numel() == 0:
            if self.training:
                warnings.warn(_NOTHING_EDITED.format(positions), stacklevel=2)
            return None
        if positions.units == 1 and rows.numel() == on_host.numel():
            return EVERYTHING
        if 2 * rows.numel() > on_host.numel():
            return Selection(codes).to(hidden.device)
        units = on_host.flatten()[rows].long() - 1
        return Selection(codes, rows, units).to(hidden.device)


def _check_prompts(codes: torch.Tensor, positions: Positions) -> None:
    for fault in (NO_PROMPT, PROMPT_IS_PADDING):
        rows = (codes == fault).any(-1).nonzero().squeeze(1).tolist()
        if not rows:
            continue
        which = f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))} of this batch of {len(codes)}"
        if fault == PROMPT_IS_PADDING:
            raise ValueError(
                f"prompt_mask and attention_mask, both {tuple(codes.shape)} here, contradict each other: {which} "
                "marks tokens as prompt that attention_mask marks as padding."
            )
        raise ValueError(
            f"positions={str(positions)!r} needs to know where the prompt ends, but the labels of {which} supervise "
            f"the very first token: there is no prompt. {_REMEDIES}"
        )


class PromptTracker:
    """State of a model's current pass, shared by its `ReftLayer`s. Not part of copies or pickles of the model."""

    def __init__(self) -> None:
        self.adapters: list[str] = []
        self.plans: dict[str, Plan] = {}
        self.entered: Entry | None = None
        self.generation: Generation | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"adapters": self.adapters, "plans": {}, "entered": None, "generation": None}

    def plan(self, stream: str) -> Plan:
        """The plan of `stream`; every token counts where no hooked module was entered."""
        plan = self.plans.get(stream)
        return plan if plan is not None else Plan(None, _everywhere)

    def restore(self, plans: dict[str, Plan], _grad: torch.Tensor) -> None:
        self.plans = plans

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        outer, self.generation = self.generation, generation
        try:
            yield
        finally:
            self.generation = outer


def _everywhere(positions: Positions) -> int | None:
    # Without any knowledge of the tokens each of them is prompt, in one sequence of unknown ends.
    kinds = positions.kinds
    if {"first", "last"} & set(kinds):
        raise ValueError(
            f"positions={str(positions)!r} needs the tokens of the sequence, but the model was entered through a "
            "module that peft_reft does not hook. Call the model itself."
        )
    code = kinds.get("all", kinds.get("prompt", (0, 0)))[1]
    return code or None


class Entry:
    """Forward hooks of one module through which a pass can enter: they find the prompt before it and tidy up after.

    Args:
        tracker: shared state of the model.
        names: names of the module's positional forward arguments.
        streams: streams of tokens that pass through the module; both of them for an encoder-decoder model.
        language_model: whether `labels` `[batch, tokens]` are next-token labels.
    """

    def __init__(
        self, tracker: PromptTracker, names: tuple[str, ...], streams: tuple[str, ...], language_model: bool
    ) -> None:
        self.tracker = tracker
        self.names = names
        self.streams = streams
        self.language_model = language_model

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook: plan the pass; takes `prompt_mask` out of the arguments."""
        if self.tracker.entered not in (None, self):
            return None
        self.tracker.entered = self
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError("ReFT does not support `adapter_names` (one adapter a row) yet.")
        call = dict(zip(self.names, args, strict=False)) | kwargs
        self.tracker.plans = {stream: self._plan(stream, call, module.training) for stream in self.streams}
        if "prompt_mask" not in kwargs:
            return None
        # The model's own forward does not know this argument.
        return args, {name: value for name, value in kwargs.items() if name != "prompt_mask"}

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook, also called after an exception."""
        if self.tracker.entered is not self:
            return
        self.tracker.entered = None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Checkpointed modules run their hooks again in the backward pass, perhaps after other forward passes. The
            # engine enters this pass's graph through its outputs, which is the moment to bring its plans back.
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self.tracker.restore, self.tracker.plans))

    def _plan(self, stream: str, call: Mapping[str, Any], training: bool) -> Plan:
        if call.get("cache") is not None and type(call["cache"]).__name__ == "PagedAttentionCache":
            raise NotImplementedError(
                "Continuous batching (generate_batch, cache_implementation='paged') mixes prompts and generated "
                "tokens in one row, which ReFT's positions do not support. Use generate()."
            )
        if len(self.streams) > 1 or self.streams[0] == ENCODER:
            return encoder_plan(call) if stream == ENCODER else decoder_plan(call)
        generation = self.tracker.generation
        if generation is not None and call.get("prompt_mask") is None:
            return generation.plan(call)
        return prompt_plan(call, self.language_model, training and torch.is_grad_enabled())


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in _tensors(value)]
    return []


# What a call says about its tokens


def _shape(call: Mapping[str, Any], prefix: str = "") -> tuple[tuple[int, int], torch.device] | None:
    ids, embeds = call.get(f"{prefix}input_ids"), call.get(f"{prefix}inputs_embeds")
    if isinstance(embeds, torch.Tensor) and embeds.dim() == 3:
        return tuple(embeds.shape[:2]), embeds.device
    if isinstance(ids, torch.Tensor) and ids.dim() == 2:
        return tuple(ids.shape), ids.device
    return None


def cache_length(call: Mapping[str, Any]) -> int | torch.Tensor | None:
    """Number of tokens in the cache of a call: a tensor for caches made to be compiled, None for one without length."""
    for name in _CACHES:
        cache = call.get(name)
        if hasattr(cache, "get_seq_length"):
            try:
                length = cache.get_seq_length()
            except ValueError:  # only recurrent states
                return None
            # The cache counts on in place during the pass.
            return length.clone() if isinstance(length, torch.Tensor) else length
    return 0


def _real_tokens(mask: Any, tokens: int, start: int) -> torch.Tensor | None:
    """`attention_mask` as bool `[batch, start + tokens]`, None when it says nothing about padding."""
    if isinstance(mask, Mapping):
        mask = next((value for value in mask.values() if isinstance(value, torch.Tensor)), None)
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() == 2:
        real = mask != 0
    elif mask.dim() in (3, 4):
        real = _real_from_attention(mask if mask.dim() == 3 else mask[:, 0], tokens, start)
    else:
        return None
    length = start + tokens
    if real.shape[1] < length:
        # The mask covers the new tokens only.
        real = torch.cat([real.new_ones(real.shape[0], length - real.shape[1]), real], dim=1)
    return real[:, :length]


def _real_from_attention(mask: torch.Tensor, tokens: int, start: int) -> torch.Tensor:
    """Real tokens according to a prepared mask `[batch, tokens, keys]`, boolean or additive.

    A padding token is one that may not attend to itself, or whose row allows everything: Transformers opens rows that
    would be masked completely. The last row of a causal mask allows everything by right, and so do all rows of an
    unpadded bidirectional one.
    """
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    new = allowed[:, -tokens:, start : start + tokens]
    everything = new.all(-1)
    rightful = everything.all(-1, keepdim=True) | (torch.arange(tokens, device=mask.device) == tokens - 1)
    real = new.diagonal(dim1=-2, dim2=-1) & (~everything | rightful)
    past = allowed[:, -1, :start]
    return torch.cat([past, real], dim=1)


def _packed_starts(call: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor | None:
    """First tokens of packed sequences, by the rule of Transformers' own masks; None where nothing is packed."""
    if call.get("attention_mask") is not None or any(call.get(name) is not None for name in _CACHES):
        return None
    position_ids = call.get("position_ids")
    if isinstance(position_ids, torch.Tensor):
        if position_ids.dim() == 3 and position_ids.shape[0] == 4:  # text positions, then the three of M-RoPE
            position_ids = position_ids[0]
        if position_ids.dim() == 2 and position_ids.shape[1] == shape[1]:
            return pos.sequence_starts(position_ids.expand(shape))
    ends = call.get("cu_seq_lens_q")
    if isinstance(ends, torch.Tensor):
        starts = torch.zeros(shape, dtype=torch.bool, device=ends.device)
        starts[:, ends[:-1].long()] = True
        return starts
    return None


def _check_mask(name: str, mask: torch.Tensor, lengths: tuple[int, ...], batch: int) -> None:
    if mask.dtype not in (torch.bool, torch.uint8, torch.int32, torch.int64):
        raise ValueError(f"{name} must be boolean (or 0/1 integers), got dtype {mask.dtype}.")
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in lengths:
        expected = " or ".join(f"({batch}, {length})" for length in dict.fromkeys(lengths))
        raise ValueError(f"{name} must have the shape {expected} of this pass, got {tuple(mask.shape)}.")


def _given_prompt(call: Mapping[str, Any], shape: tuple[int, int], start: int, real: torch.Tensor) -> torch.Tensor:
    mask = call["prompt_mask"]
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"prompt_mask must be a tensor, got {type(mask).__name__}.")
    _check_mask("prompt_mask", mask, (shape[1], start + shape[1]), shape[0])
    prompt = mask.to(device=real.device) != 0
    if prompt.shape[1] < real.shape[1]:
        prompt = torch.cat([real[:, :start], prompt], dim=1)
    return prompt


# The plans


def prompt_plan(call: Mapping[str, Any], language_model: bool, training: bool = False) -> Plan:
    """Plan of a pass through a model with one stream of tokens, outside `generate`.

    The prompt is `prompt_mask`, or else what next-token `labels` leave out, or else the whole real sequence. The
    latter, when a language model is in training, gives a warning: it is seldom meant.
    """
    found = _shape(call)
    if found is None:
        return Plan(None, _everywhere)
    shape, device = found
    start = cache_length(call) or 0
    labels = call.get("labels") if language_model else None
    labels = labels if isinstance(labels, torch.Tensor) and tuple(labels.shape) == shape else None

    # Computed when the first layer asks: adapters may be disabled.
    def codes(positions: Positions) -> torch.Tensor | int:
        mask = call.get("attention_mask")
        if mask is None and not positions.needs_prompt:
            return positions.tail
        past = int(start)
        real = _real_tokens(mask, shape[1], past)
        if real is None:
            real = torch.ones((shape[0], past + shape[1]), dtype=torch.bool, device=device)
        starts = _packed_starts(call, shape)
        starts = None if starts is None else starts.to(real.device)
        faults: list[tuple[int, torch.Tensor]] = []
        if call.get("prompt_mask") is not None:
            prompt = _given_prompt(call, shape, past, real)
            faults.append((PROMPT_IS_PADDING, prompt & ~real))
        elif labels is not None and not past:
            prompt, promptless = pos.prompt_from_labels(labels.to(real.device), real, starts)
            if positions.needs_prompt:
                faults.append((NO_PROMPT, promptless))
        else:
            prompt = real
            if training and language_model and positions.needs_prompt and not torch.compiler.is_compiling():
                warnings.warn(_PROMPT_UNKNOWN.format(positions), stacklevel=2)
        breaks = torch.arange(real.shape[1], device=real.device) == past if past else None
        result = _assign(positions, prompt, real, starts, breaks)
        for fault, where in faults:
            result = torch.where(where, fault, result).to(torch.int8)
        return result[:, past:]

    return Plan(shape, codes, training)


def _assign(
    positions: Positions,
    prompt: torch.Tensor,
    real: torch.Tensor,
    starts: torch.Tensor | None = None,
    breaks: torch.Tensor | None = None,
) -> torch.Tensor:
    if not positions.needs_prompt:
        return real.to(torch.int8) * positions.tail
    completion = pos.completion_of(prompt, real, starts)
    return pos.assign(positions, prompt, completion, starts, breaks)


def encoder_plan(call: Mapping[str, Any]) -> Plan:
    """Plan of an encoder's tokens: all of them are prompt."""
    return prompt_plan({name: value for name, value in call.items() if name not in _CACHES}, language_model=False)


def decoder_plan(call: Mapping[str, Any]) -> Plan:
    """Plan of the decoder's tokens in an encoder-decoder model: none of them is prompt."""
    labels = call.get("labels")
    shape = _shape(call, "decoder_")
    if shape is None and isinstance(labels, torch.Tensor) and labels.dim() == 2:
        shape = (tuple(labels.shape), labels.device)
    shape = shape or _shape(call)
    start = cache_length(call) or 0

    def codes(positions: Positions) -> torch.Tensor | int | None:
        mask = call.get("decoder_attention_mask")
        if shape is None or (mask is None and not positions.counted):
            return positions.tail or None
        (batch, tokens), device = shape
        past = int(start)
        real = _real_tokens(mask, tokens, past)
        if real is None:
            real = torch.ones((batch, past + tokens), dtype=torch.bool, device=device)
        return pos.assign(positions, torch.zeros_like(real), real)[:, past:]

    return Plan(None if shape is None else shape[0], codes)


# Generation


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
        self._tables: dict[Positions, torch.Tensor] = {}

    @property
    def length(self) -> int:
        return self.real.shape[1]

    def plan(self, call: Mapping[str, Any]) -> Plan:
        """Plan of one of the passes that `generate` makes."""
        found = _shape(call)
        if found is None:
            return Plan(None, _everywhere)
        shape = found[0]
        start = cache_length(call)
        seen = self.seen
        start = seen if start is None else start
        # A number that changed at every step would make a compiled decoding step recompile.
        self.seen = min(seen + shape[1], self.length) if torch.compiler.is_compiling() else seen + shape[1]

        def codes(positions: Positions) -> torch.Tensor | int | None:
            return self._codes(positions, start, seen, shape[1])

        return Plan(shape, codes)

    def _codes(
        self, positions: Positions, start: int | torch.Tensor, seen: int, tokens: int
    ) -> torch.Tensor | int | None:
        known = self.length + positions.counted
        if isinstance(start, torch.Tensor):
            # Caches made to be compiled only grow, so the tokens seen tell that the prompt is over without a look at
            # the device.
            if seen >= self.length and not positions.counted:
                return positions.tail or None
            if torch.compiler.is_compiling():
                columns = (start + torch.arange(tokens, device=start.device)).clamp(max=known)
                return self._table(positions).index_select(1, columns.to(self.real.device))
            start = int(start)
        if start >= known:
            return positions.tail or None
        window = self._table(positions)[:, start : start + tokens]
        missing = tokens - window.shape[1]
        return torch.cat([window, window[:, -1:].expand(-1, missing)], dim=1) if missing > 0 else window

    def _table(self, positions: Positions) -> torch.Tensor:
        """Codes of the handed tokens, of those that `c<n>` selects, and of one token behind: `[batch, known + 1]`."""
        if positions not in self._tables:
            breaks = None
            if self.past:
                breaks = torch.arange(self.length, device=self.real.device) == self.past
            handed = _assign(positions, self.prompt, self.real, breaks=breaks)
            counted = positions.kinds.get("count", (0, 0))[1]
            behind = torch.tensor(
                [counted] * positions.counted + [positions.tail], dtype=torch.int8, device=handed.device
            )
            self._tables[positions] = torch.cat([handed, behind.expand(handed.shape[0], -1)], dim=1)
        return self._tables[positions]

    def remember(self, cache: Any, generated: torch.Tensor, count: int) -> None:
        """Leave on `cache` what a later call needs to tell prompts from the `count` tokens generated here."""
        if cache is None or count <= 0 or not hasattr(cache, "__dict__"):
            return
        prompt = torch.cat([self.prompt, self.prompt.new_zeros(self.prompt.shape[0], count)], dim=1)
        if generated.shape[0] != prompt.shape[0]:
            prompt = prompt.repeat_interleave(generated.shape[0] // prompt.shape[0], dim=0)
        setattr(cache, Turns.ATTRIBUTE, Turns(prompt, generated[:, -1]))


class TrackedGenerate:
    """Stands in for `model.generate`: the same call, with the prompt known to the model's `ReftLayer`s."""

    def __init__(self, model: nn.Module, tracker: PromptTracker) -> None:
        self.model = model
        self.tracker = tracker

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generate = partial(type(self.model).generate, self.model)
        if self.tracker.generation is not None:
            # The model drafts for itself (early exit): the prompt is that of the outer call.
            return generate(*args, **kwargs)
        generation, ids = self._open(args, kwargs)
        kwargs.pop("prompt_mask", None)
        with self.tracker.generating(generation):
            result = generate(*args, **kwargs)
        sequences = result if isinstance(result, torch.Tensor) else getattr(result, "sequences", None)
        if isinstance(sequences, torch.Tensor):
            cache = kwargs.get("past_key_values")
            if not isinstance(result, torch.Tensor):
                cache = getattr(result, "past_key_values", cache)
            generation.remember(cache, sequences, sequences.shape[1] - (0 if ids is None else ids.shape[1]))
        return result

    def _open(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Generation, torch.Tensor | None]:
        ids = next(
            (value for value in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if value is not None), None
        )
        tokens, device = _shape({"input_ids": ids, "inputs_embeds": kwargs.get("inputs_embeds")}) or ((1, 1), None)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            real = mask != 0
        elif isinstance(ids, torch.Tensor) and tokens == tuple(ids.shape):
            real = self._inferred_mask(ids, kwargs)
        else:
            real = torch.ones(tokens, dtype=torch.bool, device=device)
        if kwargs.get("prompt_mask") is not None:
            prompt = _given_prompt(kwargs, tuple(real.shape), 0, real) & real
        else:
            prompt = real
        past = int(cache_length(kwargs) or 0)
        if past:
            prompt = _recall(kwargs, prompt, past, ids)
        return Generation(real, prompt, past), ids

    def _inferred_mask(self, ids: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The attention mask that Transformers infers: padding ids are masked, unless they also end sequences."""
        config = kwargs.get("generation_config") or self.model.generation_config
        pad, eos = (kwargs.get(name, getattr(config, name, None)) for name in ("pad_token_id", "eos_token_id"))
        pad = getattr(self.model.generation_config, "pad_token_id", None) if pad is None else pad
        eos = getattr(self.model.generation_config, "eos_token_id", None) if eos is None else eos
        eos = torch.as_tensor([] if eos is None else eos).flatten().tolist()
        if pad is None or int(pad) in eos:
            return torch.ones_like(ids, dtype=torch.bool)
        return ids != pad


def _recall(kwargs: Mapping[str, Any], prompt: torch.Tensor, past: int, ids: torch.Tensor | None) -> torch.Tensor:
    """Take the tokens that earlier `generate` calls put out, according to the cache, from the prompt."""
    cache = next(kwargs[name] for name in _CACHES if kwargs.get(name) is not None)
    turns: Turns | None = getattr(cache, Turns.ATTRIBUTE, None)
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
        if ids is not None:
            again = again == ids[:, last - prompt.shape[1]].to(prompt.device)
        else:
            again = torch.ones_like(again, dtype=torch.bool)
        prompt[:, last] &= ~again
    return prompt

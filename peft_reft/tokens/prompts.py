"""Finds the prompt of a forward pass in its arguments."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.utils import ALL_CACHE_NAMES

from peft_reft.tokens.passes import Stream, Untold
from peft_reft.tokens.positions import Positions
from peft_reft.tokens.runs import IGNORE_INDEX, Marks, Segments
from peft_reft.tokens.selections import rows_of_batch
from peft_reft.trainers import refuse_cut_samples, refuse_unlabeled

# The attribute of a cache that says which of its tokens were prompt, copied and dropped with the cache.
RECORD = "peft_reft_record"

_PROMPT_UNKNOWN = (
    "positions='{}' needs to know where the prompt ends, but this language model is trained without labels or "
    "prompt_mask in its forward pass, so the whole sequence counts as prompt. Generation would edit other tokens. Pass "
    "labels (-100 on the prompt) or prompt_mask to forward."
)
_SCORING = (
    "positions='{}' needs to know where the prompt ends, but this pass of a language model has neither labels nor "
    "prompt_mask, so the whole sequence counts as prompt. That is right for predicting the next token of a prompt. To "
    "score an answer, pass labels (-100 on the prompt) or prompt_mask to forward, or wrap code that cannot pass them "
    "in `with peft_reft.prompt_mask_of(model, mask):`. This warning appears once."
)
_TURN_UNKNOWN = (
    "positions='{}' needs to know whether the tokens that continue this cache are prompt. Outside generate they count "
    "as the prompt of a new turn. In a decoding loop of your own pass prompt_mask (zeros for generated tokens), or "
    "pass the loop to generate as custom_generate."
)

_CONTINUOUS_BATCHING = (
    "Continuous batching (generate_batch, cache_implementation='paged') mixes prompts and generated tokens in one row, "
    "which ReFT's positions do not support. Use generate()."
)


@dataclass(frozen=True)
class CallTokens:
    """What the arguments of one pass say about its tokens.

    Attributes:
        shape: `(batch, tokens)` of the pass.
        device: where the tokens are.
        ids: the token ids, None for embeddings, and where a token has several.
        cache: the cache that the pass continues.
        past: number of tokens in the cache: a tensor for caches of compiled steps, None for one without a length.
        mask: the attention mask as passed, of any kind.
        labels, prompt_mask: as passed.
        starts: bool `[batch, tokens]`, first tokens of packed sequences, None where nothing is packed.
    """

    shape: tuple[int, int]
    device: torch.device | None = None
    ids: torch.Tensor | None = None
    cache: Any = None
    past: int | torch.Tensor | None = 0
    mask: Any = None
    labels: torch.Tensor | None = None
    prompt_mask: Any = None
    starts: torch.Tensor | None = None

    @classmethod
    def of(cls, call: Mapping[str, Any], codebooks: int = 1) -> CallTokens | None:
        """The tokens of a model with one stream, or of an encoder; None if the arguments have no tokens.

        Args:
            call: the arguments.
            codebooks: number of rows of token ids that are one sequence.

        Raises:
            NotImplementedError: the cache belongs to continuous batching.
        """
        ids = call.get("input_ids")
        embeds = (value for name in ("inputs_embeds", "hidden_states") if _has_axes(value := call.get(name), 3))
        # Ids `[batch, tokens, codebooks]` are those of sound.
        like = next(embeds, ids if _has_axes(ids, 2) or _has_axes(ids, 3) else None)
        if like is None:
            return None
        shape = tuple(like.shape[:2])
        if like is ids and (codebooks > 1 or ids.dim() == 3):
            shape, ids = (shape[0] // (codebooks if ids.dim() == 2 else 1), shape[1]), None
        labels, cache = call.get("labels"), find_cache(call)
        if isinstance(cache, PagedAttentionCache):
            raise NotImplementedError(_CONTINUOUS_BATCHING)
        return cls(
            shape,
            like.device,
            ids if like is ids else None,
            cache,
            cache_length(cache),
            call.get("attention_mask"),
            labels if _has_axes(labels, 2) and tuple(labels.shape) == shape else None,
            call.get("prompt_mask"),
            None if cache is not None else _packed_starts(call, shape),
        )

    @classmethod
    def of_decoder(cls, call: Mapping[str, Any], codebooks: int = 1) -> CallTokens | None:
        """The decoder's tokens in an encoder-decoder model; if the call has none, they are made from the labels."""
        own = {name.removeprefix("decoder_"): value for name, value in call.items() if name.startswith("decoder_")}
        labels = call.get("labels")
        if own.get("input_ids") is None and own.get("inputs_embeds") is None:
            own["input_ids"] = labels if _has_axes(labels, 2) or _has_axes(labels, 3) else call.get("input_ids")
        return cls.of(own | {"cache": find_cache(call)}, codebooks)

    def behind(self, own: int) -> CallTokens:
        """The new tokens of this pass, for a model that is passed all ids and caches `own` tokens of its own."""
        past = max(self.past_on_host - own, 0)
        ids = None if self.ids is None else self.ids[:, past:]
        return replace(self, shape=(self.shape[0], self.shape[1] - past), ids=ids, past=past)

    @property
    def past_on_host(self) -> int:
        return int(self.past or 0)

    def real(self) -> torch.Tensor:
        """Bool `[batch, past + tokens]`, False on padding."""
        batch, tokens = self.shape
        real = _real_tokens(self.mask, tokens, self.past_on_host)
        if real is None:
            return torch.ones((batch, self.past_on_host + tokens), dtype=torch.bool, device=self.device)
        return real.to(self.device)


@dataclass
class Record:
    """What a cache records about the passes that filled it.

    Attributes:
        prompt: bool `[batch, tokens]`, which of its tokens were prompt.
        last: `[batch]`, the last generated token, which is not in the cache yet; None outside `generate`.
    """

    prompt: torch.Tensor
    last: torch.Tensor | None = None


def _has_axes(value: Any, axes: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == axes


def find_cache(call: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call (or the values of an output), None if there is none.

    It is recognized by its methods, because releases of Transformers rename the argument. Only recurrent states, which
    may lack them, are looked up by Transformers' argument names.
    """
    for value in call.values():
        if hasattr(value, "get_seq_length") or isinstance(value, PagedAttentionCache):
            return value
    for name in ALL_CACHE_NAMES:
        if call.get(name) is not None:
            return call[name]
    return None


def cache_length(cache: Any) -> int | torch.Tensor | None:
    """See `CallTokens.past`."""
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except (AttributeError, ValueError):  # recurrent states
        return None
    # The cache increments its length in place during the pass.
    return length.clone() if isinstance(length, torch.Tensor) else length


def _packed_starts(call: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor | None:
    # As in Transformers' own masks: without an attention mask and a cache, sequences start where position ids restart.
    if call.get("attention_mask") is not None:
        return None
    position_ids = call.get("position_ids")
    if _has_axes(position_ids, 3) and position_ids.shape[0] == 4:  # text positions, then the three of M-RoPE
        position_ids = position_ids[0]
    if _has_axes(position_ids, 2) and position_ids.shape[1] == shape[1]:
        return sequence_starts(position_ids.expand(shape))
    ends = call.get("cu_seq_lens_q")
    if isinstance(ends, torch.Tensor):
        # The end of the last sequence, which some collators repeat, lies past the end of the row.
        starts = torch.zeros((shape[0], shape[1] + 1), dtype=torch.bool, device=ends.device)
        starts[:, ends.long()] = True
        return starts[:, :-1]
    return None


def sequence_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """First tokens of packed sequences: where `position_ids` `[batch, tokens]` does not continue by one; bool."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts


def _real_tokens(mask: Any, tokens: int, past: int) -> torch.Tensor | None:
    """See `CallTokens.real`; None where the mask says nothing about padding."""
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = next((value for value in mask.values() if isinstance(value, torch.Tensor)), None)
    if _has_axes(mask, 2):
        # Several times as fast as `!= 0`.
        real = mask.bool()
    elif _has_axes(mask, 3) or _has_axes(mask, 4):
        real = _real_from_attention(mask if mask.dim() == 3 else mask[:, 0], tokens, past)
    else:
        return None
    missing = past + tokens - real.shape[1]
    if missing > 0:
        # The mask covers the new tokens only.
        real = torch.cat([real.new_ones(real.shape[0], missing), real], dim=1)
    return real[:, : past + tokens]


def _real_from_attention(mask: torch.Tensor, tokens: int, past: int) -> torch.Tensor:
    """Real tokens according to a prepared mask `[batch, tokens or 1, keys]`, boolean or additive.

    A padding token is one that may not attend to itself, or whose row allows everything: Transformers opens rows that
    would be masked completely. The last row of a causal mask legitimately allows everything, and so do all rows of an
    unpadded bidirectional one. Older encoders pass one row for all queries.
    """
    # Callers fill with the lowest number of some dtype, minus infinity, or a round number such as -1e4.
    allowed = mask if mask.dtype == torch.bool else mask > -1e3
    if mask.shape[1] == 1 and tokens > 1:
        return allowed[:, 0]
    new = allowed[:, -tokens:, past : past + tokens]
    everything = new.all(-1)
    rightful = everything.all(-1, keepdim=True) | (torch.arange(tokens, device=mask.device) == tokens - 1)
    real = new.diagonal(dim1=-2, dim2=-1) & (~everything | rightful)
    return torch.cat([allowed[:, -1, :past], real], dim=1)


def checked_prompt_mask(mask: Any, real: torch.Tensor, past: int, cache: Any = None) -> torch.Tensor:
    """A caller's `prompt_mask` as bool `[batch, past + tokens]`.

    Args:
        mask: bool or 0/1 integers, `[batch, tokens]` or `[batch, past + tokens]`.
        real: bool `[batch, past + tokens]`.
        past: number of tokens in the cache. If the mask does not cover them they are prompt, except those that the
            cache recorded as not prompt.
        cache: the cache.

    Raises:
        ValueError: `mask` is no tensor, or has another dtype or shape.
    """
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"prompt_mask must be a tensor, got {type(mask).__name__}.")
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"prompt_mask must be boolean (or 0/1 integers), got dtype {mask.dtype}.")
    batch, length = real.shape
    if tuple(mask.shape) not in ((batch, length - past), (batch, length)):
        expected = " or ".join(str((batch, tokens)) for tokens in dict.fromkeys((length - past, length)))
        raise ValueError(f"prompt_mask must have the shape {expected} of this pass, got {tuple(mask.shape)}.")
    prompt = mask.to(real.device) != 0
    return prompt if mask.shape[1] == length else torch.cat([recalled(cache, real, past)[:, :past], prompt], dim=1)


def recalled(cache: Any, prompt: torch.Tensor, past: int) -> torch.Tensor:
    """`prompt` `[batch, past + ...]` without the tokens that the cache recorded as not prompt."""
    record: Record | None = getattr(cache, RECORD, None)
    if record is None or prompt.shape[0] % record.prompt.shape[0]:
        return prompt
    earlier = record.prompt.repeat_interleave(prompt.shape[0] // record.prompt.shape[0], dim=0).to(prompt.device)
    cached = min(past, earlier.shape[1])
    prompt = prompt.clone()
    prompt[:, :cached] &= earlier[:, :cached]
    return prompt


@dataclass(eq=False)
class Told(Stream):
    """The tokens of a pass outside `generate`, whose arguments determine the prompt.

    It is `prompt_mask`, else the tokens that next-token `labels` leave out, else all tokens except padding. The last is
    seldom intended when a language model is trained or scores, and gives a warning.

    Attributes:
        tokens: the tokens according to the arguments.
        language_model: whether labels are next-token labels.
        said: the warnings given already, shared by all passes of a model.
    """

    tokens: CallTokens | None = None
    language_model: bool = False
    said: set[str] = field(default_factory=set)
    _kept: Marks | None = field(default=None, init=False)

    def segments(self, positions: Positions, shape: tuple[int, int]) -> Segments:
        tokens = self.tokens
        if tokens.mask is None and not positions.needs_prompt:
            return Segments.alike(self.shape, positions.tail)
        if self.language_model and positions.needs_prompt and tokens.prompt_mask is None:
            self._check_told(positions)
        return self._marks(in_graph=False).segments(positions, tokens.past_on_host)

    def code_of_all(self, positions: Positions) -> int | None:
        return positions.tail if self.tokens.mask is None and not positions.needs_prompt else None

    def codes(self, positions: Positions) -> torch.Tensor:
        return self._marks(in_graph=True).codes(positions, self.tokens.past_on_host)

    def prompt(self) -> torch.Tensor:
        """Which tokens are prompt, those in the cache included; bool `[batch, past + tokens]` on the CPU."""
        return self._marks(in_graph=False).prompt_grid()

    def _marks(self, in_graph: bool) -> Marks:
        if self._kept is None:
            self._kept = self._make_marks(in_graph)
        return self._kept

    def _make_marks(self, in_graph: bool) -> Marks:
        tokens, past, real = self.tokens, self.tokens.past_on_host, self.tokens.real()
        starts = None if tokens.starts is None else tokens.starts.to(real.device)
        if tokens.prompt_mask is not None:
            prompt = checked_prompt_mask(tokens.prompt_mask, real, past, tokens.cache)
            if not in_graph:
                _refuse_padding((prompt & ~real)[:, past:])
            return Marks(real, prompt=prompt, starts=starts, turn=past)
        if tokens.labels is None or not self.language_model:
            return Marks(real, prompt=real, starts=starts, turn=past)
        labels = tokens.labels.to(real.device)
        labels = torch.nn.functional.pad(labels, (past, 0), value=IGNORE_INDEX) if past else labels
        return Marks(real, labels=labels, starts=starts, turn=past)

    def _check_told(self, positions: Positions) -> None:
        trainer = _running_trainer() if self.training else None
        if self.tokens.labels is None:
            self._warn_of_guess(positions, trainer)
        elif trainer is not None:
            refuse_cut_samples(trainer, positions)

    def _warn_of_guess(self, positions: Positions, trainer: Any | None) -> None:
        if trainer is not None:
            refuse_unlabeled(trainer, positions)
        elif self.training:
            warnings.warn(_PROMPT_UNKNOWN.format(positions), stacklevel=2)
        elif self.tokens.past_on_host:
            warnings.warn(_TURN_UNKNOWN.format(positions), stacklevel=2)
        elif positions.kinds.keys() - {"first"} and _SCORING not in self.said:
            self.said.add(_SCORING)
            warnings.warn(_SCORING.format(positions), stacklevel=2)


def stream_of_module(args: tuple, kwargs: Mapping[str, Any]) -> Stream:
    """The tokens of a module that is called alone, such as a block: all of them except padding are prompt."""
    tokens = None
    if isinstance(kwargs.get("attention_mask"), torch.Tensor):
        tokens = CallTokens.of({"hidden_states": args[0] if args else None} | dict(kwargs))
    return Untold() if tokens is None else Told(tokens.shape, tokens=tokens)


def _refuse_padding(contradictory: torch.Tensor) -> None:
    rows = contradictory.any(-1)
    if rows.any():
        which = rows_of_batch(rows.nonzero().squeeze(1).tolist(), len(rows))
        raise ValueError(
            f"prompt_mask and attention_mask, both {tuple(contradictory.shape)} here, contradict each other: {which} "
            "marks tokens as prompt that attention_mask marks as padding."
        )


@dataclass(eq=False)
class Decoded(Stream):
    """The decoder's tokens in an encoder-decoder model: none of them is prompt.

    Attributes:
        tokens: the tokens according to the arguments, None if they have none.
    """

    shape: tuple[int, int] = (0, 0)
    tokens: CallTokens | None = None

    def segments(self, positions: Positions, shape: tuple[int, int]) -> Segments:
        code = self.code_of_all(positions)
        if code is not None:
            return Segments.alike(shape, code)
        return Marks(self.tokens.real()).segments(positions, self.tokens.past_on_host)

    def code_of_all(self, positions: Positions) -> int | None:
        if self.tokens is None and positions.counted:
            raise ValueError(
                f"positions={str(positions)!r} counts the decoder's tokens, but this pass does not tell them: pass "
                "decoder_input_ids or labels."
            )
        return positions.tail if self.tokens is None or (self.tokens.mask is None and not positions.counted) else None

    def codes(self, positions: Positions) -> torch.Tensor:
        return Marks(self.tokens.real()).codes(positions, self.tokens.past_on_host)

    def _is_cut(self, hidden: torch.Tensor) -> bool:
        return self.tokens is not None and super()._is_cut(hidden)

    def check_shape(self, positions: Positions, hidden: torch.Tensor, name: str) -> None:
        if self.tokens is not None:
            super().check_shape(positions, hidden, name)


def _running_trainer() -> Any | None:
    """The Transformers `Trainer` whose `training_step` is running in this thread, None if there is none."""
    trainers = sys.modules.get("transformers.trainer")
    frame = None if trainers is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "training_step":
            owner = frame.f_locals.get("self")
            if isinstance(owner, trainers.Trainer):
                return owner
        frame = frame.f_back
    return None


def positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments that a `forward` takes by position, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(forward).parameters.items() if p.kind in kinds)

"""Finds the prompt of a forward pass in what its caller passes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.utils import ALL_CACHE_NAMES

from peft_reft.tokens import positions as pos
from peft_reft.tokens.passes import Plan, WholeSequence, rows_of_batch
from peft_reft.tokens.positions import Positions
from peft_reft.tokens.runs import Runs, Segments

_PROMPT_UNKNOWN = (
    "positions='{}' needs to know where the prompt ends, but this language model is trained without labels or "
    "prompt_mask in its forward pass, so the whole sequence counts as prompt. Generation would edit other tokens. Pass "
    "labels (-100 on the prompt) or prompt_mask to forward."
)
_TURN_UNKNOWN = (
    "positions='{}' needs to know whether the tokens that go on from this cache are prompt. Outside generate they "
    "count as the prompt of a new turn. In a decoding loop of your own pass prompt_mask (zeros for generated tokens), "
    "or hand the loop to generate as custom_generate."
)


@dataclass(frozen=True)
class Tokens:
    """What the arguments of one pass say about its tokens.

    Attributes:
        shape: `(batch, tokens)` of the pass, None if they do not tell.
        device: where the tokens are.
        past: number of tokens in the cache: a tensor for caches made to be compiled, None for one without a length.
        mask: the attention mask as passed, of any kind.
        labels, prompt_mask: as passed.
        starts: bool `[batch, tokens]`, first tokens of packed sequences, None where nothing is packed.
    """

    shape: tuple[int, int] | None
    device: torch.device | None = None
    past: int | torch.Tensor | None = 0
    mask: Any = None
    labels: torch.Tensor | None = None
    prompt_mask: Any = None
    starts: torch.Tensor | None = None

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> Tokens:
        """The tokens of a model with one stream, or of an encoder."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        like = embeds if _has_axes(embeds, 3) else ids if _has_axes(ids, 2) else None
        if like is None:
            return cls(None)
        shape = tuple(like.shape[:2])
        labels = call.get("labels")
        return cls(
            shape,
            like.device,
            cache_length(call),
            call.get("attention_mask"),
            labels if _has_axes(labels, 2) and tuple(labels.shape) == shape else None,
            call.get("prompt_mask"),
            _packed_starts(call, shape),
        )

    @classmethod
    def of_decoder(cls, call: Mapping[str, Any]) -> Tokens:
        """The decoder's tokens of an encoder-decoder model; without any of their own they are made from the labels."""
        own = {name.removeprefix("decoder_"): value for name, value in call.items() if name.startswith("decoder_")}
        labels = call.get("labels")
        if own.get("input_ids") is None and own.get("inputs_embeds") is None:
            own["input_ids"] = labels if _has_axes(labels, 2) else call.get("input_ids")
        return cls.of(own | {"cache": find_cache(call)})

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


def _has_axes(value: Any, axes: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == axes


def find_cache(call: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, None if there is none.

    Known by what it is, since releases of Transformers rename the argument. Only recurrent states without a method of
    their own are known by the names that Transformers has for them.
    """
    values = [value for value in call.values() if hasattr(value, "get_seq_length")]
    values += [call[name] for name in ALL_CACHE_NAMES if call.get(name) is not None]
    return values[0] if values else None


def cache_length(call: Mapping[str, Any]) -> int | torch.Tensor | None:
    """See `Tokens.past`."""
    cache = find_cache(call)
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except (AttributeError, ValueError):  # recurrent states
        return None
    # The cache counts on in place during the pass.
    return length.clone() if isinstance(length, torch.Tensor) else length


def _packed_starts(call: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor | None:
    # By the rule of Transformers' own masks: without an attention mask and a cache, position ids that do not go on.
    if call.get("attention_mask") is not None or find_cache(call) is not None:
        return None
    position_ids = call.get("position_ids")
    if _has_axes(position_ids, 3) and position_ids.shape[0] == 4:  # text positions, then the three of M-RoPE
        position_ids = position_ids[0]
    if _has_axes(position_ids, 2) and position_ids.shape[1] == shape[1]:
        return pos.sequence_starts(position_ids.expand(shape))
    ends = call.get("cu_seq_lens_q")
    if isinstance(ends, torch.Tensor):
        # The end of the last sequence, which some collators repeat, falls behind the row.
        starts = torch.zeros((shape[0], shape[1] + 1), dtype=torch.bool, device=ends.device)
        starts[:, ends.long()] = True
        return starts[:, :-1]
    return None


def _real_tokens(mask: Any, tokens: int, past: int) -> torch.Tensor | None:
    """See `Tokens.real`; None where the mask says nothing about padding."""
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
    """Real tokens according to a prepared mask `[batch, tokens, keys]`, boolean or additive.

    A padding token is one that may not attend to itself, or whose row allows everything: Transformers opens rows that
    would be masked completely. The last row of a causal mask allows everything by right, and so do all rows of an
    unpadded bidirectional one.
    """
    # Callers fill with the lowest number of some dtype, minus infinity, or a round number such as -1e4.
    allowed = mask if mask.dtype == torch.bool else mask > -1e3
    new = allowed[:, -tokens:, past : past + tokens]
    everything = new.all(-1)
    rightful = everything.all(-1, keepdim=True) | (torch.arange(tokens, device=mask.device) == tokens - 1)
    real = new.diagonal(dim1=-2, dim2=-1) & (~everything | rightful)
    return torch.cat([allowed[:, -1, :past], real], dim=1)


def checked_prompt_mask(mask: Any, real: torch.Tensor, past: int) -> torch.Tensor:
    """A caller's `prompt_mask` as bool `[batch, past + tokens]`.

    Args:
        mask: bool or 0/1 integers, `[batch, tokens]` or `[batch, past + tokens]`.
        real: bool `[batch, past + tokens]`.
        past: number of tokens in the cache; all of them are prompt unless the mask covers them.

    Raises:
        ValueError: anything else.
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
    return prompt if mask.shape[1] == length else torch.cat([real[:, :past], prompt], dim=1)


def assign(
    positions: Positions,
    prompt: torch.Tensor,
    real: torch.Tensor,
    starts: torch.Tensor | None = None,
    turn: int = 0,
) -> torch.Tensor:
    """Codes of the tokens (see `positions.assign`) in a graph; a token at index `turn` > 0 opens a new span."""
    if not positions.needs_prompt:
        return real.to(torch.int8) * positions.tail
    breaks = torch.arange(real.shape[1], device=real.device) == turn if turn else None
    return pos.assign(positions, prompt, pos.completion_of(prompt, real, starts), starts, breaks)


def prompt_plan(tokens: Tokens, language_model: bool, training: bool = False) -> Plan:
    """Plan of a pass through a model with one stream of tokens, outside `generate`.

    The prompt is `prompt_mask`, or else what next-token `labels` leave out, or else the whole real sequence. The
    latter, when a language model is in training, gives a warning: it is seldom meant.
    """
    if tokens.shape is None:
        return WholeSequence()

    runs: list[Runs] = []

    def codes(positions: Positions) -> torch.Tensor | Segments | int:
        if tokens.mask is None and not positions.needs_prompt:
            return positions.tail
        guessed = tokens.prompt_mask is None and (tokens.labels is None or not language_model)
        if torch.compiler.is_compiling():
            return _codes_in_graph(tokens, positions, guessed)
        if guessed and language_model and positions.needs_prompt:
            _warn_of_guess(positions, training, tokens.past_on_host)
        if not runs:
            runs.append(_runs(tokens, guessed))
        return runs[0].segments(positions).without_past(tokens.past_on_host)

    return Plan(tokens.shape, codes, training)


def _runs(tokens: Tokens, guessed: bool) -> Runs:
    past, real = tokens.past_on_host, tokens.real()
    starts = None if tokens.starts is None else tokens.starts.to(real.device)
    if tokens.prompt_mask is not None:
        prompt = checked_prompt_mask(tokens.prompt_mask, real, past)
        _refuse_padding((prompt & ~real)[:, past:])
        return Runs.of_prompt(prompt, real, starts, turn=past)
    if guessed:
        return Runs.of_prompt(real, real, starts, turn=past)
    return Runs.of_labels(_labels(tokens, real), real, starts, turn=past)


def _codes_in_graph(tokens: Tokens, positions: Positions, guessed: bool) -> torch.Tensor:
    """Codes of the tokens by operations on tensors alone; nothing is refused, which would take a look at the values."""
    past, real = tokens.past_on_host, tokens.real()
    starts = None if tokens.starts is None else tokens.starts.to(real.device)
    if tokens.prompt_mask is not None:
        prompt = checked_prompt_mask(tokens.prompt_mask, real, past)
    elif guessed:
        prompt = real
    else:
        prompt = pos.prompt_from_labels(_labels(tokens, real), real, starts)
    return assign(positions, prompt, real, starts, turn=past)[:, past:]


def _labels(tokens: Tokens, real: torch.Tensor) -> torch.Tensor:
    past = tokens.past_on_host
    labels = tokens.labels.to(real.device)
    return torch.nn.functional.pad(labels, (past, 0), value=pos.IGNORE_INDEX) if past else labels


def _refuse_padding(contradictory: torch.Tensor) -> None:
    rows = contradictory.any(-1)
    if rows.any():
        which = rows_of_batch(rows.nonzero().squeeze(1).tolist(), len(rows))
        raise ValueError(
            f"prompt_mask and attention_mask, both {tuple(contradictory.shape)} here, contradict each other: {which} "
            "marks tokens as prompt that attention_mask marks as padding."
        )


def _warn_of_guess(positions: Positions, training: bool, past: int) -> None:
    if training:
        warnings.warn(_PROMPT_UNKNOWN.format(positions), stacklevel=2)
    elif past:
        warnings.warn(_TURN_UNKNOWN.format(positions), stacklevel=2)


def encoder_plan(tokens: Tokens) -> Plan:
    """Plan of an encoder's tokens: all of them are prompt."""
    return prompt_plan(tokens, language_model=False)


def decoder_plan(tokens: Tokens) -> Plan:
    """Plan of the decoder's tokens in an encoder-decoder model: none of them is prompt."""

    def codes(positions: Positions) -> torch.Tensor | Segments | int | None:
        if tokens.shape is None and positions.counted:
            raise ValueError(
                f"positions={str(positions)!r} counts the decoder's tokens, but this pass does not tell them: pass "
                "decoder_input_ids or labels."
            )
        if tokens.shape is None or (tokens.mask is None and not positions.counted):
            return positions.tail or None
        real = tokens.real()
        if torch.compiler.is_compiling():
            return pos.assign(positions, torch.zeros_like(real), real)[:, tokens.past_on_host :]
        return Runs.of_completion(real).segments(positions).without_past(tokens.past_on_host)

    return Plan(tokens.shape, codes)

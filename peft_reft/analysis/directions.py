"""Directions in the residual stream that separate two kinds of text, to steer along or to initialize an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_reft.components import OUTPUT
from peft_reft.layouts import first_tensor
from peft_reft.places import Places
from peft_reft.stacks import BlockList, only_block_list

_BATCH = 16
# Which tokens of a text are compared.
Tokens = Literal["differing", "mean", "last"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and restore the mode of each module at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def directions_from_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    positive: Sequence[str],
    negative: Sequence[str],
    layers: Iterable[int],
    tokens: Tokens = "differing",
) -> dict[int, torch.Tensor]:
    """Difference of means: the mean representation of `positive` texts minus that of `negative` ones.

    Adapters of a PEFT model are disabled for this. Pairs of texts that differ in nothing else give the cleanest
    directions. Added at strength 1 (`set_directions` of a `lobireft` adapter), the direction moves a representation by
    the distance between the two means.

    Args:
        model: a Transformers model with one stack of blocks, or a PEFT model around one.
        tokenizer: its tokenizer.
        positive: texts with the property that the direction represents.
        negative: texts without it.
        layers: numbers of blocks whose output is compared; negative numbers count from the end.
        tokens: which tokens of a text count. `"differing"`: the mean of all tokens from the first one in which the
            texts of a pair, `positive[i]` and `negative[i]`, differ. `"mean"`: the mean of all tokens, without special
            ones at the start, for lists that are not pairs. `"last"`: the last one, which has seen the whole text, for
            texts that end in the same token. `"differing"` was the best choice over several forms of texts
            (`examples/benchmarks/directions.py`).

    Returns:
        Each of `layers` -> the difference of the means, float32 `[1, d]` on the CPU, not normalized.

    Raises:
        ValueError: no texts, texts without tokens, lists that are not pairs, a model with several stacks or none, no
            such layer, a layer whose output cannot be read, or an unknown choice of `tokens`.
    """
    if tokens not in get_args(Tokens):
        raise ValueError(f"tokens={tokens!r}: allowed are {list(get_args(Tokens))}.")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = list(layers)
    block_list = only_block_list(base)
    numbers = [_number(block_list, layer) for layer in layers]
    kinds = [_tokenized(tokenizer, texts) for texts in (positive, negative)]
    if not positive or not negative:
        raise ValueError(f"Texts of both kinds are needed, got {len(positive)} positive and {len(negative)} negative.")
    begins = _begins(tokenizer, kinds, tokens)
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        means = [_mean_states(base, block_list, *each, numbers) for each in zip(kinds, begins, strict=True)]
    return {layer: (means[0][i] - means[1][i])[None] for i, layer in enumerate(layers)}


def _number(block_list: BlockList, layer: int) -> int:
    count = len(block_list.blocks)
    if not -count <= layer < count:
        raise ValueError(f"There is no layer {layer}: {block_list.name!r} has {count}.")
    return layer % count


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    ids = [tokenizer(text)["input_ids"] for text in texts]
    if [] in ids:
        raise ValueError(f"The text {texts[ids.index([])]!r} has no tokens.")
    return ids


def _begins(tokenizer: PreTrainedTokenizerBase, kinds: list[list[list[int]]], tokens: Tokens) -> list[list[int]]:
    """Index of the first token that counts in each text of both kinds; all tokens after it count."""
    if tokens == "last":
        _warn_of_endings(tokenizer, kinds)
        return [[len(ids) - 1 for ids in texts] for texts in kinds]
    if tokens == "mean":
        special = set(tokenizer.all_special_ids)
        return [[_first(token not in special for token in ids) or 0 for ids in texts] for texts in kinds]
    if len(kinds[0]) != len(kinds[1]):
        raise ValueError(
            f"tokens='differing' compares pairs, got {len(kinds[0])} positive and {len(kinds[1])} negative texts; "
            "choose tokens='mean' for lists that are not pairs."
        )
    begins = []
    for i, (ids, others) in enumerate(zip(*kinds, strict=True)):
        if ids == others:
            raise ValueError(f"tokens='differing': the texts of pair {i} are the same.")
        begin = _first(a != b for a, b in zip(ids, others, strict=False))
        # If one text is a prefix of the other, its last token counts.
        begin = min(len(ids), len(others)) if begin is None else begin
        begins.append([min(begin, len(ids) - 1), min(begin, len(others) - 1)])
    return [list(of_kind) for of_kind in zip(*begins, strict=True)]


def _first(found: Iterable[bool]) -> int | None:
    return next((i for i, is_found in enumerate(found) if is_found), None)


def _warn_of_endings(tokenizer: PreTrainedTokenizerBase, kinds: list[list[list[int]]]) -> None:
    ends = [{ids[-1] for ids in texts} for texts in kinds]
    if ends[0] == ends[1]:
        return
    only = [
        ", ".join(repr(tokenizer.decode([token])) for token in sorted(own - other)[:3]) or "none"
        for own, other in (ends, ends[::-1])
    ]
    warnings.warn(
        f"tokens='last' compares last tokens, but the lists end differently: only positive texts end in {only[0]}, "
        f"only negative ones in {only[1]}. Such a direction mostly separates these tokens. End all texts alike, or "
        "choose tokens='differing' or 'mean'.",
        stacklevel=4,
    )


def _mean_states(
    model: nn.Module, block_list: BlockList, texts: list[list[int]], begins: list[int], numbers: Sequence[int]
) -> torch.Tensor:
    """Mean over texts of the mean state of the tokens that count, after each of the blocks; float32 `[layers, d]`."""
    total = torch.zeros(())
    for begin in range(0, len(texts), _BATCH):
        batch = slice(begin, begin + _BATCH)
        total = total + _states(model, block_list, texts[batch], begins[batch], numbers).sum(1)
    return total / len(texts)


def _states(
    model: nn.Module, block_list: BlockList, texts: list[list[int]], begins: list[int], numbers: Sequence[int]
) -> torch.Tensor:
    """Mean state of the tokens of each text that count, after each of the blocks; float32 `[layers, texts, d]`."""
    # Padded here, on the right: many tokenizers of language models have no padding token.
    lengths = torch.tensor([len(ids) for ids in texts])
    padded = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in texts], batch_first=True)
    place = torch.arange(padded.shape[1])
    mask = place < lengths[:, None]
    counts = mask & (place >= torch.tensor(begins)[:, None])
    states: dict[int, torch.Tensor] = {}
    places = Places(model, block_list)

    def keep(number: int, hidden: torch.Tensor) -> torch.Tensor:
        share = (counts / counts.sum(-1, keepdim=True)).to(hidden.device)
        states[number] = torch.einsum("bt,btd->bd", share, hidden.float()).cpu()
        return hidden

    def watch(number: int, output: Any) -> None:
        layout = places.of_block(number, OUTPUT).layout
        hidden = first_tensor(output)
        if layout is None:
            keep(number, hidden)
        else:
            layout.edit(hidden, tuple(padded.shape), partial(keep, number))

    handles = [
        block_list.blocks[n].register_forward_hook(lambda module, args, output, n=n: watch(n, output)) for n in numbers
    ]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            model(input_ids=padded.to(device), attention_mask=mask.long().to(device))
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [block_list.names[n] for n in numbers if n not in states]:
        raise ValueError(f"{type(model).__name__} calls {unseen[0]!r} past its hooks, so its states cannot be read.")
    return torch.stack([states[n] for n in numbers])

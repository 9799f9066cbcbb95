"""Directions in the residual stream that tell two kinds of text apart, to steer along or to start an adapter from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_reft.components import OUTPUT
from peft_reft.layouts import first_tensor
from peft_reft.places import Places
from peft_reft.stacks import BlockList, only_block_list

_BATCH = 16


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, after which every module is back in the mode it was in."""
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
) -> dict[int, torch.Tensor]:
    """Difference of means: where the last token of `positive` texts is on average, seen from that of `negative` ones.

    Adapters of a PEFT model are off meanwhile. Texts that differ in nothing else, pair by pair, give the cleanest
    directions. See `ReftModel.set_directions` for what to do with them.

    Args:
        model: a Transformers model with one stack of blocks, or a PEFT model around one.
        tokenizer: its tokenizer.
        positive: texts that have what the direction is to stand for.
        negative: texts that have not.
        layers: numbers of blocks whose output is compared; negative numbers count from the end.

    Returns:
        Each of `layers` -> float32 `[1, d]` on the CPU, as long as the means are apart.

    Raises:
        ValueError: no texts, texts without tokens, a model with several stacks or none, or no such layer.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = list(layers)
    block_list = only_block_list(base)
    numbers = [_number(block_list, layer) for layer in layers]
    if not positive or not negative:
        raise ValueError(f"Texts of both kinds are needed, got {len(positive)} positive and {len(negative)} negative.")
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        means = [_mean_states(base, block_list, tokenizer, texts, numbers) for texts in (positive, negative)]
    return {layer: (means[0][i] - means[1][i])[None] for i, layer in enumerate(layers)}


def _number(block_list: BlockList, layer: int) -> int:
    count = len(block_list.blocks)
    if not -count <= layer < count:
        raise ValueError(f"There is no layer {layer}: {block_list.name!r} has {count}.")
    return layer % count


def _mean_states(
    model: nn.Module,
    block_list: BlockList,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    numbers: Sequence[int],
) -> torch.Tensor:
    """Mean over texts of the last token's state behind each of the blocks, float32 `[layers, d]`."""
    total = torch.zeros(())
    for begin in range(0, len(texts), _BATCH):
        total = total + _last_states(model, block_list, tokenizer, texts[begin : begin + _BATCH], numbers).sum(1)
    return total / len(texts)


def _last_states(
    model: nn.Module,
    block_list: BlockList,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    numbers: Sequence[int],
) -> torch.Tensor:
    """State of each text's last token behind each of the blocks, float32 `[layers, texts, d]`."""
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    if any(len(tokens) == 0 for tokens in ids):
        raise ValueError("One of the texts has no tokens.")
    # Padded here, on the right: many tokenizers of language models have no padding token.
    lengths = torch.tensor([len(tokens) for tokens in ids])
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    states: dict[int, torch.Tensor] = {}
    places = Places(model, block_list)

    def keep(number: int, hidden: torch.Tensor) -> torch.Tensor:
        last = hidden[torch.arange(len(texts), device=hidden.device), (lengths - 1).to(hidden.device)]
        states[number] = last.float().cpu()
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
            model(input_ids=padded.to(device), attention_mask=mask.to(device))
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [block_list.names[n] for n in numbers if n not in states]:
        raise ValueError(f"{type(model).__name__} calls {unseen[0]!r} past its hooks, so its states cannot be read.")
    return torch.stack([states[n] for n in numbers])

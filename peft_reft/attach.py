"""Attaches entries to a model, and removes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from peft_reft.components import DECODER, ENCODER, has_output
from peft_reft.generate import GenerateEntry
from peft_reft.loading import check_weights
from peft_reft.modules import modules_around
from peft_reft.quantized import allow_packing, forbid_packing
from peft_reft.stacks import block_lists, is_encoder_decoder
from peft_reft.tracker import Entry, Tracker


def tracker_of(model: nn.Module) -> Tracker | None:
    """The tracker of a model that has ReFT layers, or of a model inside it; None if there is none.

    Only entries and layers hold it, because Transformers drops the tuner object that injected an adapter.
    """
    entry = next((entry for part in modules_around(model) if (entry := Entry.of(part)) is not None), None)
    return None if entry is None else entry.tracker


@contextmanager
def prompt_mask_of(model: nn.Module, prompt_mask: torch.Tensor) -> Iterator[None]:
    """Set the prompt of a model's passes, around code that cannot pass `prompt_mask`, such as evaluation and trainers.

    Within the `with` block, every pass of this thread has this prompt unless it gets its own `prompt_mask`. In a call
    of `generate` it is the prompt of the call.

    Args:
        model: a PEFT model with ReFT adapters, a model that they were injected into, or a module around one.
        prompt_mask: bool or 0/1 integers `[batch, tokens]`, True on the prompt, as in `forward`.

    Raises:
        ValueError: the model has no ReFT adapter. Passes raise it if the shape of the mask does not match.
    """
    tracker = tracker_of(model)
    if tracker is None:
        raise ValueError(f"There is no ReFT adapter on this {type(model).__name__}, so it has no prompt to be told.")
    with tracker.telling(prompt_mask):
        yield


def track(model: nn.Module) -> Tracker:
    """Attach entries to a model, and keep its 4-bit layers differentiable. Mutates the model; `untrack` undoes it."""
    if "torch._dynamo" in sys.modules:
        # Graphs compiled earlier would keep running without hooks: no guard checks for them.
        sys.modules["torch._dynamo"].reset()
    forbid_packing(model)
    tracker = Tracker()
    generates = bool(getattr(model, "can_generate", bool)())
    both = is_encoder_decoder(model)
    root = Entry(model, tracker, (ENCODER, DECODER) if both else (DECODER,), both, generates, True)
    root.attach()
    root.handles.append(model.register_load_state_dict_pre_hook(check_weights))
    for part, streams in _parts(model).items():
        Entry(part, tracker, streams, both, generates, False).attach()
    if generates:
        GenerateEntry(model, tracker, decoder_only=not both).attach()
    return tracker


def _parts(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """The submodules of a model that hold a stack of blocks -> the streams of their blocks."""
    streams: dict[nn.Module, tuple[str, ...]] = {}
    for block_list in block_lists(model):
        parts = block_list.name.split(".")
        for length in range(1, len(parts)):
            part = model.get_submodule(".".join(parts[:length]))
            if has_output(part) and part is not model:
                known = streams.get(part, ())
                streams[part] = known if block_list.stream in known else (*known, block_list.stream)
    return streams


def untrack(model: nn.Module) -> None:
    """Remove everything that `track` attached to a model."""
    for module in model.modules():
        entry = Entry.of(module)
        if entry is not None:
            entry.detach()
    GenerateEntry.detach(model)
    allow_packing(model)

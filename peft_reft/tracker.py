"""Follows a model's passes: hooks where a pass can enter, and the state that its ReFT layers ask for their plan."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_reft.tokens.passes import ENCODER, Plan, WholeSequence
from peft_reft.tokens.prompts import Tokens, decoder_plan, encoder_plan, prompt_plan
from peft_reft.tokens.requests import Rows

if TYPE_CHECKING:
    from peft_reft.tokens.generation import Generation


# Arguments of `forward` and `generate` that are for ReFT alone.
ARGUMENTS = {"prompt_mask", "adapter_names", "subspaces"}


class PromptTracker:
    """State of a model's current pass, shared by its `ReftLayer`s. Copies and pickles of the model start afresh.

    Attributes:
        adapters: names of all adapters, in the order they were added -> names of their subspaces.
        plans: stream of tokens -> its plan in the current pass.
        entered: the entry that the current pass came in through, None between passes.
        generation: the `generate` call that is going on.
        rows: what the call that is going on asks of each row of its batch.
        handles: of hooks that are there for the current pass only.
    """

    def __init__(self, adapters: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self.adapters = dict(adapters or {})
        self.plans: dict[str, Plan] = {}
        self.entered: Entry | None = None
        self.generation: Generation | None = None
        self.rows: Rows | None = None
        self.handles: list[RemovableHandle] = []
        # Threads of a server take turns, each with a whole `generate`.
        self.turn = threading.RLock()

    def __reduce__(self) -> tuple[type[PromptTracker], tuple[dict[str, tuple[str, ...]]]]:
        return type(self), (self.adapters,)

    def plan(self, stream: str) -> Plan:
        """The plan of a stream of tokens."""
        return self.plans.get(stream) or WholeSequence(self.rows)

    def restore(self, plans: dict[str, Plan], _grad: torch.Tensor) -> None:
        """Tensor hook: make the plans of an earlier pass current again."""
        self.plans = plans

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """While the model generates, every pass belongs to `generation`."""
        outer, self.generation = self.generation, generation
        try:
            yield
        finally:
            self.generation = outer

    @contextmanager
    def asking(self, rows: Rows | None) -> Iterator[None]:
        """While it lasts, every pass asks this of its rows."""
        outer, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = outer


class Entry:
    """Forward hooks of one module through which a pass can enter: they find the prompt before it and tidy up after.

    Args:
        tracker: shared state of the model.
        names: names of the module's positional forward arguments.
        streams: the streams of tokens that pass through the module.
        encoder_decoder: whether the module is an encoder-decoder model or a part of one.
        language_model: whether `labels` `[batch, tokens]` are next-token labels.
        root: whether the module is the adapted model itself, rather than a part that callers may go round it to.
    """

    def __init__(
        self,
        tracker: PromptTracker,
        names: tuple[str, ...],
        streams: tuple[str, ...],
        encoder_decoder: bool,
        language_model: bool,
        root: bool,
    ) -> None:
        self.tracker = tracker
        self.names = names
        self.streams = streams
        self.encoder_decoder = encoder_decoder
        self.language_model = language_model
        self.root = root

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook: plan the pass; takes `prompt_mask` out of the arguments."""
        if not self.root and self.tracker.entered is not None and self.tracker.entered.root:
            return None
        if getattr(module, "_is_replica", False):
            raise NotImplementedError(
                "nn.DataParallel runs copies of the model in threads, which ReFT does not support. Start one process a "
                "GPU (accelerate launch, torchrun), or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
            )
        self.tracker.entered = self
        call = dict(zip(self.names, args, strict=False)) | kwargs
        _refuse(call)
        self.tracker.plans = {stream: self._plan(stream, call, module.training) for stream in self.streams}
        rows = Rows.of(call, self.tracker.rows)
        if rows is not None:
            self._ask(rows, module)
        if not ARGUMENTS & kwargs.keys():
            return None
        # The model's own forward does not know these.
        return args, {name: value for name, value in kwargs.items() if name not in ARGUMENTS}

    def _ask(self, rows: Rows, module: nn.Module) -> None:
        shapes = [plan.shape for plan in self.tracker.plans.values() if plan.shape is not None]
        if not rows.checked:
            rows.check(self.tracker.adapters, module.training, shapes[0][0] if shapes else None)
        for plan in self.tracker.plans.values():
            plan.rows = rows
        self.tracker.handles = rows.choose_heads(module)

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook, also called after an exception."""
        if self.tracker.entered is not self:
            return
        self.tracker.entered = None
        while self.tracker.handles:
            self.tracker.handles.pop().remove()
        if torch.compiler.is_compiling():
            return
        if not torch.is_grad_enabled():
            self.tracker.plans = {}
        else:
            # Checkpointed modules run their hooks again in the backward pass, perhaps after other forward passes. The
            # engine enters this pass's graph through its outputs, which is the moment to bring its plans back.
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self.tracker.restore, self.tracker.plans))

    def _plan(self, stream: str, call: Mapping[str, Any], training: bool) -> Plan:
        if self.encoder_decoder:
            if stream == ENCODER:
                return encoder_plan(Tokens.of(call))
            return decoder_plan(Tokens.of_decoder(call) if len(self.streams) > 1 else Tokens.of(call))
        tokens = Tokens.of(call)
        generation = self.tracker.generation
        if generation is not None and tokens.prompt_mask is None:
            return generation.plan(tokens)
        return prompt_plan(tokens, self.language_model, training and torch.is_grad_enabled())


def _refuse(call: Mapping[str, Any]) -> None:
    if type(call.get("cache")).__name__ == "PagedAttentionCache":
        raise NotImplementedError(
            "Continuous batching (generate_batch, cache_implementation='paged') mixes prompts and generated tokens in "
            "one row, which ReFT's positions do not support. Use generate()."
        )


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in _tensors(value)]
    return []

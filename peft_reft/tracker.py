"""The hooks on a model besides its layers: where passes enter, and the pass that is running.

model(...) or model.forward(...) --> Entry --> opens a Pass --> the model's own forward --> closes it
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_reft.calls import groups_of_layers, say_uncalled
from peft_reft.components import DECODER, ENCODER
from peft_reft.families import codebooks_of, tokens_of_its_own
from peft_reft.heads import choose_heads
from peft_reft.tokens.generation import Generation
from peft_reft.tokens.passes import Pass, Stream, Untold
from peft_reft.tokens.prompts import RECORD, CallTokens, Decoded, Record, Told, find_cache, positional_names
from peft_reft.tokens.requests import AdapterNames, RowRequests, batch_size

# Arguments of `forward` and `generate` that only ReFT reads.
ASKING = {"adapter_names", "subspaces"}
ARGUMENTS = {"prompt_mask", *ASKING}


class _OfThread(threading.local):
    """The state of each thread that calls the model.

    Attributes:
        passes: the open passes, the innermost last.
        generation: the `generate` call that is running.
        requests: the per-row requests of the call that is running.
        prompt_mask: see `Tracker.telling`.
        replayed: the pass found last for a module that ran again in a backward pass.
    """

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.generation: Generation | None = None
        self.requests: RowRequests | None = None
        self.prompt_mask: torch.Tensor | None = None
        self.replayed: Pass | None = None


class Tracker:
    """Knows the running pass; shared by a model's `ReftLayer`s. Copies and pickles keep only the adapters.

    Attributes:
        adapters: the model's adapters, in the order they were added.
        own: the state of each thread.
        said: warnings already given, which are given once per model.
        lock: threads of a server take turns, each for a whole call.
        uncalled: the layers that no pass has called yet, grouped by the names of their sites; None until the first
            pass after adapters were added.
    """

    def __init__(self, adapters: Mapping[str, AdapterNames] | None = None) -> None:
        self.adapters = dict(adapters or {})
        self.said: set[str] = set()
        self.lock = threading.RLock()
        self.uncalled: dict[str, list[nn.Module]] | None = None
        self.own = _OfThread()
        # Passes whose graphs may still go through a backward pass.
        self._graphs: list[weakref.ref[Pass]] = []

    def __reduce__(self) -> tuple[type[Tracker], tuple[dict[str, AdapterNames]]]:
        return type(self), (self.adapters,)

    def add(self, adapter_name: str, names: AdapterNames) -> None:
        """Register a new adapter."""
        self.adapters[adapter_name] = names
        self.uncalled = None

    def current(self, layer: nn.Module | None = None) -> Pass | None:
        """The pass that a module of the model (the one with `layer`) runs in; None when no pass is open."""
        passes = self.own.passes
        if is_recorded():
            if not passes:
                return None
            return passes[-1] if passes[-1].in_graph else passes[-1].recorded()
        task = torch._C._current_graph_task_id()
        if task != -1 and not (passes and passes[-1].graph_task == task):
            return self._replayed()
        if not passes:
            return None
        if layer is not None and (self.uncalled is None or self.uncalled):
            passes[-1].called.add(layer)
        return passes[-1]

    def innermost(self) -> Pass | None:
        """The open pass that was opened last; None when no pass is open."""
        return self.own.passes[-1] if self.own.passes else None

    def _replayed(self) -> Pass | None:
        """The pass of a module that runs again in a backward pass.

        Checkpoints run modules again while the engine evaluates a node that was created in their forward pass, and
        autograd numbers nodes in the order of their creation.
        """
        node = torch._C._current_autograd_node()
        alive = [pass_ for ref in self._graphs if (pass_ := ref()) is not None]
        if node is not None:
            number = node._sequence_nr()
            around = [pass_ for pass_ in alive if pass_.nodes[0] <= number < pass_.nodes[1]]
            if around:
                # Of nested passes, the innermost began last.
                self.own.replayed = max(around, key=lambda pass_: pass_.nodes[0])
                return self.own.replayed
        # A checkpoint within a checkpoint: its nodes were created in this backward pass.
        return self.own.replayed if self.own.replayed in alive else None

    def open(self, pass_: Pass) -> None:
        """Make a pass the running one."""
        if not pass_.in_graph:
            pass_.graph_task = torch._C._current_graph_task_id()
            pass_.nodes = (torch._C._autograd._get_sequence_nr(), 0)
        self.own.passes.append(pass_)

    def close(self, pass_: Pass) -> None:
        """End a pass, and any passes within it that an exception left open."""
        passes = self.own.passes
        assert pass_ in passes, "The pass to close is not open."
        while passes.pop() is not pass_:
            pass
        while pass_.handles:
            pass_.handles.pop().remove()

    def keep(self, pass_: Pass, output: Any) -> None:
        """Keep a pass for the backward pass, as long as the graph of its `output` exists."""
        pass_.nodes = (pass_.nodes[0], torch._C._autograd._get_sequence_nr())
        tensors = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        if tensors:
            self._graphs = [ref for ref in self._graphs if ref() is not None] + [weakref.ref(pass_)]
        for tensor in tensors:
            tensor.register_hook(functools.partial(_held_by_graph, pass_))

    @contextmanager
    def asking(self, requests: RowRequests | None) -> Iterator[None]:
        """Within the `with` block, every pass has these requests."""
        outer, self.own.requests = self.own.requests, requests
        try:
            yield
        finally:
            self.own.requests = outer

    @contextmanager
    def telling(self, prompt_mask: torch.Tensor) -> Iterator[None]:
        """Within the `with` block, every pass without its own `prompt_mask` has this one."""
        outer, self.own.prompt_mask = self.own.prompt_mask, prompt_mask
        try:
            yield
        finally:
            self.own.prompt_mask = outer


def is_recorded() -> bool:
    """Whether `torch.compile`, `torch.export` or `torch.jit.trace` is recording operations into a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _held_by_graph(pass_: Pass, grad: torch.Tensor) -> None:
    """Tensor hook that does nothing: the graph holds it, and through it the pass."""


class _SignatureOfOriginal:
    """The `__signature__` of a `StandIn`, computed on access: not all signatures can be pickled."""

    def __get__(self, stand_in: StandIn | None, owner: type) -> inspect.Signature:
        if stand_in is None:
            raise AttributeError("__signature__")
        signature = vars(stand_in)["__signature__"] = inspect.signature(stand_in.original)
        return signature


class StandIn:
    """Base class for objects that replace a method of `module`. They are called in its place, and call `original`.

    It is an attribute of the module, so it is copied, pickled and saved with it.

    Args:
        module: the module.
        method: name of the method.
    """

    __signature__ = _SignatureOfOriginal()

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module = module
        self.method = method
        # The attribute of this instance that other code put in place of its class's method, if any.
        self.replaced: Callable[..., Any] | None = None
        self.__doc__ = getattr(module, method).__doc__
        self.__name__ = method

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "__signature__"}

    @property
    def __code__(self) -> CodeType:
        # torch.export reports the source location of the code that it exports.
        return self.original.__code__

    @property
    def original(self) -> Callable[..., Any]:
        """The method that this object replaces."""
        if self.replaced is not None:
            return self.replaced
        return getattr(type(self.module), self.method).__get__(self.module)

    def put(self, place: str) -> None:
        """Become the attribute `place` of the module. Mutates the module; `take_off` undoes it."""
        self.replaced = vars(self.module).get(place)
        setattr(self.module, place, self)

    def take_off(self, *places: str) -> None:
        """Restore the module's attributes `places` where this object still replaces them. Mutates the module."""
        for place in places:
            if vars(self.module).get(place) is not self:
                continue
            if self.replaced is not None or place != self.method:
                setattr(self.module, place, self.original)
            else:
                delattr(self.module, place)


class Entry(StandIn):
    """A part of a model where a pass can enter: the model, the part that owns the blocks, and the parts in between.

    It replaces the part's `forward`, so that a pass is opened whether callers use the part or its `forward`, and closed
    even after an exception. Where other code has replaced `forward` since, hooks open the pass.

    Args:
        module: the part.
        tracker: the tracker of the model.
        streams: the streams of tokens that pass through the part.
        encoder_decoder: whether it is an encoder-decoder model or a part of one.
        language_model: whether `labels` `[batch, tokens]` are next-token labels.
        root: whether it is the adapted model itself.
    """

    def __init__(
        self,
        module: nn.Module,
        tracker: Tracker,
        streams: tuple[str, ...],
        encoder_decoder: bool,
        language_model: bool,
        root: bool,
    ) -> None:
        super().__init__(module, "forward")
        self.tracker = tracker
        self.streams = streams
        self.encoder_decoder = encoder_decoder
        self.language_model = language_model
        self.root = root
        self.names = positional_names(module.forward)
        self.own_tokens, self.codebooks = tokens_of_its_own(module), codebooks_of(module)
        self.handles: list[RemovableHandle] = []

    @classmethod
    def of(cls, module: nn.Module) -> Entry | None:
        """The entry at a module, if there is one."""
        hooks = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
        return next((entry for entry in hooks if isinstance(entry, cls)), None)

    def attach(self) -> None:
        """Replace the module's `forward`. Mutates the module; `detach` undoes it."""
        # Accelerate's hooks wrap the `forward` they find and restore it when removed, so this entry goes inside them.
        hooked = hasattr(self.module, "_hf_hook") and "_old_forward" in vars(self.module)
        self.put("_old_forward" if hooked else "forward")
        self.handles.append(self.module.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True))

    def detach(self) -> None:
        """Undo `attach`. Mutates the module."""
        while self.handles:
            self.handles.pop().remove()
        self.take_off("forward", "_old_forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's `forward`, in a new pass or in the pass that the module is a part of."""
        forward = self.original
        outer = self.tracker.innermost()
        if outer is not None and outer.hooked is self:
            # A hook has opened the pass already.
            outer.hooked = None
            try:
                return forward(*args, **kwargs)
            except BaseException:
                self.tracker.close(outer)
                raise
        pass_ = self._open(dict(zip(self.names, args, strict=False)) | kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ARGUMENTS}
        if pass_ is None:
            return forward(*args, **kwargs)
        try:
            output = forward(*args, **kwargs)
            self._leave(pass_, output)
        finally:
            self.tracker.close(pass_)
        return output

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook: opens the pass where something else has replaced the module's `forward`."""
        if getattr(module, "_is_replica", False):
            raise NotImplementedError(
                "nn.DataParallel runs copies of the model in threads, which ReFT does not support. Start one process "
                "per GPU (accelerate launch, torchrun), or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
            )
        if self._stands_in(module):
            return None
        pass_ = self._open(dict(zip(self.names, args, strict=False)) | kwargs)
        if pass_ is not None:
            pass_.hooked = self
            pass_.handles.append(module.register_forward_hook(self.after, always_call=True))
        return args, {name: value for name, value in kwargs.items() if name not in ARGUMENTS}

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook, also called after an exception: closes what `before` opened."""
        pass_ = self.tracker.innermost()
        if pass_ is not None and pass_.entry is self:
            self._leave(pass_, output)
            self.tracker.close(pass_)

    def _stands_in(self, module: nn.Module) -> bool:
        """Whether the module's `forward` is this entry, or a wrapper with `__wrapped__` around it (torch.compile)."""
        forward = module.forward
        while forward is not self:
            forward = getattr(forward, "__wrapped__", None)
            if forward is None:
                return False
        return True

    def _goes_on(self, call: Mapping[str, Any], outer: Pass | None) -> bool:
        """Whether the module is called as a part of the `outer` pass, rather than with other tokens."""
        if self.root or outer is None or not outer.streams.keys() >= set(self.streams):
            return False
        if outer.in_graph or outer is not self.tracker.innermost():  # the latter in a backward pass
            return True
        ids = call.get("input_ids")
        if ids is None and call.get("inputs_embeds") is None:
            return True
        if self in outer.entered or not self._are_tokens_of(outer, ids):
            return False
        outer.entered.add(self)
        return True

    def _are_tokens_of(self, outer: Pass, ids: torch.Tensor | None) -> bool:
        if isinstance(outer.streams[self.streams[0]], Untold):
            return ids is None
        theirs = outer.ids.get(self.streams[0])
        if ids is None or theirs is None or ids is theirs:
            return True
        return ids.shape == theirs.shape and torch.equal(ids.to(theirs.device), theirs)

    def _open(self, call: dict[str, Any]) -> Pass | None:
        """Open the pass of a call; None if the call belongs to the open pass."""
        outer = self.tracker.current()
        if self._goes_on(call, outer):
            return None
        in_graph = is_recorded()
        generation = self.tracker.own.generation
        if generation is not None and outer is not None and outer.generation is generation:
            # Generation never nests passes.
            generation = None
        tokens = {stream: self._tokens(stream, call) for stream in self.streams}
        streams: dict[str, Stream] = {}
        for name, told in tokens.items():
            made = None
            if generation is not None and told is not None and not self.encoder_decoder:
                made = generation.stream(told, in_graph)
            generation = None if made is None else generation
            streams[name] = made or self._stream(name, told)
        # The decoder's ids in an encoder-decoder model may be made from labels.
        known = (ENCODER,) if self.encoder_decoder else self.streams
        ids = {name: told.ids for name, told in tokens.items() if told is not None and name in known}
        products = None if generation is None else generation.products
        pass_ = Pass(streams, self.tracker.own.requests, in_graph, products, ids, self, generation)
        if pass_.requests is not None or not ASKING.isdisjoint(call):
            self._ask(pass_, call)
        self.tracker.open(pass_)
        return pass_

    def _ask(self, pass_: Pass, call: Mapping[str, Any]) -> None:
        """Check the per-row requests of the call, and note them on the pass."""
        if not ASKING.isdisjoint(call):
            pass_.requests = RowRequests.of(call, pass_.requests)
        requests = pass_.requests
        if requests is not None:
            batch = batch_size([stream.shape[0] for stream in pass_.streams.values()], call)
            requests.check(self.tracker.adapters, self.module.training, batch)
            if requests.choose_modules:
                pass_.handles += choose_heads(self.module, requests)

    def _tokens(self, stream: str, call: Mapping[str, Any]) -> CallTokens | None:
        if self.encoder_decoder and stream == DECODER and len(self.streams) > 1:
            return CallTokens.of_decoder(call, self.codebooks)
        tokens = CallTokens.of(call, self.codebooks if stream == DECODER else 1)
        if self.own_tokens and tokens is not None:
            tokens = tokens.behind(self.own_tokens)
        mask = self.tracker.own.prompt_mask
        if tokens is None or mask is None or tokens.prompt_mask is not None or self.tracker.own.generation is not None:
            return tokens
        return dataclasses.replace(tokens, prompt_mask=mask)

    def _stream(self, name: str, tokens: CallTokens | None) -> Stream:
        if self.encoder_decoder and name == DECODER:
            return Decoded((0, 0) if tokens is None else tokens.shape, tokens=tokens)
        training = self.module.training and torch.is_grad_enabled()
        if tokens is None:
            return Untold(training=training)
        language_model = self.language_model and not self.encoder_decoder
        return Told(tokens.shape, training, tokens=tokens, language_model=language_model, said=self.tracker.said)

    def _leave(self, pass_: Pass, output: Any) -> None:
        if pass_.in_graph:
            return
        tracker = self.tracker
        if torch.is_grad_enabled():
            tracker.keep(pass_, output)
        by_row = pass_.requests is not None and pass_.requests.adapters is not None
        if self.root and tracker.uncalled != {} and not by_row and not pass_.compiled:
            tracker.uncalled = groups_of_layers(self.module) if tracker.uncalled is None else tracker.uncalled
            say_uncalled(self.module, pass_, tracker.uncalled)
        stream = pass_.streams.get(DECODER)
        if isinstance(stream, Told) and stream.tokens.prompt_mask is not None:
            cache = stream.tokens.cache
            values = dict(output) if isinstance(output, Mapping) else dict(enumerate(output or ()))
            cache = find_cache(values) if cache is None and not isinstance(output, torch.Tensor) else cache
            if hasattr(cache, "__dict__"):
                # In users' decoding loops, each pass is given the prompt mask of its own tokens only.
                setattr(cache, RECORD, Record(stream.prompt()))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)

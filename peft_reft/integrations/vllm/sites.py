"""The edited places of a vLLM model: hooks on its layers and on modules in them, which call one opaque operation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.model_executor.layers.linear import RowParallelLinear

from peft_reft.components import INPUT, OUTPUT
from peft_reft.integrations.vllm.adapters import Place

# hidden, residual (None for zero), name of the place; edits both in place
Edit = Callable[[torch.Tensor, torch.Tensor | None, str], None]


class Target(NamedTuple):
    """A place in every layer: the dotted name of a module in it (empty for the layer itself), and its side."""

    module: str
    side: str


BLOCK_OUTPUT = Target("", OUTPUT)


def find_layers(model: nn.Module, count: int) -> dict[int, nn.Module]:
    """The layers of a model by number, without those in another pipeline stage.

    Raises:
        ValueError: the model does not have exactly one stack of `count` layers.
    """
    stacks = {name: stack for name, stack in _outermost_lists(model) if len(stack) == count}
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} has {'no stack' if not stacks else f'several stacks ({sorted(stacks)})'} of "
            f"{count} layers: the ReFT plug-in edits decoders with one stack of layers."
        )
    (stack,) = stacks.values()
    # Placeholders for layers of other stages have no children.
    return {number: layer for number, layer in enumerate(stack) if next(layer.children(), None) is not None}


def _outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(inside):
            inside += (f"{name}.",)
            yield name, module


def target_of(component: str, layers: dict[int, nn.Module]) -> Target:
    """The module of one of `peft_reft.components.COMPONENTS`.

    Raises:
        ValueError: there is no single module with that output in the layers.
    """
    if component in ("block_output", "block_input"):
        return Target("", INPUT if component == "block_input" else OUTPUT)
    layer = next(iter(layers.values()))
    attention = component == "attention_output"
    found = [
        name
        for name, module in layer.named_modules()
        if isinstance(module, RowParallelLinear) and ("attn" in name or "attention" in name) == attention
    ]
    if len(found) != 1:
        raise ValueError(
            f"component={component!r}: vLLM's {type(layer).__name__} has {found or 'no linear layer'} for it, not one "
            "linear layer that puts it out."
        )
    return Target(found[0], OUTPUT)


def check_target(target: Target, layer: nn.Module, tensor_parallel: int) -> None:
    """Refuse a target that cannot be edited in a layer of vLLM's model.

    Raises:
        ValueError: vLLM has no such module (it fuses some), or each worker has only a part of its output.
    """
    model = type(layer).__name__
    if target.module == "":
        return
    try:
        module = layer.get_submodule(target.module)
    except AttributeError:
        raise ValueError(
            f"vLLM's {model} has no module {target.module!r}: it fuses modules that Transformers keeps apart. Served "
            "are edits of layers, and of the last projections of attention and MLP."
        ) from None
    base = getattr(module, "base_layer", module)
    if target.side == INPUT or not isinstance(base, RowParallelLinear):
        raise ValueError(
            f"vLLM's {target.module!r} in {model} is a {type(base).__name__}, whose {target.side} cannot be edited. "
            "Served are edits of layers, and of the last projections of attention and MLP."
        )
    if tensor_parallel > 1 and not base.reduce_results:
        raise ValueError(
            f"vLLM's {target.module!r} in {model} puts out a part of the sum on each tensor parallel worker, so its "
            "output cannot be edited. Use tensor_parallel_size=1, or edit the layers' output."
        )


def attach(layers: dict[int, nn.Module], targets: Iterable[Target], hidden_size: int, edit: Edit) -> set[str]:
    """Hook modules so that `edit` is called with their outputs (or inputs). Mutates the model's hooks.

    Returns:
        The names of the hooked places.
    """
    names = set()
    # Inputs are hooked first, so that they are edited before later parts of the layer.
    for target in sorted(targets):
        for number, layer in layers.items():
            try:
                module = layer.get_submodule(target.module)
            except AttributeError:
                continue  # hybrid models have attention in some layers only
            name = str(Place(number, target.module, target.side))
            hook = _Hook(name, type(module).__name__, hidden_size, edit)
            if target.side == INPUT:
                module.register_forward_pre_hook(partial(hook.edit_input, _parameters(module)), with_kwargs=True)
            elif target.module:
                module.register_forward_hook(hook.edit_linear)
            else:
                with_residual = "residual" in _parameters(module)
                module.register_forward_hook(hook.edit_pair if with_residual else hook.edit_output)
            names.add(name)
    return names


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


class _Hook:
    """The hooks of one place. vLLM's layers pass the residual stream on as two parts, which add up to it."""

    def __init__(self, name: str, module: str, hidden_size: int, edit: Edit) -> None:
        self.name, self.module, self.hidden_size, self.edit = name, module, hidden_size, edit

    def edit_pair(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not (isinstance(output, tuple) and len(output) == 2):
            self._refuse(output)
        self._edit(*output)

    def edit_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._edit(output, None)

    def edit_linear(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not isinstance(output, tuple):
            output = (output, None)
        if output[1] is not None:
            self._refuse(output)
        self._edit(output[0], None)

    def edit_input(self, parameters: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if "hidden_states" not in given:
            self._refuse(tuple(given))
        self._edit(given["hidden_states"], given.get("residual"))

    def _edit(self, hidden: Any, residual: Any) -> None:
        for part in (hidden, residual):
            whole = isinstance(part, torch.Tensor) and part.dim() == 2 and part.shape[1] == self.hidden_size
            if not whole and not (part is residual and part is None):
                self._refuse((hidden, residual))
        self.edit(hidden, residual, self.name)

    def _refuse(self, value: Any) -> None:
        raise NotImplementedError(
            f"ReFT adapters cannot be served with this model: vLLM's {self.module} has {_described(value)} where "
            f"[tokens, {self.hidden_size}] is edited ({self.name})."
        )


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(list(value.shape))
    return str([_described(part) for part in value]) if isinstance(value, (tuple, list)) else type(value).__name__

"""The parts of a transformer block that can be edited, found by structure and by the names that models share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from inspect import isfunction
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reft.modules import named_base_modules

# Sides of a module that can be edited.
OUTPUT, INPUT = "output", "input"
# Streams of tokens: an encoder-decoder model has both, any other model only the first.
DECODER, ENCODER = "decoder", "encoder"

COMPONENTS = ("block_output", "block_input", "attention_output", "mlp_output")

# Last projections, whose output goes to the residual stream.
_ATTENTION_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "Wo", "o")
_MLP_PROJECTIONS = (
    "down_proj",
    "c_proj",
    "dense_4h_to_h",
    "fc2",
    "fc_out",
    "lin2",
    "wo",
    "Wo",
    "dense",
    "w2",
    "ffn_output",
)
# Name parts of MLPs that may lack a single last projection.
_MLPS = ("mlp", "ffn", "feed_forward", "moe")
_ADDS_UP = "it adds up the outputs of several MLPs, so that no module puts out the sum"
# Name parts of modules before or after an MLP: hyper-connections, convolutions, norms.
_BESIDE_MLPS = "hyper|_hc$|conv|norm"


class Part(NamedTuple):
    """A component of a block: the module's dotted name in the block, the module, and the side that is edited."""

    name: str
    module: nn.Module
    side: str = OUTPUT


def find_component(block: nn.Module, component: str) -> list[Part] | str:
    """One of `COMPONENTS` of a block; the reason, a clause after "because", if the block has none.

    Several where the block is a stage of a vision model, with blocks of its own.

    `attention_output` and `mlp_output` are the outputs of the last projections of the self-attention and of the MLP,
    or of these modules themselves where there is no single last projection (mixtures of experts).
    """
    if component in ("block_output", "block_input"):
        if not has_output(block):
            return "it is a container that is never called"
        return [Part("", block, INPUT if component == "block_input" else OUTPUT)]
    return _attention(block) if component == "attention_output" else _mlp(block)


def has_output(module: nn.Module) -> bool:
    """Whether a module can be called; containers such as `nn.ModuleList` cannot."""
    return type(module).forward is not nn.Module.forward


def _attention(block: nn.Module) -> list[Part] | str:
    found = [Part(name, module) for name, module in _attentions(block)]
    own = [part for part in found if not _is_cross_attention(part)]
    if not own:
        return "it attends to another stack only" if found else "no attention was found in it"
    chosen = own if all(map(_is_in_list, own)) else own[:1]
    return [_last_projection(part) or part for part in chosen]


@cache
def multiplies_itself(attention: type[nn.Module]) -> bool:
    """Whether an attention hands the weights of its projections to torch's function, and calls none of them."""
    methods = (value for cls in attention.__mro__ for value in vars(cls).values() if isfunction(value))
    return any("multi_head_attention_forward" in method.__code__.co_names for method in methods)


def _attentions(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost attention modules."""
    inside: tuple[str, ...] = ()
    for name, module in named_base_modules(block):
        if name.startswith(inside) or not _is_called_attention(module):
            continue
        # A block within the block (Zamba's) may be called after its attention.
        parts = list(module.named_children())
        is_block = any(_is_called_attention(part) for _, part in parts) and any(_is_mlp(*part) for part in parts)
        if not is_block and any(map(is_linear, module.modules())):
            inside += (f"{name}.",)
            yield name, module


def _is_called_attention(module: nn.Module) -> bool:
    return re.search("atten|attn", type(module).__name__, re.IGNORECASE) is not None


def _is_cross_attention(part: Part) -> bool:
    text = f"{part.name}.{type(part.module).__name__}".lower()
    return any(sign in text for sign in ("cross", "encdec", "encoder_attn"))


def _is_in_list(part: Part) -> bool:
    return any(name.isdigit() for name in part.name.split("."))


def _alike(part: Part, other: Part) -> bool:
    """Whether names differ in their places in lists only."""
    return _listless(part.name) == _listless(other.name)


def _listless(name: str) -> list[str]:
    return ["#" if part.isdigit() else part for part in name.split(".")]


def _mlp(block: nn.Module) -> list[Part] | str:
    attentions = tuple(f"{name}." for name, _ in _attentions(block))
    others = ((name, module) for name, module in named_base_modules(block) if not name.startswith(attentions))
    # Some norms learn their scale by an MLP.
    outside = [(name, module) for name, module in others if not re.search(r"norm[^.]*\.", name, re.IGNORECASE)]
    whole = list(_whole_mlps(outside))
    bare = any(name == "experts" for name, _ in outside)
    if bare or any(_has_experts(part.module) for part in whole):
        return whole if len(whole) == 1 and not bare else _ADDS_UP
    if any(part.name.endswith(f"_{other.name}") for part in whole for other in whole):
        # One for text tokens, another for audio tokens (Higgs Audio).
        return _ADDS_UP
    found = [
        Part(name, module)
        for name, module in outside
        if is_linear(module) and name.rpartition(".")[2] in _MLP_PROJECTIONS
    ]
    if found:
        return [part for part in found if _alike(part, found[-1])]
    if any(not _alike(part, whole[0]) for part in whole):
        return f"it has several MLPs ({', '.join(part.name for part in whole)})"
    return whole or "no MLP was found in it"


def _whole_mlps(modules: list[tuple[str, nn.Module]]) -> Iterator[Part]:
    """The outermost of some modules that are MLPs, by their names or because they hold experts."""
    inside: tuple[str, ...] = ()
    holders = {name.rpartition(".")[0] for name, _ in modules if name.rpartition(".")[2] == "experts"}
    for name, module in modules:
        if not name.startswith(inside) and (name in holders or _is_mlp(name.rpartition(".")[2], module)):
            inside += (f"{name}.",)
            yield Part(name, module)


def _is_mlp(name: str, module: nn.Module) -> bool:
    if not any(word in name for word in _MLPS) or re.search(_BESIDE_MLPS, name):
        return False
    # Packed and quantized weights may have no axes to tell them from biases.
    matrices = sum(parameter.dim() > 1 for parameter in module.parameters())
    return _has_experts(module) or matrices > 1 or sum(map(is_linear, module.modules())) > 1


def _has_experts(module: nn.Module) -> bool:
    return any(part.rpartition(".")[2] == "experts" for part, _ in module.named_modules())


def _last_projection(attention: Part) -> Part | None:
    if multiplies_itself(type(attention.module)):
        return None
    found = [
        Part(f"{attention.name}.{name}", linear)
        for name, linear in named_base_modules(attention.module)
        if is_linear(linear) and name.rpartition(".")[2] in _ATTENTION_PROJECTIONS
    ]
    return found[-1] if found else None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer."""
    # Quantized layers are subclasses, or have both widths too.
    if isinstance(module, BaseTunerLayer):
        return hasattr(module, "base_layer") and is_linear(module.get_base_layer())
    return isinstance(module, (nn.Linear, Conv1D)) or (
        hasattr(module, "in_features") and hasattr(module, "out_features") and next(module.children(), None) is None
    )

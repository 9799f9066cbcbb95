"""The parts of a transformer block that can be edited, found by structure and by the names that models share."""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reft.modules import named_base_modules

# What of a module is edited.
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
# Parts of the names of modules without a single last projection.
_MLPS = ("mlp", "ffn", "feed_forward", "moe")


def find_component(block: nn.Module, component: str) -> tuple[str, nn.Module, str] | None:
    """Name in the block, module and edited side of one of `COMPONENTS`; None if the block has no such part.

    `attention_output` and `mlp_output` are the outputs of the last projections of the self-attention and of the MLP,
    or of these modules themselves where there is no single last projection (mixtures of experts).
    """
    if component in ("block_output", "block_input"):
        return ("", block, INPUT if component == "block_input" else OUTPUT) if has_output(block) else None
    found = _attention(block) if component == "attention_output" else _mlp(block)
    return None if found is None else (*found, OUTPUT)


def has_output(module: nn.Module) -> bool:
    """Whether a module can be called; containers such as `nn.ModuleList` cannot."""
    return type(module).forward is not nn.Module.forward


def _attention(block: nn.Module) -> tuple[str, nn.Module] | None:
    for name, module in _attentions(block):
        if not _is_cross_attention(name, module):
            return _last_projection(name, module, _ATTENTION_PROJECTIONS) or (name, module)
    return None


def _attentions(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost attention modules."""
    inside: tuple[str, ...] = ()
    for name, module in named_base_modules(block):
        if name.startswith(inside):
            continue
        called_so = re.search("atten|attn", type(module).__name__, re.IGNORECASE)
        if called_so and any(_is_linear(part) for part in module.modules()):
            inside += (f"{name}.",)
            yield name, module


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    text = f"{name}.{type(module).__name__}".lower()
    return any(sign in text for sign in ("cross", "encdec", "encoder_attn"))


def _mlp(block: nn.Module) -> tuple[str, nn.Module] | None:
    attentions = tuple(f"{name}." for name, _ in _attentions(block))
    parts = [(name, module) for name, module in block.named_children() if not f"{name}.".startswith(attentions)]
    whole = [(name, module) for name, module in parts if any(word in name for word in _MLPS) and len(module._modules)]
    if any(_has_experts(module) for _, module in parts) or any(name == "experts" for name, _ in parts):
        # With another MLP beside it the block adds up: no module puts out the sum.
        return whole[0] if len(whole) == 1 and _has_experts(whole[0][1]) else None
    found = [
        (name, module)
        for name, module in named_base_modules(block)
        if _is_linear(module) and name.rpartition(".")[2] in _MLP_PROJECTIONS and not name.startswith(attentions)
    ]
    if found:
        return found[-1]
    return whole[0] if len(whole) == 1 else None


def _has_experts(module: nn.Module) -> bool:
    return any(part.rpartition(".")[2] == "experts" for part, _ in module.named_modules())


def _last_projection(name: str, module: nn.Module, names: tuple[str, ...]) -> tuple[str, nn.Module] | None:
    found = [
        (f"{name}.{part}", linear)
        for part, linear in named_base_modules(module)
        if _is_linear(linear) and part.rpartition(".")[2] in names
    ]
    return found[-1] if found else None


def _is_linear(module: nn.Module) -> bool:
    # Quantized layers are subclasses, or have both widths too.
    if isinstance(module, BaseTunerLayer):
        return hasattr(module, "base_layer") and _is_linear(module.get_base_layer())
    return isinstance(module, (nn.Linear, Conv1D)) or (
        hasattr(module, "in_features") and hasattr(module, "out_features") and next(module.children(), None) is None
    )

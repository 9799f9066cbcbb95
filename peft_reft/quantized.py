"""Keeps the 4-bit layers of bitsandbytes differentiable on a CPU.

On CPUs with AVX512-BF16, a `Linear4bit` in evaluation mode repacks its weights in place for a kernel without a
gradient, at the first input that needs no gradient (bitsandbytes 0.50). It never unpacks them for training: later
passes seem to work, but no gradient flows through the layer, and `state_dict()` can mix up the scales.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

PACKS = "support_avx512bf16_for_cpu"
_PACKED_BEFORE = "_reft_packed_before"


def forbid_packing(model: nn.Module) -> None:
    """Keep 4-bit layers from repacking their weights, and unpack those that have done so. Mutates the layers.

    Packing loses precision for good: it rounds the scale of every block of weights (64 by default) to bfloat16.

    Raises:
        RuntimeError: weights are packed, and this version of bitsandbytes has no function that unpacks them.
    """
    packed = []
    for module in model.modules():
        if getattr(module, PACKS, False):
            setattr(module, PACKS, False)
            setattr(module, _PACKED_BEFORE, True)
        if getattr(_quant_state(module), "packing_format_for_cpu", False):
            packed.append(module)
    for module in packed:
        _unpack(module)
    if packed:
        warnings.warn(
            f"The base model was evaluated before it got this adapter, and bitsandbytes repacked {len(packed)} of its "
            "4-bit layers for a kernel without gradients. They are unpacked again, but their scales stay rounded to "
            "bfloat16. For the exact weights load the model again and add the adapter before the first evaluation.",
            stacklevel=2,
        )


def allow_packing(model: nn.Module) -> None:
    """Undo `forbid_packing`: layers may repack their weights again. Mutates the layers."""
    for module in model.modules():
        if module.__dict__.pop(_PACKED_BEFORE, False):
            setattr(module, PACKS, True)


def _quant_state(module: nn.Module) -> object | None:
    return getattr(module._parameters.get("weight"), "quant_state", None)


@torch.no_grad()
def _unpack(module: nn.Module) -> None:
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked
    except ImportError as error:
        raise RuntimeError(
            "bitsandbytes has repacked the model's 4-bit weights for a kernel without gradients, and this version "
            "cannot unpack them. Load the model again and add the adapter before the first evaluation."
        ) from error
    weight, state = module.weight, module.weight.quant_state
    # Otherwise `unpacked` would quantize the rounded scales again, or leave them transposed if they were not
    # quantized before. They are stored as [blocks of a row, rows].
    state.original_nested = False
    weight.data, state = unpacked(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    state.offset = state.state2 = None

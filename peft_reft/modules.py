"""Module traversal that skips adapters, which may number in the hundreds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like `model.named_modules()`, but yields adapter layers and the modules they wrap, not their adapters."""
    waiting, seen = [("", model)], set()
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        for child, part in reversed(module._modules.items()):
            if part is not None and (child == "base_layer" or not isinstance(module, BaseTunerLayer)):
                waiting.append((f"{name}.{child}" if name else child, part))


def named_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the base model without the model itself; wrappers stand for the modules they wrap."""
    inside: tuple[str, ...] = ()
    for name, module in named_modules(model):
        adapter = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        wraps = isinstance(module, AuxiliaryTrainingWrapper) or hasattr(module, "base_layer")
        if name and not name.startswith(inside) and (wraps or not adapter):
            yield name, module
        if adapter:
            inside += (f"{name}.",)


def modules_around(module: nn.Module) -> Iterator[nn.Module]:
    """Like `module.modules()`, but does not descend into adapter layers."""
    waiting = [module]
    while waiting:
        module = waiting.pop()
        yield module
        if not isinstance(module, BaseTunerLayer):
            waiting.extend(reversed(list(module.children())))


def device_of(module: nn.Module) -> torch.device:
    """The device that a module computes on, according to Accelerate's hooks if it has any; the CPU without tensors."""
    hook_devices = (getattr(getattr(m, "_hf_hook", None), "execution_device", None) for m in modules_around(module))
    device = next((device for device in hook_devices if device is not None), None)
    if device is not None:
        return torch.device(device)
    tensors = (t for m in modules_around(module) for t in (*m._parameters.values(), *m._buffers.values()))
    return next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))

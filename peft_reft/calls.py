"""Warns once of sites that an adapter edits but the model never calls."""

from __future__ import annotations

import re
import warnings

import torch
from torch import nn

from peft_reft.modules import modules_around
from peft_reft.tokens.passes import Pass, Untold

_NEVER_CALLED = (
    "{0} did not call {1} in this pass, so the ReFT adapters there have no effect: the model skips these modules, "
    "calls their forward or uses their weights. Choose other modules with target_modules. This warning appears once."
)
_PAST_THE_HEAD = (
    "The loss was computed without a call of {0}, so the ReFT adapter there is not trained: fused heads (TRL's SFT, "
    "Liger) multiply by the weight themselves. Edit the output of the last block instead (layers_to_transform=-1)."
)


def groups_of_layers(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The ReFT layers of a model, grouped where their sites differ only in numbers, as for experts and blocks."""
    groups: dict[str, list[nn.Module]] = {}
    for layer in modules_around(model):
        if hasattr(layer, "site_name"):
            name = re.sub(r"\d+", "#", layer.site_name)
            groups.setdefault(f"{type(layer.host).__name__} {layer.side} {name}", []).append(layer)
    return groups


def say_uncalled(model: nn.Module, pass_: Pass, uncalled: dict[str, list[nn.Module]]) -> None:
    """Warn of groups of layers that a pass through `model` did not call. Removes the groups that are settled.

    Args:
        model: the model.
        pass_: a pass that has ended.
        uncalled: the groups that no pass has called yet, changed in place.

    Raises:
        ValueError: the model computes a loss from the weight of an edited output embedding without calling it.
    """
    for group, layers in list(uncalled.items()):
        if pass_.called.isdisjoint(layers):
            if not any(_selects(pass_, layer) for layer in layers):
                continue
            names = ", ".join(repr(layer.site_name) for layer in layers[:3]) + (", ..." if layers[3:] else "")
            if layers[0].host is _output_embeddings(model) and torch.is_grad_enabled():
                raise ValueError(_PAST_THE_HEAD.format(names))
            warnings.warn(_NEVER_CALLED.format(type(model).__name__, names), stacklevel=2)
        del uncalled[group]


def _selects(pass_: Pass, layer: nn.Module) -> bool:
    """Whether the adapters at a layer edit a token in a pass."""
    stream = pass_.streams.get(layer.stream)
    if stream is None:
        return False
    specs = [edit.positions for edit in layer.current_edits().values()]
    return any(isinstance(stream, Untold) or bool(stream.grid(spec).any()) for spec in specs)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

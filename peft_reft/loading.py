"""Checks that the weights that a model is about to load fit its adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peft_reft.layer import CHILD_NAMES

# SITE.reft.reft_intervention.ADAPTER.PARAMETER. PEFT omits the adapter where the model has no such parameter.
_KEY = re.compile(
    rf"(?P<site>.+)\.(?:{'|'.join(CHILD_NAMES.values())})\.reft_intervention\.((?P<adapter>[^.]+)\.)?(?P<parameter>[^.]+)"
)

_OTHER_SITES = (
    "The weights of {adapter} include edits of {sites}, which it does not edit in this {model}; these weights are left "
    "out. The adapter was trained for another model (more layers, other module names) or with another configuration."
)
_OTHER_PARAMETERS = (
    "The weights of {adapter} do not fit its configuration: at {site!r} they hold {names}, which the configured "
    "intervention does not have. The adapter_config.json belongs to another adapter, or its `intervention` was changed."
)
_OTHER_SHAPE = (
    "The weights of {adapter} do not fit: {name!r} has shape {found} where this model needs {wanted}. Either the "
    "adapter was trained for a base model of another hidden size, or its adapter_config.json was changed "
    "(intervention, r, positions, share_weights)."
)


def check_weights(model: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: warn of weights without a parameter in the model, which PEFT silently drops.

    Raises:
        ValueError: weights do not fit the intervention, the rank, the units or the hidden size of their adapter.
    """
    found = {
        key.removeprefix(prefix): match
        for key in state_dict
        if key.startswith(prefix) and (match := _KEY.fullmatch(key, len(prefix)))
    }
    if not found:
        return
    places = {name: _parameter(model, name) for name in found}
    fitting = [match for name, match in found.items() if places[name] is not None]
    adapters, edited = {match["adapter"] for match in fitting}, {match["site"] for match in fitting}
    adapter = f"adapter {next(iter(adapters))!r}" if len(adapters) == 1 else "an adapter"
    strange: dict[str, list[str]] = {}
    for name, match in found.items():
        place, weight = places[name], state_dict[prefix + name]
        if place is None:
            if match["adapter"] is None or match["adapter"] in adapters:
                strange.setdefault(match["site"], []).append(match["parameter"])
        # Parameters that DeepSpeed shards over processes look empty.
        elif place.numel() and place.shape != weight.shape:
            shapes = {"found": tuple(weight.shape), "wanted": tuple(place.shape)}
            raise ValueError(_OTHER_SHAPE.format(adapter=adapter, name=name, **shapes))
    for site in (site for site in strange if site in edited):
        names = " and ".join(map(repr, strange[site]))
        raise ValueError(_OTHER_PARAMETERS.format(adapter=adapter, site=site, names=names))
    if strange:
        sites = ", ".join(map(repr, list(strange)[:3])) + (", ..." if len(strange) > 3 else "")
        warnings.warn(_OTHER_SITES.format(adapter=adapter, sites=sites, model=type(model).__name__), stacklevel=2)


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None

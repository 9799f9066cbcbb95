"""Adds adapters: a new adapter whose edit is the weighted sum of the edits of others."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_reft.autograd import orthonormal_rows
from peft_reft.edits import finite
from peft_reft.interventions import LowRankIntervention, RedIntervention
from peft_reft.layer import ReftLayer, layers
from peft_reft.steering import configs_of, layers_with

# Subspaces with a larger cosine between two directions count as overlapping: above the noise of float32.
_OVERLAP = 1e-3


def add_weighted_adapter(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Add an adapter whose edit is the weighted sum of the edits of others, exactly.

    All edits of the sum see the same hidden representation, unlike adapters that are active together, which edit one
    after the other. If the subspaces are orthogonal, no adapter changes the coordinates of another, and the sum does
    what each adapter does; otherwise a warning says so. The new adapter is a `nodireft` adapter whose rank is the sum
    of their ranks (a `red` one for RED adapters). It includes their current strengths and switched off subspaces.
    Mutates the model.

    Args:
        model: a PEFT model, or a model that the adapters were added to or injected into.
        adapters: names of adapters that edit the same tokens at the same places.
        weights: factor of each.
        adapter_name: name of the new adapter, which is not active at first.

    Raises:
        TypeError: a weight is no number.
        ValueError: a weight is not finite, or the adapters cannot be added; the message says why.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"One weight for each adapter is needed, got {list(adapters)} and {list(weights)}.")
    weights = [finite("a weight", weight) for weight in weights]
    configs = configs_of(model)
    if adapter_name in configs:
        raise ValueError(f"There is an adapter {adapter_name!r} already.")
    places = [layers_with(model, name) for name in adapters]
    _check_addable(adapters, places, configs)
    low_rank = isinstance(places[0][0].reft_intervention[adapters[0]], LowRankIntervention)
    _inject(model, adapter_name, _sum_of([configs[name] for name in adapters], low_rank))
    for layer in places[0]:
        (_add_low_rank if low_rank else _add_red)(layer, adapters, weights, adapter_name)
    if low_rank:
        _warn_of_overlap(places[0], adapters)


def _sum_of(configs: Sequence[PeftConfig], low_rank: bool) -> PeftConfig:
    return dataclasses.replace(
        configs[0],
        intervention="nodireft" if low_rank else "red",
        r=sum(config.r for config in configs) if low_rank else configs[0].r,
        use_bias=any(config.use_bias for config in configs),
        act_fn=None,
        dropout=0.0,
        subspaces=None,
        freeze_subspace=False,
        init_weights=True,
    )


def _inject(model: nn.Module, adapter_name: str, config: PeftConfig) -> None:
    """Add a new adapter to a model, without making it active."""
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if isinstance(tuner, BaseTuner):
        tuner.peft_config[adapter_name] = config
        try:
            tuner.inject_adapter(tuner.model, adapter_name)
        except Exception:
            del tuner.peft_config[adapter_name]
            raise
        return
    active = next(layer.active_adapters for layer in layers(model))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, adapter_name)
    for layer in layers(model):
        layer.set_adapter(active, config.inference_mode)


def _check_addable(adapters: Sequence[str], places: list[list[ReftLayer]], configs: dict[str, PeftConfig]) -> None:
    name, first = adapters[0], configs[adapters[0]]
    for other, layers_of_other in zip(adapters, places, strict=True):
        config = configs[other]
        if config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"Adapter {other!r} trains whole modules or tokens (modules_to_save, trainable_token_indices), which "
                "cannot be added."
            )
        if config.parsed_positions != first.parsed_positions:
            raise ValueError(f"Adapters {name!r} and {other!r} edit different tokens (positions, share_weights).")
        if layers_of_other != places[0]:
            raise ValueError(f"Adapters {name!r} and {other!r} edit different layers or modules.")
        for layer in layers_of_other:
            intervention = layer.reft_intervention[other]
            if not intervention.affine:
                raise ValueError(f"Adapter {other!r} has act_fn={config.act_fn!r}: its edits cannot be scaled.")
            if not isinstance(intervention, (LowRankIntervention, RedIntervention)) or (
                intervention.low_rank != layer.reft_intervention[name].low_rank
            ):
                raise ValueError(f"{first.intervention!r} and {config.intervention!r} have no common form.")


@torch.no_grad()
def _add_low_rank(layer: ReftLayer, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    new = layer.reft_intervention[adapter_name]
    left, right, bias = [], [], []
    for name, weight in zip(adapters, weights, strict=True):
        settings, factors = layer.reft_settings[name], layer.reft_intervention[name].factors()
        scale = torch.full_like(factors.bias[0], weight * settings.strength)
        if settings.coordinates is not None:
            scale = scale * settings.coordinates.to(scale.device)
        left.append(factors.left)
        right.append(torch.zeros_like(factors.left) if factors.right is None else scale[:, None] * factors.right)
        bias.append(scale * factors.bias)
    new.projection.copy_(torch.cat(left, dim=1))
    new.weight.copy_(torch.cat(right, dim=1))
    if new.bias is not None:
        new.bias.copy_(torch.cat(bias, dim=1))


@torch.no_grad()
def _add_red(layer: ReftLayer, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    new = layer.reft_intervention[adapter_name]
    for name, weight in zip(adapters, weights, strict=True):
        own, factor = layer.reft_intervention[name], weight * layer.reft_settings[name].strength
        new.scale.add_(factor * (own.scale - 1))
        if new.bias is not None:
            new.bias.add_(factor * own.shift)


def _warn_of_overlap(places: Sequence[ReftLayer], adapters: Sequence[str]) -> None:
    worst, where = 0.0, ("", "", "")
    for layer in places:
        with torch.no_grad():
            rows = [orthonormal_rows(layer.reft_intervention[name].projection.float()) for name in adapters]
        for i, first in enumerate(rows):
            for j, second in enumerate(rows[:i]):
                cosine = torch.linalg.matrix_norm(first @ second.mT, ord=2).max().item()
                if cosine > worst:
                    worst, where = cosine, (adapters[j], adapters[i], layer.site_name)
    if worst > _OVERLAP:
        warnings.warn(
            f"The subspaces of adapters {where[0]!r} and {where[1]!r} are not orthogonal: at {where[2]!r} the cosine "
            f"of the smallest angle between them is {worst:.3f}. Their edits are added, but each changes what the "
            "other wrote.",
            stacklevel=3,
        )

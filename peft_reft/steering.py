"""Functions that scale, read and set the edits of adapters, on any model that carries ReFT adapters.

The model may be a PEFT model, a model with adapters from Transformers' `add_adapter` or PEFT's
`inject_adapter_in_model`, or a module around one. `ReftModel`, and a PEFT model around it, have the same functions as
methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftConfig
from torch import nn

from peft_reft.autograd import orthonormal_rows
from peft_reft.edits import AdapterSettings, finite
from peft_reft.interventions import LobireftIntervention, LowRankIntervention
from peft_reft.layer import ReftLayer, layers


def set_strength(model: nn.Module, adapter_name: str, strength: float) -> None:
    """Scale the edits of an adapter. Mutates the model; the strength is not saved with the adapter.

    Args:
        model: see above.
        adapter_name: the adapter.
        strength: factor of its edits: 0 is the base model exactly, 1 the adapter as trained, more extrapolates.

    Raises:
        TypeError: `strength` is no number.
        ValueError: it is not finite, there is no such adapter, or it is merged.
    """
    value = finite("strength", strength)
    for layer in _unmerged_layers_with(model, adapter_name):
        layer.set_scale(adapter_name, value)


def get_strength(model: nn.Module, adapter_name: str) -> float:
    """The factor of an adapter's edits, 1 unless it was set.

    Raises:
        ValueError: there is no such adapter, or its layers have different factors (`ReftLayer.set_scale`).
    """
    found = {layer.site_name: layer.scaling[adapter_name] for layer in layers_with(model, adapter_name)}
    if len(set(found.values())) > 1:
        raise ValueError(f"Adapter {adapter_name!r} has no single strength: its layers have {found}.")
    return next(iter(found.values()))


@contextmanager
def rescaled(model: nn.Module, adapter_name: str, strength: float) -> Iterator[None]:
    """`set_strength` within a `with` block, in which adapters may be added and deleted; same arguments and errors."""
    # The settings objects, not the name: at the end the adapter may be deleted, or its name reused.
    before = [(settings, settings.strength) for settings in _settings_of(model, adapter_name)]
    set_strength(model, adapter_name, strength)
    try:
        yield
    finally:
        for settings, value in before:
            settings.strength = value


def set_subspaces(model: nn.Module, adapter_name: str, names: str | Sequence[str] | None) -> None:
    """Edit (and train) only the named `subspaces` of an adapter, from now on. Mutates the model, not what is saved.

    If a method has orthonormal rows, all subspaces share one frame: its later rows are orthogonalized against the
    earlier ones, in alphabetical order of the names. So training one subspace rotates the subspaces after it, but not
    those before it. To keep the latter fixed, use a new optimizer for each subspace, without weight decay: momentum and
    decay move parameters whose gradients are zero.

    Args:
        model: see above.
        adapter_name: the adapter.
        names: names in the config's `subspaces`; None for all of them.

    Raises:
        ValueError: there is no such adapter, it is merged, or it has no such subspace.
    """
    chosen = [names] if isinstance(names, str) else names
    settings_of_all = [layer.reft_settings[adapter_name] for layer in _unmerged_layers_with(model, adapter_name)]
    known = settings_of_all[0].subspaces
    if unknown := sorted({*(chosen or ())} - set(known)):
        raise ValueError(f"Adapter {adapter_name!r} has no subspace {unknown[0]!r}; it has {sorted(known)}.")
    if chosen is not None and not known:
        raise ValueError(f"Adapter {adapter_name!r} has no named subspaces (ReftConfig(subspaces=...)).")
    for settings in settings_of_all:
        settings.coordinates = None if chosen is None else settings.mask(chosen)


@contextmanager
def use_subspaces(model: nn.Module, adapter_name: str, names: str | Sequence[str] | None) -> Iterator[None]:
    """`set_subspaces` within a `with` block, in which adapters may be added and deleted; same arguments and errors."""
    before = [(settings, settings.coordinates) for settings in _settings_of(model, adapter_name)]
    set_subspaces(model, adapter_name, names)
    try:
        yield
    finally:
        for settings, coordinates in before:
            settings.coordinates = coordinates


def projection(model: nn.Module, adapter_name: str, layer: int | str) -> torch.Tensor:
    """The whole subspace that an adapter edits at a layer, as orthonormal rows: `R` in the papers.

    The named `subspaces` of the config are its rows in alphabetical order:
    `projection(...)[config.coordinates[name]]`.

    Args:
        model: see above.
        adapter_name: the adapter.
        layer: number of the block, from the end if negative, or the name of the edited module (or its ending).

    Returns:
        float32 `[r, d]`; `[units, r, d]` with `share_weights=False`. For methods without orthonormal rows it is an
        orthonormal basis of their span.

    Raises:
        ValueError: no such adapter or layer, several edited modules at that layer, or a method without a subspace.
    """
    intervention = _low_rank(adapter_name, _layer(model, adapter_name, layer))
    with torch.no_grad():
        rows = orthonormal_rows(intervention.projection.float())
    return rows[0] if len(rows) == 1 else rows


def set_directions(
    model: nn.Module, adapter_name: str, directions: Mapping[int | str, torch.Tensor], trainable: bool = False
) -> None:
    """Have an adapter edit known directions: differences of means, probes, dictionary features. Mutates the model.

    `W` and `b` are reset, so most methods change nothing until they are trained. `lobireft` adds the sum of the
    directions, not normalized, times the strength: with a difference of means, strength 1 moves a representation by the
    distance between the two means. `consreft` removes the directions. Layers without directions do not change.

    Args:
        model: see above.
        adapter_name: the adapter.
        directions: layer, as in `projection` -> `[r, d]` (`[d]` for one direction), linearly independent, or
            `[units, r, d]`.
        trainable: whether training may rotate the adapter's subspaces, at all of its layers; if not,
            `freeze_subspace` is set, and only `W` and `b` are learned.

    Raises:
        TypeError: `directions` does not map layers to tensors.
        ValueError: no such adapter or layer, a merged adapter, or directions that cannot span the adapter's
            subspace.
    """
    places = _unmerged_layers_with(model, adapter_name)
    _check_mapping(directions)
    chosen = {layer: _layer(model, adapter_name, layer) for layer in directions}
    for key, layer in chosen.items():
        _check_directions(_low_rank(adapter_name, layer).projection, directions[key], key)
    for key, layer in chosen.items():
        _set_projection(layer.reft_intervention[adapter_name], directions[key])
    if (config := configs_of(model).get(adapter_name)) is not None:
        config.freeze_subspace = not trainable
    for layer in places:
        layer.reft_settings[adapter_name].freeze_subspace = not trainable
        intervention = _low_rank(adapter_name, layer)
        learned = any(p.requires_grad for p in intervention.parameters())
        intervention.projection.requires_grad_(trainable and learned)


def configs_of(model: nn.Module) -> dict[str, PeftConfig]:
    """Name -> configuration of the adapters on a model, of all PEFT methods; empty for a module around a model."""
    return getattr(model, "peft_config", {})


def layers_with(model: nn.Module, adapter_name: str) -> list[ReftLayer]:
    """The layers of a model that have an adapter.

    Raises:
        ValueError: there is no such ReFT adapter.
    """
    known = sorted({name for layer in layers(model) for name in layer.reft_intervention})
    if adapter_name not in known:
        raise ValueError(f"There is no ReFT adapter {adapter_name!r}; the model has {known}.")
    return [layer for layer in layers(model) if adapter_name in layer.reft_intervention]


def _settings_of(model: nn.Module, adapter_name: str) -> list[AdapterSettings]:
    return [layer.reft_settings[adapter_name] for layer in layers_with(model, adapter_name)]


def _unmerged_layers_with(model: nn.Module, adapter_name: str) -> list[ReftLayer]:
    found = layers_with(model, adapter_name)
    for layer in found:
        layer.check_unmerged(adapter_name)
    return found


def _layer(model: nn.Module, adapter_name: str, layer: int | str) -> ReftLayer:
    candidates = layers_with(model, adapter_name)
    found = [
        place
        for place in candidates
        if (place.is_in(layer) if isinstance(layer, int) else f".{place.site_name}".endswith(f".{layer}"))
    ]
    if len(found) != 1:
        names = ", ".join(repr(place.site_name) for place in (found or candidates))
        problem = "is edited in several places" if found else "is not edited"
        raise ValueError(f"Layer {layer!r} {problem} by adapter {adapter_name!r}; name one of {names}.")
    return found[0]


def _low_rank(adapter_name: str, layer: ReftLayer) -> LowRankIntervention:
    intervention = layer.reft_intervention[adapter_name]
    if not isinstance(intervention, LowRankIntervention):
        raise ValueError(
            f"Adapter {adapter_name!r} ({type(intervention).__name__}) edits each coordinate separately, not a "
            "subspace."
        )
    return intervention


def _check_mapping(directions: Mapping[int | str, torch.Tensor]) -> None:
    if not isinstance(directions, Mapping):
        what = f"a tensor {tuple(directions.shape)}" if isinstance(directions, torch.Tensor) else repr(directions)[:80]
        raise TypeError(f"directions must map layers to tensors, such as {{10: direction}}, got {what}.")
    for layer, value in directions.items():
        if isinstance(layer, bool) or not isinstance(layer, (int, str)):
            raise TypeError(f"directions must map layers to tensors, but a {type(layer).__name__} is no layer.")
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"directions of layer {layer!r} must be a tensor, got {type(value).__name__}.")


def _check_directions(projection: torch.Tensor, directions: torch.Tensor, layer: int | str) -> None:
    given = directions[None] if directions.dim() == 1 else directions
    shape = tuple(projection.shape)
    if tuple(given.shape) not in (shape, shape[1:]):
        raise ValueError(
            f"directions of layer {layer!r} are {tuple(directions.shape)}, but the adapter's subspace there is "
            f"{shape[1:]}: r directions of the hidden size."
        )
    unit = torch.nn.functional.normalize(given.double().cpu(), dim=-1)
    if not torch.isfinite(given).all() or (torch.linalg.matrix_rank(unit) < shape[1]).any():
        raise ValueError(f"directions of layer {layer!r} are not finite, or not linearly independent.")


@torch.no_grad()
def _set_projection(intervention: LowRankIntervention, directions: torch.Tensor) -> None:
    intervention.projection.copy_(directions)
    intervention.reset_edit()
    if isinstance(intervention, LobireftIntervention):
        rows = intervention.subspace()
        total = intervention.projection.to(rows.dtype).sum(-2, keepdim=True)
        intervention.bias.copy_((rows * total).sum(-1))

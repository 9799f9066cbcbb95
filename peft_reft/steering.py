"""What is done with an adapter as a subspace: read it, set it, scale it, switch parts of it, add it to others."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real

import torch

from peft_reft.autograd import orthonormal_rows
from peft_reft.interventions import LobireftIntervention, LowRankIntervention, RedIntervention
from peft_reft.layer import AdapterSettings, ReftLayer, layers

# Cosine between two directions from which on subspaces count as overlapping: above the noise of float32.
_OVERLAP = 1e-3


class SteeringMixin:
    """The methods of `ReftModel` that steer. A `PeftModel` around it hands them on: `model.set_strength("a", 0.5)`."""

    def set_strength(self, adapter: str, strength: float) -> None:
        """Scale the edits of an adapter: 0 is the base model exactly, 1 the adapter as trained, more extrapolates.

        Not saved with the adapter.

        Raises:
            TypeError: `strength` is no number.
            ValueError: it is not finite, there is no such adapter, or it is merged.
        """
        value = _finite("strength", strength)
        for layer in self._unmerged_layers_with(adapter):
            layer.reft_settings[adapter].strength = value

    @contextmanager
    def strength(self, adapter: str, strength: float) -> Iterator[None]:
        """`set_strength` for the length of a `with` block; adapters may come and go in it."""
        # The settings themselves: by its name, an adapter may be gone at the end, or be another one.
        before = [(settings, settings.strength) for settings in self._settings_of(adapter)]
        self.set_strength(adapter, strength)
        try:
            yield
        finally:
            for settings, value in before:
                settings.strength = value

    def set_subspaces(self, adapter: str, names: str | Sequence[str] | None) -> None:
        """Edit (and train) only the named ones of an adapter's `subspaces`, from now on; None for all of them.

        Not saved with the adapter. Where a method has orthonormal rows, all subspaces share one frame, whose later rows
        are orthogonalized against the earlier ones, in alphabetical order of their names. So training one subspace
        turns those after it, and leaves those before it as they are. For the latter take a new optimizer for each,
        without weight decay: momentum and decay move parameters whose gradients are zero.

        Raises:
            ValueError: there is no such adapter, it is merged, or it has no such subspace.
        """
        known = self.peft_config[adapter].subspaces or {} if adapter in self.peft_config else {}
        layers_with = self._unmerged_layers_with(adapter)
        unknown = sorted({*([names] if isinstance(names, str) else names or ())} - set(known))
        if unknown:
            raise ValueError(f"Adapter {adapter!r} has no subspace {unknown[0]!r}; it has {sorted(known)}.")
        for layer in layers_with:
            settings = layer.reft_settings[adapter]
            settings.coordinates = (
                None if names is None else settings.mask([names] if isinstance(names, str) else names)
            )

    @contextmanager
    def only_subspaces(self, adapter: str, names: str | Sequence[str] | None) -> Iterator[None]:
        """`set_subspaces` for the length of a `with` block; adapters may come and go in it."""
        before = [(settings, settings.coordinates) for settings in self._settings_of(adapter)]
        self.set_subspaces(adapter, names)
        try:
            yield
        finally:
            for settings, coordinates in before:
                settings.coordinates = coordinates

    def subspace(self, adapter: str, layer: int | str) -> torch.Tensor:
        """The subspace that an adapter edits at a layer, as orthonormal rows.

        Args:
            adapter: its name.
            layer: number of the block, from the end if negative, or the name of the edited module (or its ending).

        Returns:
            float32 `[r, d]`; `[units, r, d]` when the words of `positions` have weights of their own. `R` of the
            papers; of methods without orthonormal rows an orthonormal basis of the span.

        Raises:
            ValueError: no such adapter or layer, several places at that layer, or a method without a subspace.
        """
        intervention = self._low_rank(adapter, self._layer(adapter, layer))
        with torch.no_grad():
            rows = orthonormal_rows(intervention.projection.float())
        return rows[0] if len(rows) == 1 else rows

    def set_directions(
        self, adapter: str, directions: Mapping[int | str, torch.Tensor], trainable: bool = False
    ) -> None:
        """Let an adapter edit known directions: differences of means, probes, dictionary features.

        `W` and `b` start afresh, so that most methods change nothing until they are trained. `lobireft` adds the sum of
        the directions as they are, times the strength; `consreft` removes them. Layers without directions stay.

        Args:
            adapter: its name.
            directions: layer, as in `subspace` -> `[r, d]` (`[d]` for one direction), linearly independent, or
                `[units, r, d]`.
            trainable: whether training may turn the subspaces of the adapter, at all of its layers; if not,
                `freeze_subspace` is set, and only `W` and `b` are learned.

        Raises:
            ValueError: no such adapter or layer, a merged adapter, or directions that cannot span the adapter's
                subspace.
        """
        places = self._layers_with(adapter)
        self._unmerged_layers_with(adapter)
        chosen = {layer: self._layer(adapter, layer) for layer in directions}
        for key, layer in chosen.items():
            _check_directions(self._low_rank(adapter, layer).projection, directions[key], key)
        for key, layer in chosen.items():
            _set_projection(layer.reft_intervention[adapter], directions[key])
        self.peft_config[adapter].freeze_subspace = not trainable
        for layer in places:
            layer.reft_settings[adapter].freeze_subspace = not trainable
            intervention = self._low_rank(adapter, layer)
            intervention.projection.requires_grad_(trainable and intervention.bias.requires_grad)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose edit is the weighted sum of the edits of others, exactly.

        All edits of the sum see the same hidden representation, unlike adapters that are active together, which edit
        one after the other. Where their subspaces are orthogonal they do not touch each other's coordinates, and the
        sum does what each of them does; where they are not, a warning says so. The new adapter is a `nodireft` one
        whose rank is the sum of theirs (a `red` one of RED adapters); strengths and switched off subspaces count.

        Args:
            adapters: names of adapters that edit the same tokens at the same places.
            weights: factor of each.
            adapter_name: name of the new adapter, which is not active at first.

        Raises:
            TypeError: a weight is no number.
            ValueError: a weight is not finite, or adapters that cannot be added; the message says why.
        """
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"One weight for each adapter is needed, got {list(adapters)} and {list(weights)}.")
        weights = [_finite("a weight", weight) for weight in weights]
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already.")
        places = [self._layers_with(name) for name in adapters]
        self._check_addable(adapters, places)
        first = self.peft_config[adapters[0]]
        low_rank = isinstance(places[0][0].reft_intervention[adapters[0]], LowRankIntervention)
        self.peft_config[adapter_name] = dataclasses.replace(
            first,
            intervention="nodireft" if low_rank else "red",
            r=sum(self.peft_config[name].r for name in adapters) if low_rank else first.r,
            act_fn=None,
            dropout=0.0,
            subspaces=None,
            freeze_subspace=False,
            init_weights=True,
        )
        try:
            self.inject_adapter(self.model, adapter_name)
        except ValueError:
            del self.peft_config[adapter_name]
            raise
        for layer in places[0]:
            (_add_low_rank if low_rank else _add_red)(layer, adapters, weights, adapter_name)
        if low_rank:
            _warn_of_overlap(places[0], adapters)

    def _check_addable(self, adapters: Sequence[str], places: list[list[ReftLayer]]) -> None:
        name, first = adapters[0], self.peft_config[adapters[0]]
        for other, layers_of_other in zip(adapters, places, strict=True):
            config = self.peft_config[other]
            if config.modules_to_save or config.trainable_token_indices:
                raise ValueError(
                    f"Adapter {other!r} trains whole modules or tokens (modules_to_save, trainable_token_indices), "
                    "which cannot be added."
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

    def _layers_with(self, adapter: str) -> list[ReftLayer]:
        found = [layer for layer in layers(self.model) if adapter in layer.reft_intervention]
        if not found:
            raise ValueError(f"There is no ReFT adapter {adapter!r}; the model has {sorted(self.peft_config)}.")
        return found

    def _settings_of(self, adapter: str) -> list[AdapterSettings]:
        return [layer.reft_settings[adapter] for layer in self._layers_with(adapter)]

    def _unmerged_layers_with(self, adapter: str) -> list[ReftLayer]:
        found = self._layers_with(adapter)
        if any(adapter in layer.merged_adapters for layer in found):
            raise ValueError(
                f"The ReFT adapter {adapter!r} is merged into the weights, where it cannot be changed; call "
                "unmerge_adapter() first."
            )
        return found

    def _layer(self, adapter: str, layer: int | str) -> ReftLayer:
        candidates = self._layers_with(adapter)
        found = [
            place
            for place in candidates
            if (place.is_in(layer) if isinstance(layer, int) else f".{place.site_name}".endswith(f".{layer}"))
        ]
        if len(found) != 1:
            names = ", ".join(repr(place.site_name) for place in (found or candidates))
            problem = "is edited in several places" if found else "is not edited"
            raise ValueError(f"Layer {layer!r} {problem} by adapter {adapter!r}; name one of {names}.")
        return found[0]

    def _low_rank(self, adapter: str, layer: ReftLayer) -> LowRankIntervention:
        intervention = layer.reft_intervention[adapter]
        if not isinstance(intervention, LowRankIntervention):
            raise ValueError(
                f"Adapter {adapter!r} ({self.peft_config[adapter].intervention!r}) edits every coordinate, not a "
                "subspace."
            )
        return intervention


def _finite(name: str, value: float | torch.Tensor) -> float:
    """A number, or a tensor of one, as a float."""
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite, in float32 too, got {value!r}.")
    return float(number)


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
    new.bias.copy_(torch.cat(bias, dim=1))


@torch.no_grad()
def _add_red(layer: ReftLayer, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    new = layer.reft_intervention[adapter_name]
    new.scale.fill_(1)
    new.bias.zero_()
    for name, weight in zip(adapters, weights, strict=True):
        own, factor = layer.reft_intervention[name], weight * layer.reft_settings[name].strength
        new.scale.add_(factor * (own.scale - 1))
        new.bias.add_(factor * own.bias)


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

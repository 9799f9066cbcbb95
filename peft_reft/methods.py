"""The functions of `steering` and `weighted` as methods of `ReftModel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from peft_reft import steering, weighted


class SteeringMixin:
    """The steering methods of `ReftModel`. A `PeftModel` around it forwards them: `model.set_strength("a", 0.5)`."""

    def set_strength(self, adapter_name: str, strength: float) -> None:
        """See [`steering.set_strength`]."""
        steering.set_strength(self, adapter_name, strength)

    def get_strength(self, adapter_name: str) -> float:
        """See [`steering.get_strength`]."""
        return steering.get_strength(self, adapter_name)

    def rescaled(self, adapter_name: str, strength: float) -> AbstractContextManager[None]:
        """See [`steering.rescaled`]."""
        return steering.rescaled(self, adapter_name, strength)

    def set_subspaces(self, adapter_name: str, names: str | Sequence[str] | None) -> None:
        """See [`steering.set_subspaces`]."""
        steering.set_subspaces(self, adapter_name, names)

    def use_subspaces(self, adapter_name: str, names: str | Sequence[str] | None) -> AbstractContextManager[None]:
        """See [`steering.use_subspaces`]."""
        return steering.use_subspaces(self, adapter_name, names)

    def projection(self, adapter_name: str, layer: int | str) -> torch.Tensor:
        """See [`steering.projection`]."""
        return steering.projection(self, adapter_name, layer)

    def set_directions(
        self, adapter_name: str, directions: Mapping[int | str, torch.Tensor], trainable: bool = False
    ) -> None:
        """See [`steering.set_directions`]."""
        steering.set_directions(self, adapter_name, directions, trainable)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """See [`weighted.add_weighted_adapter`]."""
        weighted.add_weighted_adapter(self, adapters, weights, adapter_name)

    # Their names until version 0.2.
    strength, only_subspaces, subspace = rescaled, use_subspaces, projection

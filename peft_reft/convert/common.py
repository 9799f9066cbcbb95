"""Shared by the readers of other libraries' adapters: their common output format, and checked weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peft_reft.convert.files import read_tensors

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Edit(NamedTuple):
    """The parameters of one edit, floating point: `projection` and `weight` `[r, d]`, `bias` `[r]`.

    `projection` is R or P in the method's equation, `weight` is None for a method that has none. `source` names the
    file (and key) they come from, for errors.
    """

    projection: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor
    source: str


def check_edit(edit: Edit) -> None:
    """Check the values of an edit.

    Raises:
        ValueError: the rank is not from 1 to the hidden size, or a value is not finite in float32.
    """
    rank, features = edit.projection.shape
    if not 1 <= rank <= features:
        raise ValueError(f"{edit.source}: the rank is {rank}, but must be from 1 to the hidden size, {features}.")
    for name in ("projection", "weight", "bias"):
        tensor = getattr(edit, name)
        if tensor is not None and not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{edit.source}: {name} holds values that are not finite in float32.")


class Place(NamedTuple):
    """Where a model is edited: a component of a layer, or, if `layer` is None, the module with the name `component`."""

    component: str
    layer: int | None = None


@dataclass
class ForeignAdapter:
    """An adapter of another library.

    Attributes:
        options: the options of `ReftConfig` that the library has: intervention, positions, share_weights, act_fn and
            dropout.
        edits: place -> its edits: one for each word of the positions, in their order, or one for all.
        weights: parameters of the base model that were trained too, by their names in it.
    """

    options: dict[str, Any]
    edits: dict[Place, list[Edit]]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def read_base_weights(path: Path) -> dict[str, torch.Tensor]:
    """Parameters of the base model by their names, from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, or one of them is not floating point and finite.
    """
    weights = read_tensors(path)
    for key, tensor in weights.items():
        if tensor.dtype not in _FLOATS or not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path}: {key!r} ({tensor.dtype}) holds values that are not finite floating point numbers."
            )
    return weights


class Weights:
    """The tensors of one edit. Each is taken once; tensors left at the end are an error.

    Args:
        state: the tensors by their keys.
        source: the file they come from, for errors.
        prefix: the prefix of each key in the file.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], source: Path | str, prefix: str = "") -> None:
        self.state = dict(state)
        self.source = f"{source}"
        self.prefix = prefix

    def take(self, key: str, *shape: int | None) -> torch.Tensor:
        """The tensor of a key.

        Raises:
            ValueError: it is missing, or not a finite floating point tensor of this shape (None: any size).
        """
        if key not in self.state:
            raise ValueError(f"{self.source}: {self.prefix + key!r} is missing; there is {self._names()}.")
        tensor, name = self.state.pop(key), f"{self.source}: {self.prefix + key!r}"
        fits = tensor.dim() == len(shape) and all(
            want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype not in _FLOATS:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, but should be floating point [{wanted}].")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that are not finite.")
        return tensor

    def take_orthogonal(self, name: str, tall: bool) -> torch.Tensor:
        """The value of `<name>.weight` under `torch.nn.utils.parametrizations.orthogonal`, `[r, d]`.

        Args:
            name: the module that is parametrized.
            tall: whether the parameter is stored as `[d, r]` rather than `[r, d]`.

        Raises:
            ValueError: a tensor is missing or has another shape, or the rank is larger than the hidden size.
        """
        original = self.take(f"{name}.parametrizations.weight.original", None, None)
        original = original if tall else original.mT
        features, rank = original.shape
        if rank > features:
            raise ValueError(f"{self.source}: the rank {rank} of {name!r} is larger than the hidden size {features}.")
        base = self.take(f"{name}.parametrizations.weight.0.base", features, features)
        return _orthogonal(original.double(), base.double()).mT.to(original.dtype)

    def finish(self) -> None:
        """Check that every tensor was taken.

        Raises:
            ValueError: some tensors are left.
        """
        if self.state:
            raise ValueError(f"{self.source}: nothing is known of {self._names()}.")

    def _names(self) -> str:
        names = [repr(self.prefix + key) for key in sorted(self.state)]
        return ", ".join(names[:8] + [f"{len(names) - 8} more"] * (len(names) > 8)) or "nothing else"


def _orthogonal(original: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The map of torch's orthogonal parametrization: `[d, r]` and `[d, d]` to `[d, r]` with orthonormal columns.

    Written out because torch's own module factorizes a `[d, d]` matrix whenever it is built.
    """
    if original.shape[0] == original.shape[1]:
        lower = original.tril()
        return base @ torch.matrix_exp(lower - lower.mT)
    reflectors = original.tril(diagonal=-1)
    tau = 2 / (1 + reflectors.square().sum(-2))
    # The diagonal holds signs. If weight decay shrinks it, torch rounds it to zero.
    return base @ (torch.linalg.householder_product(reflectors, tau) * original.diagonal().int())

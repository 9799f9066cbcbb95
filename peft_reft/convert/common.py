"""What the readers of other libraries' adapters share: the form they bring an adapter into, and safe file reading."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


class Edit(NamedTuple):
    """The parameters of one edit, floating point: `projection` and `weight` `[r, d]`, `bias` `[r]`.

    `projection` is what the method's equation calls R or P, `weight` is None for a method that has none. `source` names
    the file (and key) they come from, for errors.
    """

    projection: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor
    source: str


class Place(NamedTuple):
    """Where a model is edited: a component of the layer of this number, or, without a number, a module by its name."""

    component: str
    layer: int | None = None


@dataclass
class ForeignAdapter:
    """An adapter of another library.

    Attributes:
        options: the options of `ReftConfig` that the library has: intervention, positions, share_weights, act_fn and
            dropout.
        edits: for each place its edits: one for each word of the positions, in their order, or one for all.
        weights: parameters of the base model that were trained too, by their names in it.
    """

    options: dict[str, Any]
    edits: dict[Place, list[Edit]]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; the message names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} instead of a JSON object.")
    return value


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A dictionary of tensors from a file of safetensors or `torch.save`, on the CPU. Runs no code of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, or holds anything but tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is broken, or a pickle that holds more than tensors and would run code of its "
            f"own. torch.load(weights_only=True) says: {_first_line(error)}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, it seems broken: {_first_line(error)}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__} instead of a dictionary of tensors.")
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {key!r} is a {type(tensor).__name__} instead of a tensor.")
    return {str(key): tensor.detach() for key, tensor in state.items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Weights:
    """The tensors of one edit, of which each is taken once; what is left at the end is an error.

    Args:
        state: the tensors by their keys.
        source: the file they come from, for errors.
        prefix: what stands before each key in the file.
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
        tensor = self.state.pop(key)
        fits = tensor.dim() == len(shape) and all(
            want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits or not tensor.is_floating_point():
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"{self.source}: {self.prefix + key!r} is {tensor.dtype} {list(tensor.shape)}, but should be floating "
                f"point [{wanted}]."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{self.source}: {self.prefix + key!r} holds values that are not finite.")
        return tensor

    def take_orthogonal(self, name: str, tall: bool) -> torch.Tensor:
        """What `torch.nn.utils.parametrizations.orthogonal` made of the parameter `<name>.weight`, `[r, d]`.

        Args:
            name: the module that is parametrized.
            tall: whether the parameter is stored as `[d, r]` rather than `[r, d]`.
        """
        original = self.take(f"{name}.parametrizations.weight.original", None, None)
        original = original if tall else original.mT
        features, rank = original.shape
        if rank > features:
            raise ValueError(f"{self.source}: the rank {rank} of {name!r} is larger than the hidden size {features}.")
        base = self.take(f"{name}.parametrizations.weight.0.base", features, features)
        return _orthogonal(original.double(), base.double()).mT.to(original.dtype)

    def finish(self) -> None:
        """
        Raises:
            ValueError: there are tensors that nothing has taken.
        """
        if self.state:
            raise ValueError(f"{self.source}: nothing is known of {self._names()}.")

    def _names(self) -> str:
        return ", ".join(repr(self.prefix + key) for key in sorted(self.state)) or "nothing else"


def _orthogonal(original: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The map of torch's orthogonal parametrization: `[d, r]` and `[d, d]` to `[d, r]` with orthonormal columns.

    Written out because torch's own module factorizes a `[d, d]` matrix whenever it is built.
    """
    if original.shape[0] == original.shape[1]:
        lower = original.tril()
        return base @ torch.matrix_exp(lower - lower.mT)
    reflectors = original.tril(diagonal=-1)
    tau = 2 / (1 + reflectors.square().sum(-2))
    # The diagonal holds signs. Weight decay shrinks it, and torch rounds it to zero then.
    return base @ (torch.linalg.householder_product(reflectors, tau) * original.diagonal().int())

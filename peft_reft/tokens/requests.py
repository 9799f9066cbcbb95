"""A batch whose rows ask for different things: one adapter a row, or the subspaces that are edited in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peft_reft.tokens.positions import Positions

# PEFT's name for a row without an adapter.
BASE = "__base__"


@dataclass(frozen=True)
class AdapterNames:
    """What a call may ask of an adapter.

    Attributes:
        positions: its position spec.
        subspaces: names of its subspaces.
        modules: whether it has modules of the model to itself (`modules_to_save`).
    """

    positions: Positions
    subspaces: tuple[str, ...] = ()
    modules: bool = False


# Not frozen: torch.compile hashes frozen dataclasses by their fields.
@dataclass(eq=False)
class RowPositions:
    """The position spec of each row: spec -> the rows that have it, bool `[rows]`."""

    masks: Mapping[Positions, torch.Tensor]


class RowRequests:
    """What a caller asks of each row, for the length of one call.

    Args:
        adapters: one adapter name a row, `"__base__"` for none; None when the active adapters edit all rows.
        subspaces: names of the edited subspaces of each row; None when all rows edit the active ones.

    Raises:
        ValueError: the two are not equally long.
    """

    def __init__(self, adapters: Sequence[str] | None, subspaces: Sequence[Iterable[str]] | None) -> None:
        self.adapters = None if adapters is None else tuple(adapters)
        self.subspaces = None if subspaces is None else tuple(_as_names(names) for names in subspaces)
        if self.adapters is not None and self.subspaces is not None and len(self.adapters) != len(self.subspaces):
            raise ValueError(
                f"adapter_names has {len(self.adapters)} entries and subspaces {len(self.subspaces)}; both need one "
                "for each row."
            )
        # Inside `generate` rows may be repeated after the check.
        self.checked = False
        # Whether one of the adapters has modules of the model to itself.
        self.choose_modules = False
        # What layers keep for the length of the call.
        self.kept: dict[tuple, Any] = {}
        self._positions: dict[tuple[Positions | None, ...], RowPositions] = {}

    @classmethod
    def of(cls, call: Mapping[str, Any], outer: RowRequests | None) -> RowRequests | None:
        """From the arguments of a call, or of the call around it."""
        adapters, subspaces = call.get("adapter_names"), call.get("subspaces")
        if adapters is None and subspaces is None:
            return outer
        if outer is not None:
            adapters = outer.adapters if adapters is None else adapters
            subspaces = outer.subspaces if subspaces is None else subspaces
        return cls(adapters, subspaces)

    @property
    def argument(self) -> str:
        """Name of the argument that asks."""
        return "subspaces" if self.adapters is None else "adapter_names"

    def check(self, adapters: Mapping[str, AdapterNames], training: bool, batch: int | None) -> None:
        """Refuse what cannot be meant, in the words of PEFT where it has some.

        Args:
            adapters: the adapters of the model, by name.
            training: whether the model is in training mode.
            batch: number of rows, None as long as it is not known.

        Raises:
            ValueError: an unknown name, a number of rows other than `batch`, or adapters in training mode.
        """
        if self.checked:
            return
        if self.adapters is not None and training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first.")
        unknown = sorted(set(self.adapters or ()) - {BASE, *adapters})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        known = {name for adapter in adapters.values() for name in adapter.subspaces}
        unknown = sorted({name for names in self.subspaces or () for name in names} - known)
        if unknown:
            raise ValueError(f"Unknown subspace(s) {', '.join(unknown)}; the adapters have {sorted(known)}.")
        for name, values in (("adapter_names", self.adapters), ("subspaces", self.subspaces)):
            if values is not None and batch is not None and len(values) != batch:
                raise ValueError(
                    f"Length of `{name}` should be the same as the number of inputs, but got {len(values)} and "
                    f"{batch} respectively."
                )
        self.checked = batch is not None
        self.choose_modules = any(adapters[name].modules for name in {*(self.adapters or ())} - {BASE})

    def of_rows(self, batch: int) -> list[tuple[str | None, tuple[str, ...] | None]]:
        """The adapter and the subspaces that each of the `batch` rows of a pass asks for.

        Raises:
            ValueError: the rows cannot be told apart.
        """
        rows = self._repeated(batch)
        adapters = [None if self.adapters is None else self.adapters[i] for i in rows]
        subspaces = [None if self.subspaces is None else self.subspaces[i] for i in rows]
        return list(zip(adapters, subspaces, strict=True))

    def positions(self, specs: tuple[Positions | None, ...]) -> RowPositions:
        """The specs of the rows, None for no edit: one object for all layers, so that tokens are selected once."""
        if specs not in self._positions:
            distinct = [spec for spec in dict.fromkeys(specs) if spec is not None]
            masks = {spec: torch.tensor([other == spec for other in specs]) for spec in distinct}
            self._positions[specs] = RowPositions(masks)
        return self._positions[specs]

    def _repeated(self, batch: int) -> list[int]:
        """The row of the call that each row of a pass belongs to: beams and returned sequences repeat rows."""
        count = len(self.adapters if self.adapters is not None else self.subspaces)
        if batch % count:
            raise ValueError(
                f"adapter_names or subspaces were given for {count} rows, but a module's output has {batch}, so they "
                "cannot be told apart. Decoding loops must keep all rows, or repeat each of them equally often."
            )
        return [row // (batch // count) for row in range(batch)]


def batch_size(told: Iterable[int], call: Mapping[str, Any]) -> int | None:
    """Number of rows of a call: what its streams are told, unless it is 0, else the length of its first tensor."""
    tensors = (len(value) for value in call.values() if isinstance(value, torch.Tensor) and value.dim())
    return next(filter(None, told), None) or next(tensors, None)


def _as_names(names: Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)

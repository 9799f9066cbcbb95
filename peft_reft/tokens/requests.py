"""Per-row requests of a batch: the adapter of each row, or the subspaces that are edited in it."""

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
    """What a call needs to know about an adapter that its rows request.

    Attributes:
        positions: its position spec.
        subspaces: names of its subspaces.
        modules: whether it has its own copies of modules (`modules_to_save`).
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
    """The per-row requests of one call.

    Args:
        adapters: one adapter name per row, `"__base__"` for none; None when the active adapters edit all rows.
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
        # Whether one of the adapters has its own copies of modules.
        self.choose_modules = False
        # Cache of the layers, dropped with the call.
        self.kept: dict[tuple, Any] = {}
        self._positions: dict[tuple[Positions | None, ...], RowPositions] = {}

    @classmethod
    def of(cls, call: Mapping[str, Any], outer: RowRequests | None) -> RowRequests | None:
        """From the arguments of a call, or of the call around it; None if neither has requests."""
        adapters, subspaces = call.get("adapter_names"), call.get("subspaces")
        if adapters is None and subspaces is None:
            return outer
        if outer is not None:
            adapters = outer.adapters if adapters is None else adapters
            subspaces = outer.subspaces if subspaces is None else subspaces
        return cls(adapters, subspaces)

    @property
    def argument(self) -> str:
        """Name of the argument that made the requests."""
        return "subspaces" if self.adapters is None else "adapter_names"

    def check(self, adapters: Mapping[str, AdapterNames], training: bool, batch: int | None) -> None:
        """Refuse invalid requests, with PEFT's own messages where it has them.

        Args:
            adapters: the adapters of the model, by name.
            training: whether the model is in training mode.
            batch: number of rows, None if unknown.

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
        """The adapter and the subspaces of each of the `batch` rows of a pass.

        Raises:
            ValueError: `batch` is not a multiple of the number of rows of the call.
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
    """Number of rows of a call: the first nonzero number in `told`, else the length of its first tensor."""
    tensors = (len(value) for value in call.values() if isinstance(value, torch.Tensor) and value.dim())
    return next(filter(None, told), None) or next(tensors, None)


def _as_names(names: Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)

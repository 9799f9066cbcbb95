"""A batch whose rows ask for different things: one adapter a row, or the subspaces that are edited in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_reft.modules import modules_around
from peft_reft.stacked import Member, Stacked, family, stack
from peft_reft.tokens.positions import Positions

if TYPE_CHECKING:
    from peft_reft.layer import ReftLayer

# PEFT's name for a row without an adapter.
BASE = "__base__"


# Not frozen: torch.compile hashes frozen dataclasses by their fields.
@dataclass(eq=False)
class RowPositions:
    """The position spec of each row: spec -> the rows that have it, bool `[rows]`."""

    masks: Mapping[Positions, torch.Tensor]


@dataclass(eq=False)
class RowEdit:
    """What one layer does to the rows whose interventions can be stacked.

    `members` are distinct, `index` int64 `[rows]` tells which of them edits a row, -1 for none.
    """

    members: list[Member]
    index: torch.Tensor
    positions: RowPositions
    _stacked: dict[torch.dtype, Stacked] = field(default_factory=dict)

    def stacked(self, dtype: torch.dtype) -> Stacked:
        if torch.is_grad_enabled():
            return stack(self.members, self.index, dtype)
        if dtype not in self._stacked:
            self._stacked[dtype] = stack(self.members, self.index, dtype)
        return self._stacked[dtype]


class Rows:
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
        self._edits: dict[tuple[int, int], list[RowEdit]] = {}
        self._heads: dict[int, list[AuxiliaryTrainingWrapper]] = {}
        self._positions: dict[tuple[Positions | None, ...], RowPositions] = {}

    @classmethod
    def of(cls, call: Mapping[str, Any], outer: Rows | None) -> Rows | None:
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

    def check(self, adapters: Mapping[str, Iterable[str]], training: bool, batch: int | None) -> None:
        """Refuse what cannot be meant, in the words of PEFT where it has some.

        Args:
            adapters: name of each adapter of the model -> names of its subspaces.
            training: whether the model is in training mode.
            batch: number of rows, None as long as it is not known.

        Raises:
            ValueError: an unknown name, a number of rows other than `batch`, or adapters in training mode.
        """
        if self.adapters is not None and training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(self.adapters or ()) - {BASE, *adapters})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        known = {name for names in adapters.values() for name in names}
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

    def coordinates(self, layer: ReftLayer, adapter: str, batch: int) -> torch.Tensor | None:
        """Which coordinates of an adapter's subspace each of `batch` rows edits, float `[batch, r]`; None for all."""
        settings = layer.reft_settings[adapter]
        if self.subspaces is None or not settings.subspaces:
            return None
        masks = [settings.mask(names) for names in self.subspaces]
        return torch.stack([masks[i] for i in self._repeated(batch)])

    def edits(self, layer: ReftLayer, batch: int) -> list[RowEdit]:
        """What a layer does to the `batch` rows of its output, when each row has its own adapter."""
        key = (id(layer), batch)
        if key not in self._edits:
            self._edits[key] = self._make_edits(layer, batch)
        return self._edits[key]

    def choose_heads(self, module: nn.Module) -> list[RemovableHandle]:
        """Let the modules inside `module` that PEFT trains whole (`modules_to_save`) run each row through its adapter's
        copy, until the handles are removed.
        """
        if self.adapters is None:
            return []
        if id(module) not in self._heads:
            self._heads[id(module)] = [m for m in modules_around(module) if isinstance(m, AuxiliaryTrainingWrapper)]
        return [head.register_forward_pre_hook(self._name_rows, with_kwargs=True) for head in self._heads[id(module)]]

    def _name_rows(self, head: AuxiliaryTrainingWrapper, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        # Adapters without a copy use the original.
        names = [self.adapters[i] for i in self._repeated(len(args[0]))]
        return args, kwargs | {"adapter_names": [name if name in head._adapters else BASE for name in names]}

    def _make_edits(self, layer: ReftLayer, batch: int) -> list[RowEdit]:
        names = [self.adapters[i] for i in self._repeated(batch)]
        subspaces = [None if self.subspaces is None else self.subspaces[i] for i in self._repeated(batch)]
        families: dict[type, list[tuple[str, tuple[str, ...] | None]]] = {}
        for key in dict.fromkeys(zip(names, subspaces, strict=True)):
            settings = layer.reft_settings.get(key[0])
            if settings is not None and settings.strength != 0:
                families.setdefault(family(layer.reft_intervention[key[0]]), []).append(key)
        edits = []
        for keys in families.values():
            number = {key: i for i, key in enumerate(keys)}
            index = [number.get(key, -1) for key in zip(names, subspaces, strict=True)]
            specs = tuple(layer.reft_settings[names[i]].positions if n >= 0 else None for i, n in enumerate(index))
            members = [_member(layer, *key) for key in keys]
            edits.append(RowEdit(members, torch.tensor(index), self._row_positions(specs)))
        return edits

    def _row_positions(self, specs: tuple[Positions | None, ...]) -> RowPositions:
        # One object for all layers with the same specs, so that a plan selects their tokens once.
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


def _member(layer: ReftLayer, name: str, subspaces: tuple[str, ...] | None) -> Member:
    settings = layer.reft_settings[name]
    coordinates = settings.coordinates
    if subspaces is not None and settings.subspaces:
        coordinates = settings.mask(subspaces)
    return Member(layer.reft_intervention[name], settings.strength, coordinates)


def _as_names(names: Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)

"""Scaling the adapters of one layer, with the method names of LoRA's layers in PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peft_reft.edits import AdapterSettings, finite


class Scaling(Mapping[str, float]):
    """Live view of a layer's scaling factors: name of each adapter -> factor of its edits."""

    def __init__(self, settings: Mapping[str, AdapterSettings]) -> None:
        self._settings = settings

    def __getitem__(self, name: str) -> float:
        return self._settings[name].strength

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __repr__(self) -> str:
        return repr(self.copy())

    def copy(self) -> dict[str, float]:
        """The current factors, as a dictionary."""
        return dict(self)


class ScaledAdapters:
    """The scaling methods that `ReftLayer` shares with LoRA's layers, so that `rescale_adapter_scale` works."""

    reft_settings: dict[str, AdapterSettings]
    merged_adapters: list[str]
    active_adapters: Sequence[str]

    @property
    def scaling(self) -> Scaling:
        """Name of each adapter -> factor of its edits, as in LoRA's layers. Assigning changes only the given names."""
        return Scaling(self.reft_settings)

    @scaling.setter
    def scaling(self, scaling: Mapping[str, float]) -> None:
        for name, scale in scaling.items():
            self.set_scale(name, scale)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor of an adapter's edits here: 1 is the adapter as trained. Unknown names are ignored.

        Raises:
            TypeError: `scale` is no number.
            ValueError: it is not finite, or the adapter is merged.
        """
        value = finite("strength", scale)
        if adapter in self.reft_settings and value != self.reft_settings[adapter].strength:
            self.check_unmerged(adapter)
            self.reft_settings[adapter].strength = value

    def check_unmerged(self, adapter_name: str) -> None:
        """Raise a ValueError if an adapter is merged."""
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"The ReFT adapter {adapter_name!r} is merged into the weights, where it cannot be changed; call "
                "unmerge_adapter() first."
            )

    def scale_layer(self, scale: float) -> None:
        """Multiply the factor of each active adapter's edits by `scale`.

        Raises:
            TypeError, ValueError: see `set_scale`.
        """
        for name in self.active_adapters:
            if name in self.reft_settings:
                self.set_scale(name, self.reft_settings[name].strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factor of each active adapter's edits by `scale`; None resets it to 1.

        Raises:
            TypeError, ValueError: see `set_scale`.
            ZeroDivisionError: `scale` is 0.
        """
        for name in self.active_adapters:
            if name in self.reft_settings:
                self.set_scale(name, 1.0 if scale is None else self.reft_settings[name].strength / scale)

"""Scaling the adapters of one layer, by the names that LoRA's layers give it in PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peft_reft.edits import AdapterSettings, finite


class Scaling(Mapping[str, float]):
    """Name of each adapter of a layer -> factor of its edits, as they are now: adapters that are deleted leave it."""

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
        """The factors of this moment."""
        return dict(self)


class ScaledAdapters:
    """What `ReftLayer` has in common with LoRA's layers where these are scaled, as `rescale_adapter_scale` does."""

    reft_settings: dict[str, AdapterSettings]
    merged_adapters: list[str]
    active_adapters: Sequence[str]

    @property
    def scaling(self) -> Scaling:
        """Name of each adapter -> factor of its edits, as in LoRA's layers. Setting it keeps the names left out."""
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
        """Multiply the factor of each active adapter's edits by `scale`."""
        for name in self.active_adapters:
            if name in self.reft_settings:
                self.set_scale(name, self.reft_settings[name].strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factor of each active adapter's edits by `scale`; None sets it to 1 again."""
        for name in self.active_adapters:
            if name in self.reft_settings:
                self.set_scale(name, 1.0 if scale is None else self.reft_settings[name].strength / scale)

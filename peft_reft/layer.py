"""The adapter layer: a child of a hooked module that edits the module's output."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_reft.config import ReftConfig
from peft_reft.interventions import INTERVENTIONS
from peft_reft.plan import EVERYTHING, Selection
from peft_reft.positions import Positions
from peft_reft.sites import Site
from peft_reft.tracker import PromptTracker

CHILD_NAME = "reft"


class ReftLayer(nn.Module, BaseTunerLayer):
    """Holds the interventions of all adapters at one site, and applies the active ones in the order they were given.

    Unlike other tuner layers it does not wrap the module it adapts: `attach` adds it to the module as the child
    `reft` and hooks the module's forward pass, so that parameter names and module classes of the base model stay.

    Args:
        site: the module whose output is edited.
        tracker: knows which tokens of the current pass are prompt.
    """

    adapter_layer_names = ("reft_intervention",)
    other_param_names = ("reft_positions",)

    def __init__(self, site: Site, tracker: PromptTracker) -> None:
        super().__init__()
        self.in_features = self.out_features = site.features
        self.site_name = site.name
        self.stream = site.stream
        self.tracker = tracker
        self.reft_intervention = nn.ModuleDict()
        self.reft_positions: dict[str, Positions] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._handle: RemovableHandle | None = None

    @property
    def weight(self) -> torch.Tensor:
        # The properties of the base class would look for a base layer in vain, without end.
        raise AttributeError(f"{type(self).__name__} wraps no module, so it has no 'weight'")

    @property
    def bias(self) -> torch.Tensor:
        raise AttributeError(f"{type(self).__name__} wraps no module, so it has no 'bias'")

    @classmethod
    def attach(cls, site: Site, tracker: PromptTracker) -> ReftLayer:
        """The layer of a site; mutates the site's module when there is none yet. `detach` undoes it."""
        layer = cls.at(site)
        if layer is None:
            layer = cls(site, tracker)
            site.module.add_module(CHILD_NAME, layer)
            # Before other hooks: Transformers records hidden states in one, which are to be the edited ones. The handle
            # travels with copies and pickles, and keeps its number from being given to another hook there.
            layer._handle = site.module.register_forward_hook(layer.edit_output, prepend=True)
        return layer

    @classmethod
    def at(cls, site: Site) -> ReftLayer | None:
        """The layer of a site, if there is one.

        Raises:
            ValueError: something else has taken its name.
        """
        layer = getattr(site.module, CHILD_NAME, None)
        if layer is not None and not isinstance(layer, cls):
            raise ValueError(
                f"{site.name!r} already has an attribute {CHILD_NAME!r} ({type(layer).__name__}), the name that "
                "peft_reft gives its layers; exclude the module with exclude_modules."
            )
        return layer

    @staticmethod
    def detach(module: nn.Module) -> None:
        """Take the layer and its hook from a module again."""
        module._modules.pop(CHILD_NAME)._handle.remove()

    def update_layer(self, adapter_name: str, config: ReftConfig, module: nn.Module) -> None:
        """Add an adapter, on the device of `module`, in float32."""
        positions = config.parsed_positions
        self.reft_positions[adapter_name] = positions
        intervention = INTERVENTIONS[config.intervention](
            features=self.out_features,
            rank=config.r,
            units=positions.units,
            act_fn=config.act_fn,
            dropout=config.dropout,
            init_weights=config.init_weights,
        )
        if not any(parameter.is_meta for parameter in intervention.parameters()):
            intervention.to(_device(module))
        intervention.train(self.training)
        self.reft_intervention[adapter_name] = intervention
        self.set_adapter(self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; when no other is active, the first of the model's remaining ones becomes so."""
        # Every layer chooses alike, although not every adapter is on every layer. The list is kept here, since
        # Transformers deletes adapters without the tuner.
        self.tracker.adapters = [name for name in self.tracker.adapters if name != adapter_name]
        if adapter_name in self.active_adapters:
            active = [name for name in self.active_adapters if name != adapter_name]
            successor = sorted(self.tracker.adapters)[:1]
            if successor and not active:
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. "
                    f"Setting active adapter to {successor[0]}.",
                    stacklevel=2,
                )
            self.set_adapter(active or successor)
        super().delete_adapter(adapter_name)

    def forward(self, hidden: Any) -> Any:
        """What it is given: an edited `nn.Sequential` runs through all of its children."""
        return hidden

    def edit_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook: the module's output with its hidden representations edited, None to leave it as it is."""
        adapters = [name for name in self.active_adapters if name in self.reft_intervention]
        if self._disable_adapters or not adapters:
            return None
        hidden = edited = _hidden_of(output, self.site_name)
        if hidden.shape[-1] != self.out_features:
            raise ValueError(
                f"{self.site_name} returned {tuple(hidden.shape)}, but its adapters were built for "
                f"{self.out_features} features. Give the module the right out_features, or target another one."
            )
        plan = self.tracker.plan(self.stream)
        if hidden.dim() == 2 and plan.shape is not None and len(hidden) == plan.shape[0] * plan.shape[1]:
            # Some models put all tokens on one axis for a while.
            edited = hidden.unflatten(0, plan.shape)
        untouched = edited
        for name in adapters:
            positions = self.reft_positions[name]
            # [rows, features]: without a token axis every row counts.
            rows = edited.dim() == 2
            selection = EVERYTHING if rows else plan.selection(positions, edited, self.site_name)
            if selection is not None:
                edit = partial(self.reft_intervention[name], session=self.tracker.generation)
                edited = _apply(edit, selection, edited, positions.units)
        return None if edited is untouched else _with_hidden(output, edited.view_as(hidden))

    def __repr__(self) -> str:
        adapters = ", ".join(f"{name}: {positions}" for name, positions in self.reft_positions.items())
        return f"{type(self).__name__}({self.out_features}, {adapters})"


def _device(module: nn.Module) -> torch.device:
    hook_devices = (getattr(getattr(child, "_hf_hook", None), "execution_device", None) for child in module.modules())
    device = next((device for device in hook_devices if device is not None), None)
    if device is not None:
        return torch.device(device)
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _hidden_of(output: Any, name: str) -> torch.Tensor:
    values = output.values() if isinstance(output, Mapping) else output
    hidden = output if isinstance(output, torch.Tensor) else next(iter(values), None)
    if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point() or hidden.dim() < 2:
        raise TypeError(
            f"{name} does not return hidden representations: its output (or the first value of it) must be a floating "
            f"point tensor [batch, tokens, features] or [rows, features], got {_describe(hidden)}."
        )
    return hidden


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    if isinstance(output, torch.Tensor):
        return hidden
    if isinstance(output, Mapping):
        first = next(iter(output))
        return type(output)({**output, first: hidden})
    if hasattr(output, "_replace"):  # namedtuple
        return output._replace(**{output._fields[0]: hidden})
    return type(output)((hidden, *output[1:]))


def _apply(
    intervention: Callable[..., torch.Tensor], selection: Selection, hidden: torch.Tensor, units: int
) -> torch.Tensor:
    """`hidden` with the selected tokens edited: computed in float32 at least, added in the dtype of `hidden`."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        if selection.rows is None:
            codes = hidden.new_ones(hidden.shape[:-1]) if selection.codes is None else selection.codes
            gate = None if units == 1 and selection.codes is None else _one_hot(codes - 1, units, dtype)
            return hidden + intervention(hidden.to(dtype), gate).to(hidden.dtype)
        flat = hidden.flatten(0, -2)
        gate = None if units == 1 else _one_hot(selection.units, units, dtype)
        edit = intervention(flat.index_select(0, selection.rows).to(dtype), gate)
        return flat.index_add(0, selection.rows, edit.to(hidden.dtype)).view_as(hidden)


def _one_hot(index: torch.Tensor, units: int, dtype: torch.dtype) -> torch.Tensor:
    return (index.unsqueeze(-1) == torch.arange(units, device=index.device)).to(dtype)

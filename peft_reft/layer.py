"""The adapter layer: a child of a hooked module that edits the module's output, or its input."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_reft import merging
from peft_reft.components import INPUT, OUTPUT
from peft_reft.config import ReftConfig
from peft_reft.edits import AdapterSettings, Edit, RowEdits, edits_of_rows, view_without_aliasing
from peft_reft.interventions import INTERVENTIONS, Intervention
from peft_reft.layouts import hidden_of, with_hidden
from peft_reft.modules import device_of, named_modules
from peft_reft.past_hooks import EditedForward
from peft_reft.scaling import ScaledAdapters
from peft_reft.sites import Site
from peft_reft.tokens.passes import Pass
from peft_reft.tokens.prompts import stream_of_module
from peft_reft.tokens.selections import EVERY_TOKEN, RowSelection, Selection
from peft_reft.tracker import Tracker, is_recorded

# Edited side -> name of the layer. PEFT would take names that contain "reft_" for parameters.
CHILD_NAMES = {OUTPUT: "reft", INPUT: "input_reft"}


class ReftLayer(nn.Module, ScaledAdapters, BaseTunerLayer):
    """Holds the interventions of all adapters at one site, and applies the active ones in the order of activation.

    Unlike other tuner layers it does not wrap the module it adapts: `attach` adds it to the module as the child
    `reft` (`input_reft` if it edits the input) and hooks the module's forward pass, so parameter names and module
    classes of the base model do not change.

    Args:
        site: the module whose output or input is edited.
        tracker: knows the running pass.
    """

    adapter_layer_names = ("reft_intervention",)
    other_param_names = ("reft_settings",)

    def __init__(self, site: Site, tracker: Tracker) -> None:
        super().__init__()
        self.in_features = self.out_features = site.features
        self.site_name = site.name
        self.side = site.side
        self.index, self.depth, self.is_block = site.index, site.depth, site.is_block
        self.place = site.place
        self.stream = site.stream
        self.tracker = tracker
        self.reft_intervention = nn.ModuleDict()
        self.reft_settings: dict[str, AdapterSettings] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        # In a tuple, so that the module is not registered as a child of its own child.
        self._host = (site.module,)
        self._handle: RemovableHandle | None = None
        self._last_edited_offset: float = 0
        self._unmerged: merging.Original | None = None
        self._merged_edits: dict[str, Edit] = {}

    @property
    def weight(self) -> torch.Tensor:
        # The base class would recurse forever looking for a base layer.
        raise AttributeError(f"{type(self).__name__} wraps no module, so it has no 'weight'")

    @property
    def bias(self) -> torch.Tensor:
        raise AttributeError(f"{type(self).__name__} wraps no module, so it has no 'bias'")

    @classmethod
    def attach(cls, site: Site, tracker: Tracker) -> ReftLayer:
        """The layer of a site. Mutates the site's module if it has none yet; `detach` undoes it."""
        layer = cls.at(site)
        if layer is None:
            layer = cls(site, tracker)
            site.module.add_module(CHILD_NAMES[site.side], layer)
            # The handle is part of copies and pickles, where it keeps its id from being reused for another hook.
            if site.past_hooks:
                EditedForward(site.module, layer).attach()
            elif site.side == INPUT:
                layer._handle = site.module.register_forward_pre_hook(layer.edit_input, with_kwargs=True)
            else:
                # Before other hooks, so that the hook in which Transformers records hidden states sees edited ones.
                hook = site.module.register_forward_hook
                layer._handle = hook(layer.edit_output, prepend=True, with_kwargs=True)
        return layer

    @classmethod
    def at(cls, site: Site) -> ReftLayer | None:
        """The layer of a site, if there is one.

        Raises:
            ValueError: the module has another attribute of that name.
        """
        name = CHILD_NAMES[site.side]
        layer = getattr(site.module, name, None)
        if layer is not None and not isinstance(layer, cls):
            raise ValueError(
                f"{site.name!r} already has an attribute {name!r} ({type(layer).__name__}), the name that "
                "peft_reft gives its layers; exclude the module with exclude_modules."
            )
        return layer

    @staticmethod
    def of(module: nn.Module) -> list[ReftLayer]:
        """The layers of a module."""
        children = (module._modules.get(name) for name in CHILD_NAMES.values())
        return [child for child in children if isinstance(child, ReftLayer)]

    @property
    def host(self) -> nn.Module:
        """The module that the layer is attached to, and whose output or input it edits."""
        return self._host[0]

    def detach(self) -> None:
        """Remove the layer and its hook from its module. Mutates the module."""
        del self.host._modules[CHILD_NAMES[self.side]]
        if self._handle is None:
            EditedForward.take_from(self.host, self)
        else:
            self._handle.remove()

    def is_in(self, block: int) -> bool:
        """Whether the layer is at, or in, the block of this number; negative numbers count from the end."""
        return self.index is not None and self.index in (block, block + self.depth)

    def update_layer(self, adapter_name: str, config: ReftConfig) -> None:
        """Add an adapter with this configuration, in float32 on the device of the edited module."""
        positions = config.parsed_positions
        self.reft_settings[adapter_name] = AdapterSettings(
            positions, subspaces=config.coordinates, freeze_subspace=config.freeze_subspace
        )
        intervention = INTERVENTIONS[config.intervention](
            features=self.out_features,
            rank=config.r,
            units=positions.units,
            act_fn=config.act_fn,
            dropout=config.dropout,
            init_weights=config.init_weights,
            bias=config.use_bias,
        )
        if not any(parameter.is_meta for parameter in intervention.parameters()):
            intervention.to(device_of(self.host))
        intervention.train(self.training)
        self.reft_intervention[adapter_name] = intervention
        self._last_edited_offset = max(self._last_edited_offset, positions.last_edited_offset)
        self._train(intervention, adapter_name in self.active_adapters)
        self._freeze_subspaces()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, and freeze the others."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, intervention in self.reft_intervention.items():
            self._train(intervention, name in names and not inference_mode)
        self._active_adapter = names
        self._freeze_subspaces()

    @staticmethod
    def _train(intervention: Intervention, wanted: bool) -> None:
        for parameter in intervention.parameters():
            # Reading is faster than setting, and most of many adapters do not change.
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters; subspaces with `freeze_subspace` stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_subspaces()

    def _freeze_subspaces(self) -> None:
        for name, settings in self.reft_settings.items():
            if settings.freeze_subspace and name in self.reft_intervention:
                self.reft_intervention[name].projection.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If no other one is active, activate the first of the model's others by name."""
        # Every layer makes the same choice, although not every adapter is on every layer. The list is updated here,
        # because Transformers deletes adapters without the tuner.
        self.tracker.adapters.pop(adapter_name, None)
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
        offsets = (settings.positions.last_edited_offset for settings in self.reft_settings.values())
        self._last_edited_offset = max(offsets, default=0)

    def why_not_merge(self, adapter_name: str) -> str | None:
        """The reason why an adapter cannot be merged into the edited module, None if it can."""
        positions, intervention = self.reft_settings[adapter_name].positions, self.reft_intervention[adapter_name]
        return merging.obstacle(self.host, str(positions), intervention, self.side == OUTPUT)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters, by default the active ones, into the weights of the edited module. Mutates the module.

        Raises:
            ValueError: an adapter in `adapter_names` cannot be merged exactly, or `safe_merge` found values that are
                not finite. Active adapters that cannot be merged only give a warning and edit as before: PEFT calls
                this for all layers to merge another method's adapters.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.reft_intervention]
        obstacles = {name: why for name in names if (why := self.why_not_merge(name)) is not None}
        if obstacles and adapter_names is not None:
            name, why = next(iter(obstacles.items()))
            raise ValueError(f"The ReFT adapter {name!r} cannot be merged exactly: at {self.site_name!r} {why}.")
        for name, why in obstacles.items():
            warnings.warn(f"The ReFT adapter {name!r} is not merged but edits as before: {why}.", stacklevel=2)
        names = [name for name in names if name not in obstacles]
        if not names:
            return
        original = self._unmerged or merging.Original(self.host)
        # Edits of adapters that were merged earlier keep the settings of that time.
        edits = self._merged_edits | {name: self.edit_of(name) for name in names}
        merging.merge(self.host, original, edits, safe_merge, self.site_name)
        self._unmerged, self._merged_edits, self.merged_adapters = original, edits, list(edits)

    def unmerge(self) -> None:
        """Restore the weights that the edited module had before merging, bit for bit."""
        if self._unmerged is not None:
            self._unmerged.restore(self.host)
        self._unmerged, self._merged_edits, self.merged_adapters = None, {}, []

    def edit_of(self, adapter_name: str) -> Edit:
        """The edit of an adapter here, with its current settings."""
        settings = self.reft_settings[adapter_name]
        intervention = self.reft_intervention[adapter_name]
        return Edit(intervention, settings.strength, settings.coordinates, settings.positions)

    def lacks_bias(self, adapter_names: list[str] | None) -> bool:
        """Whether the edited module had no bias before merging, and these adapters give it one."""
        original = self.host if self._unmerged is None else self._unmerged
        names = [*self.merged_adapters, *(self.active_adapters if adapter_names is None else adapter_names)]
        return any(name in self.reft_intervention and self._shifts(name) for name in names) and original.bias is None

    def _shifts(self, adapter_name: str) -> bool:
        """Whether an affine edit moves a representation of zeros, so that a layer needs a bias to do the same."""
        zeros = next(self.reft_intervention[adapter_name].parameters()).new_zeros(1, self.out_features)
        return bool(self.edit_of(adapter_name).function(zeros).any())

    def forget_original(self) -> None:
        """Drop the copy of the original weights: merged adapters cannot be unmerged any more."""
        self._unmerged = None

    def forward(self, hidden: Any) -> Any:
        """Return the input unchanged: an edited `nn.Sequential` calls all of its children."""
        return hidden

    def edit_output(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: the module's output with its hidden representations edited, None to keep it."""
        pass_ = self._pass(args, kwargs)
        if self._is_idle(pass_):
            return None
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.dim() > 1:
            hidden = output
        else:
            hidden = hidden_of(output, f"{self.site_name} does not return hidden representations: its output")
        edited = self._edited(pass_, hidden, f"{self.site_name} returned")
        if edited is hidden:
            return None
        return edited if hidden is output else with_hidden(output, edited)

    def edit_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Forward pre-hook: the module's arguments with the hidden representations edited, None to keep them."""
        pass_ = self._pass(args, kwargs)
        if self._is_idle(pass_):
            return None
        # By their usual name, else the first argument.
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), None)
        given = hidden_of(
            args or {name: kwargs.get(name)}, f"{self.site_name} is not given hidden representations: its arguments"
        )
        # If Accelerate runs blocks on several devices, it moves the input after this hook.
        hidden = given.to(next(self.reft_intervention.parameters()).device)
        edited = self._edited(pass_, hidden, f"{self.site_name} was given")
        if edited is hidden:
            return None
        return ((edited, *args[1:]), kwargs) if args else (args, kwargs | {name: edited})

    def _pass(self, args: tuple, kwargs: dict[str, Any]) -> Pass:
        """The running pass, or a new one if the module was called alone."""
        pass_ = self.tracker.current(self)
        if pass_ is None or self.stream not in pass_.streams:
            return Pass({self.stream: stream_of_module(args, kwargs)}, self.tracker.own.requests, is_recorded())
        return pass_

    def _is_idle(self, pass_: Pass) -> bool:
        if pass_.requests is not None and self.merged_adapters:
            raise ValueError(
                f"Cannot pass `{pass_.requests.argument}` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        if pass_.streams[self.stream].tokens_after_prompt >= self._last_edited_offset:
            return True
        if _by_row(pass_):
            return self._disable_adapters or not any(name in self.reft_intervention for name in pass_.requests.adapters)
        return len(self._edits_alike(pass_)) == 0

    def _edits_alike(self, pass_: Pass) -> dict[str, Edit]:
        """The edits of a pass whose rows do not choose their own, with the settings of the first call in the pass.

        So a checkpointed module repeats the same edits in the backward pass, whatever was set since.
        """
        if pass_.in_graph:
            return self.current_edits()
        if self not in pass_.edits:
            pass_.edits[self] = self.current_edits()
        return pass_.edits[self]

    def current_edits(self) -> dict[str, Edit]:
        """Name of each adapter that edits here with the current settings -> its edit."""
        edits = {}
        for name in () if self._disable_adapters else self.active_adapters:
            if name not in self.reft_intervention or name in self.merged_adapters:
                continue
            # In training, an edit of strength 0 gives its parameters zero gradients rather than none.
            if self.reft_settings[name].strength != 0 or self.training:
                edits[name] = self.edit_of(name)
        return edits

    def _edited(self, pass_: Pass, hidden: torch.Tensor, name: str) -> torch.Tensor:
        """`hidden` with its edits, `hidden` itself if nothing is edited; errors begin with `name`."""
        if self.place.layout is None:
            return self._edited_tokens(pass_, name, hidden)
        edit = partial(self._edited_tokens, pass_, name)
        return self.place.layout.edit(hidden, pass_.streams[self.stream].shape, edit)

    def _edited_tokens(self, pass_: Pass, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """Like `_edited`, for hidden representations in their usual layout."""
        if hidden.shape[-1] != self.out_features:
            raise ValueError(
                f"{name} {tuple(hidden.shape)}, but its adapters were built for {self.out_features} features, "
                f"{self.place.told_by}."
            )
        if hidden.dim() > 3:
            return self._edited_places(pass_, name, hidden)
        stream, grid = pass_.streams[self.stream], hidden
        if hidden.dim() == 2 and len(hidden) == stream.shape[0] * stream.shape[1]:
            # Some models flatten batch and tokens to one axis in places.
            grid = hidden.unflatten(0, stream.shape)
        edited = grid
        for edit in self._edits(pass_, len(grid)):
            where = self._where(edit, pass_, edited, name)
            if where is not None:
                edited = edit.add_to(edited, where, pass_.products, self._is_kept)
        if edited is grid:
            return hidden
        return edited if edited.shape == hidden.shape else view_without_aliasing(edited, hidden.shape)

    def _edited_places(self, pass_: Pass, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """Like `_edited_tokens`, for `[batch, places..., features]`: if the call has tokens, only edits of all fit."""
        for edit in self._edits_alike(pass_).values():
            if edit.positions.needs_prompt:
                pass_.streams[self.stream].check_shape(edit.positions, hidden, name)
        grid = hidden.flatten(1, -2)
        edited = self._edited_tokens(pass_, name, grid)
        return hidden if edited is grid else view_without_aliasing(edited, hidden.shape)

    @property
    def _is_kept(self) -> bool:
        """Whether autograd keeps the result for a backward pass anyway, unchanged.

        The next block first normalizes the output of this one, and keeps it for the gradient of that. But a hook after
        this one may change it in place.
        """
        hooks = self.host._forward_pre_hooks if self.side == INPUT else self.host._forward_hooks
        return self.is_block and self.place.layout is None and len(hooks) == 1

    def _edits(self, pass_: Pass, batch: int) -> list[Edit] | list[RowEdits]:
        if _by_row(pass_):
            key = (self, batch)
            if key not in pass_.requests.kept:
                pass_.requests.kept[key] = self._edits_by_row(pass_, batch)
            return pass_.requests.kept[key]
        edits = self._edits_alike(pass_)
        if pass_.requests is None:
            return list(edits.values())
        subspaces = [names for _, names in pass_.requests.of_rows(batch)]
        return [self._edit_of_rows(name, edit, subspaces) for name, edit in edits.items()]

    def _edit_of_rows(self, name: str, edit: Edit, subspaces: list[tuple[str, ...]]) -> Edit:
        """An edit that is restricted to other subspaces in each row."""
        settings = self.reft_settings[name]
        if not settings.subspaces:
            return edit
        return replace(edit, coordinates=torch.stack([settings.mask(names) for names in subspaces]))

    def _edits_by_row(self, pass_: Pass, batch: int) -> list[RowEdits]:
        rows = pass_.requests.of_rows(batch)
        edits = {}
        for name, subspaces in dict.fromkeys(rows):
            settings = self.reft_settings.get(name)
            if settings is not None and settings.strength != 0:
                edits[name, subspaces] = self._member(name, subspaces)
        return edits_of_rows(edits, rows, pass_.requests)

    def _member(self, name: str, subspaces: tuple[str, ...] | None) -> Edit:
        edit, settings = self.edit_of(name), self.reft_settings[name]
        if subspaces is None or not settings.subspaces:
            return edit
        return replace(edit, coordinates=settings.mask(subspaces))

    def _where(
        self, edit: Edit | RowEdits, pass_: Pass, hidden: torch.Tensor, name: str
    ) -> Selection | RowSelection | None:
        stream = pass_.streams[self.stream]
        if isinstance(edit, RowEdits):
            if hidden.dim() == 2:  # [rows, features]: without a token axis every row counts
                return RowSelection(torch.ones(len(hidden), 1, dtype=torch.int8, device=hidden.device))
            return stream.select_by_row(edit.positions, hidden, name, pass_.in_graph)
        if hidden.dim() == 2:
            return EVERY_TOKEN
        select = stream.select_in_graph if pass_.in_graph else stream.select
        return select(edit.positions, hidden, name)

    def __repr__(self) -> str:
        adapters = ", ".join(f"{name}: {settings.positions}" for name, settings in self.reft_settings.items())
        return f"{type(self).__name__}({self.out_features}, {adapters})"


def layers(model: nn.Module) -> Iterator[ReftLayer]:
    """The layers of a model."""
    for _, module in named_modules(model):
        yield from ReftLayer.of(module)


def _by_row(pass_: Pass) -> bool:
    """Whether each row of a pass names its adapter."""
    return pass_.requests is not None and pass_.requests.adapters is not None

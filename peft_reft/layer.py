"""The adapter layer: a child of a hooked module that edits the module's output, or its input."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_reft import merging
from peft_reft.apply import edit_rows, edit_tokens, shaped
from peft_reft.components import INPUT, OUTPUT
from peft_reft.config import ReftConfig
from peft_reft.interventions import INTERVENTIONS, Intervention, precise
from peft_reft.modules import modules_around, named_modules
from peft_reft.sites import Site
from peft_reft.tokens.passes import EVERYTHING, Plan, RowSelection
from peft_reft.tokens.positions import Positions
from peft_reft.tokens.requests import RowEdit, Rows
from peft_reft.tracker import PromptTracker

# What is edited -> the name of the layer that does it. Names with "reft_" in them would be taken for parameters.
CHILD_NAMES = {OUTPUT: "reft", INPUT: "input_reft"}


@dataclass
class AdapterSettings:
    """How an adapter acts at one site.

    Attributes:
        positions: the tokens that it edits.
        strength: factor of its edits; 0 leaves the model as it is.
        subspaces: name -> its coordinates in the subspace of dimension `r`.
        coordinates: float32 `[r]`, 1 for the coordinates that are edited; None for all.
        freeze_subspace: whether the projection is never trained.
    """

    positions: Positions
    strength: float = 1.0
    subspaces: dict[str, range] = field(default_factory=dict)
    coordinates: torch.Tensor | None = None
    freeze_subspace: bool = False

    def mask(self, names: Sequence[str]) -> torch.Tensor:
        """1 for the coordinates of the named subspaces, 0 for the others; float32 `[r]`. Other names count nothing."""
        mask = torch.zeros(sum(map(len, self.subspaces.values())))
        for name in names:
            mask[list(self.subspaces.get(name, ()))] = 1
        return mask


class Action(NamedTuple):
    """What an adapter does in one pass; see `AdapterSettings`."""

    adapter: str
    intervention: Intervention
    positions: Positions
    strength: float
    coordinates: torch.Tensor | None


class ReftLayer(nn.Module, BaseTunerLayer):
    """Holds the interventions of all adapters at one site, and applies the active ones in the order they were given.

    Unlike other tuner layers it does not wrap the module it adapts: `attach` adds it to the module as the child
    `reft` (`input_reft` where it edits the input) and hooks the module's forward pass, so that parameter names and
    module classes of the base model stay.

    Args:
        site: the module whose output or input is edited.
        tracker: knows which tokens of the current pass are prompt.
    """

    adapter_layer_names = ("reft_intervention",)
    other_param_names = ("reft_settings",)

    def __init__(self, site: Site, tracker: PromptTracker) -> None:
        super().__init__()
        self.in_features = self.out_features = site.features
        self.site_name = site.name
        self.side = site.side
        self.index, self.depth, self.is_block = site.index, site.depth, site.is_block
        self.stream = site.stream
        self.tracker = tracker
        self.reft_intervention = nn.ModuleDict()
        self.reft_settings: dict[str, AdapterSettings] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._handle: RemovableHandle | None = None
        self._reach: float = 0
        self._unmerged: merging.Original | None = None
        self._merged_edits: dict[str, merging.Edit] = {}

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
            site.module.add_module(CHILD_NAMES[site.side], layer)
            # The handle travels with copies and pickles, and keeps its number from being given to another hook there.
            if site.side == INPUT:
                layer._handle = site.module.register_forward_pre_hook(layer.edit_input, with_kwargs=True)
            else:
                # Before other hooks: Transformers records hidden states in one, which are to be the edited ones.
                layer._handle = site.module.register_forward_hook(layer.edit_output, prepend=True)
        return layer

    @classmethod
    def at(cls, site: Site) -> ReftLayer | None:
        """The layer of a site, if there is one.

        Raises:
            ValueError: something else has taken its name.
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

    def detach(self, module: nn.Module) -> None:
        """Take the layer and its hook from the module that it was attached to."""
        del module._modules[CHILD_NAMES[self.side]]
        self._handle.remove()

    def is_in(self, block: int) -> bool:
        """Whether the layer is at, or in, the block of this number; negative numbers count from the end."""
        return self.index is not None and self.index in (block, block + self.depth)

    def update_layer(self, adapter_name: str, config: ReftConfig, module: nn.Module) -> None:
        """Add an adapter, on the device of `module`, in float32."""
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
        )
        if not any(parameter.is_meta for parameter in intervention.parameters()):
            intervention.to(_device(module))
        intervention.train(self.training)
        self.reft_intervention[adapter_name] = intervention
        self._reach = max(self._reach, _reach(positions))
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
            # Asking is faster: most adapters of many stay as they are.
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters; subspaces that are set to be frozen stay so."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_subspaces()

    def _freeze_subspaces(self) -> None:
        for name, settings in self.reft_settings.items():
            if settings.freeze_subspace and name in self.reft_intervention:
                self.reft_intervention[name].projection.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; when no other is active, the first of the model's remaining ones becomes so."""
        # Every layer chooses alike, although not every adapter is on every layer. The list is kept here, since
        # Transformers deletes adapters without the tuner.
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
        self._reach = max((_reach(settings.positions) for settings in self.reft_settings.values()), default=0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing. PEFT calls it to merge adapters of another method on the same model; see `merge_into`."""

    def unmerge(self) -> None:
        """Nothing, as `merge`."""

    def why_not_merge(self, module: nn.Module, adapter_name: str) -> str | None:
        """What keeps an adapter from being merged into the edited module, None if nothing does."""
        positions, intervention = self.reft_settings[adapter_name].positions, self.reft_intervention[adapter_name]
        return merging.obstacle(module, str(positions), intervention, self.side == OUTPUT)

    def merge_into(self, module: nn.Module, adapter_names: list[str] | None, safe: bool) -> None:
        """Merge adapters into the edited module, which `why_not_merge` has nothing against."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.reft_intervention]
        if not names:
            return
        original = self._unmerged or merging.Original(module)
        # Those of adapters that are merged already stay as they were at that time.
        edits = self._merged_edits | {name: self.affine_edit(name) for name in names}
        merging.merge(module, original, list(edits.values()), safe, self.site_name)
        self._unmerged, self._merged_edits, self.merged_adapters = original, edits, list(edits)

    def affine_edit(self, adapter_name: str) -> merging.Edit:
        """An adapter's edit as a function of hidden representations, without positions."""
        settings = self.reft_settings[adapter_name]
        return merging.Edit(self.reft_intervention[adapter_name], settings.strength, settings.coordinates)

    def lacks_bias(self, module: nn.Module, adapter_names: list[str] | None) -> bool:
        """Whether the edited module had no bias, and has or gets one with these adapters merged into it."""
        original = module if self._unmerged is None else self._unmerged
        names = [*self.merged_adapters, *(self.active_adapters if adapter_names is None else adapter_names)]
        return original.bias is None and any(name in self.reft_intervention and self._shifts(name) for name in names)

    def _shifts(self, adapter_name: str) -> bool:
        """Whether an affine edit moves a representation of zeros, so that a layer needs a bias to do the same."""
        zeros = next(self.reft_intervention[adapter_name].parameters()).new_zeros(1, self.out_features)
        return bool(self.affine_edit(adapter_name)(zeros).any())

    def unmerge_from(self, module: nn.Module) -> None:
        """Give the edited module back the weights that it had before anything was merged, bit for bit."""
        if self._unmerged is not None:
            self._unmerged.restore(module)
        self._unmerged, self._merged_edits, self.merged_adapters = None, {}, []

    def forget_original(self) -> None:
        """Make what is merged so for good."""
        self._unmerged = None

    def forward(self, hidden: Any) -> Any:
        """What it is given: an edited `nn.Sequential` runs through all of its children."""
        return hidden

    def edit_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook: the module's output with its hidden representations edited, None to leave it as it is."""
        plan = self.tracker.plan(self.stream)
        if plan.behind >= self._reach or self._is_idle(plan):
            return None
        hidden = _hidden_of(output, f"{self.site_name} does not return hidden representations: its output")
        # The first thing that the next block does is to normalize it, unless another hook changes it.
        keep_output = self.is_block and len(module._forward_hooks) == 1
        edited = self._edit(plan, hidden, f"{self.site_name} returned", keep_output)
        return None if edited is hidden else _with_hidden(output, edited)

    def edit_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Forward pre-hook: the module's arguments with the hidden representations edited, None to leave them."""
        plan = self.tracker.plan(self.stream)
        if plan.behind >= self._reach or self._is_idle(plan):
            return None
        named = {} if args else {"hidden_states": kwargs.get("hidden_states")}
        given = _hidden_of(args or named, f"{self.site_name} is not given hidden representations: its arguments")
        # Where accelerate runs blocks on several devices, it moves the input after this hook.
        hidden = given.to(next(self.reft_intervention.parameters()).device)
        keep_output = self.is_block and len(module._forward_pre_hooks) == 1
        edited = self._edit(plan, hidden, f"{self.site_name} was given", keep_output)
        if edited is hidden:
            return None
        return ((edited, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": edited})

    def _is_idle(self, plan: Plan) -> bool:
        if plan.rows is not None and self.merged_adapters:
            raise ValueError(
                f"Cannot pass `{plan.rows.argument}` when there are merged adapters, please call `unmerge_adapter` "
                "first."
            )
        if plan.rows is None or plan.rows.adapters is None:
            return len(self._actions(plan)) == 0
        return self._disable_adapters or not any(name in self.reft_intervention for name in plan.rows.adapters)

    def _actions(self, plan: Plan) -> tuple[Action, ...]:
        """What adapters do here, where rows do not choose their own: in all of a pass what was set at first.

        So a checkpointed module does the same once more in the backward pass, whatever was set in between.
        """
        if torch.compiler.is_compiling():
            return self._current_actions()
        if self not in plan.actions:
            plan.actions[self] = self._current_actions()
        return plan.actions[self]

    def _current_actions(self) -> tuple[Action, ...]:
        actions = []
        for name in () if self._disable_adapters else self.active_adapters:
            if name in self.reft_intervention and name not in self.merged_adapters:
                settings = self.reft_settings[name]
                # In training the parameters get their gradients, which are zero.
                if settings.strength != 0 or self.training:
                    intervention = self.reft_intervention[name]
                    actions.append(
                        Action(name, intervention, settings.positions, settings.strength, settings.coordinates)
                    )
        return tuple(actions)

    def _edit(self, whole_plan: Plan, hidden: torch.Tensor, name: str, keep_output: bool) -> torch.Tensor:
        """`hidden` itself where nothing is edited."""
        if hidden.shape[-1] != self.out_features:
            raise ValueError(
                f"{name} {tuple(hidden.shape)}, but its adapters were built for "
                f"{self.out_features} features. Give the module the right out_features, or target another one."
            )
        plan, grid = whole_plan, hidden
        if hidden.dim() == 2 and plan.shape is not None and len(hidden) == plan.shape[0] * plan.shape[1]:
            # Some models put all tokens on one axis for a while.
            grid = hidden.unflatten(0, plan.shape)
        plan = plan.of(grid)
        if plan.rows is not None and plan.rows.adapters is not None:
            edited = self._edit_by_row(plan, grid, name)
        else:
            edited = self._edit_alike(plan, grid, name, self._actions(whole_plan), keep_output)
        return hidden if edited is grid else shaped(edited, hidden.shape)

    def _edit_alike(
        self, plan: Plan, hidden: torch.Tensor, name: str, actions: tuple[Action, ...], keep_output: bool
    ) -> torch.Tensor:
        for action in actions:
            # [rows, features]: without a token axis every row counts.
            selection = EVERYTHING if hidden.dim() == 2 else plan.selection(action.positions, hidden, name)
            if selection is None:
                continue
            hidden = edit_tokens(
                action.intervention,
                selection,
                hidden,
                self._coordinates(action, plan.rows, hidden),
                strength=action.strength,
                session=self.tracker.generation,
                keep_output=keep_output,
            )
        return hidden

    def _coordinates(self, action: Action, rows: Rows | None, hidden: torch.Tensor) -> torch.Tensor | None:
        by_row = None if rows is None else rows.coordinates(self, action.adapter, len(hidden))
        coordinates = action.coordinates if by_row is None else by_row
        return None if coordinates is None else coordinates.to(hidden.device, precise(hidden.dtype))

    def _edit_by_row(self, plan: Plan, hidden: torch.Tensor, name: str) -> torch.Tensor:
        for edits in plan.rows.edits(self, len(hidden)):
            selection = self._selection_by_row(plan, edits, hidden, name)
            if selection is not None:
                grid = hidden.unsqueeze(1) if hidden.dim() == 2 else hidden
                hidden = shaped(edit_rows(edits.stacked(precise(hidden.dtype)), selection, grid), hidden.shape)
        return hidden

    @staticmethod
    def _selection_by_row(plan: Plan, edits: RowEdit, hidden: torch.Tensor, name: str) -> RowSelection | None:
        if hidden.dim() == 2:
            return RowSelection(torch.ones(len(hidden), 1, dtype=torch.int8, device=hidden.device))
        return plan.selection_by_row(edits.positions, hidden, name)

    def __repr__(self) -> str:
        adapters = ", ".join(f"{name}: {settings.positions}" for name, settings in self.reft_settings.items())
        return f"{type(self).__name__}({self.out_features}, {adapters})"


def layers(model: nn.Module) -> Iterator[tuple[nn.Module, ReftLayer]]:
    """Every edited module of a model with its layer (or layers)."""
    for _, module in named_modules(model):
        for layer in ReftLayer.of(module):
            yield module, layer


def _reach(positions: Positions) -> float:
    """How many tokens behind the prompt are edited at most; decoding steps behind those have nothing to do."""
    return math.inf if positions.tail else positions.counted


def _device(module: nn.Module) -> torch.device:
    hook_devices = (getattr(getattr(m, "_hf_hook", None), "execution_device", None) for m in modules_around(module))
    device = next((device for device in hook_devices if device is not None), None)
    if device is not None:
        return torch.device(device)
    tensors = (t for m in modules_around(module) for t in (*m._parameters.values(), *m._buffers.values()))
    return next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))


def first_tensor(output: Any) -> Any:
    """The hidden representations in what a module is given or returns: its first value, unless it is one itself."""
    values = output.values() if isinstance(output, Mapping) else output
    return output if isinstance(output, torch.Tensor) else next(iter(values), None)


def _hidden_of(output: Any, complaint: str) -> torch.Tensor:
    hidden = first_tensor(output)
    if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point() or hidden.dim() < 2:
        raise TypeError(
            f"{complaint} (or the first value of it) must be a floating point tensor [batch, tokens, features] or "
            f"[rows, features], got {_describe(hidden)}."
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

"""The tuner: attaches ReFT layers to a model, and removes them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, onload_layer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_reft import merging
from peft_reft.attach import track, tracker_of, untrack
from peft_reft.config import ReftConfig
from peft_reft.layer import CHILD_NAMES, ReftLayer, layers
from peft_reft.methods import SteeringMixin
from peft_reft.modules import modules_around, named_modules
from peft_reft.sites import Site, find_sites, is_encoder_decoder, matches
from peft_reft.tokens.positions import Positions
from peft_reft.tokens.requests import AdapterNames, RowRequests
from peft_reft.tracker import Entry


class ReftModel(SteeringMixin, BaseTuner):
    """
    Edits hidden representations of a frozen model (ReFT, Wu et al. 2024, https://arxiv.org/abs/2404.03592).

    **The model is changed in place**: every edited module gets a child `reft` and a forward hook; the model and the
    parts that hold its blocks get a hook and a stand-in for `forward`, a model that generates one for `generate`; 4-bit
    layers of bitsandbytes no longer repack their weights on a CPU. `unload()` undoes all of it. No weight changes, and
    no module is replaced.

    Args:
        model (`torch.nn.Module`): The model to adapt.
        config ([`ReftConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`, *optional*): Create the adapter's weights on the meta device, to load them later.

    Returns:
        `torch.nn.Module`: The model with the adapter.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_reft import ReftConfig

        >>> base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_peft_model(base, ReftConfig(r=4, positions="f5+l5", task_type="CAUSAL_LM"))
        >>> model.print_trainable_parameters()
        ```
    """

    prefix: str = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}
    # The text between the name of an edited module and the name of a parameter of its adapters.
    _markers = re.compile(rf"\.(?:{'|'.join(CHILD_NAMES.values())})\.{prefix}")

    def _prepare_adapter_config(self, peft_config: ReftConfig, model_config: dict) -> ReftConfig:
        return peft_config

    def _prepare_model(self, peft_config: ReftConfig, model: nn.Module) -> None:
        if isinstance(model, PeftModel):
            raise ValueError(
                "The model to adapt is a PeftModel. To add ReFT to its adapters, adapt the model inside: "
                "get_peft_model(model.get_base_model(), config, adapter_name='reft')."
            )
        _refuse_loading_beside_disk(model)
        # Raises before the model changes. Kept for the matching that follows, which only sees names.
        self._sites: dict[str, list[Site]] = {}
        for site in find_sites(model, peft_config):
            ReftLayer.at(site)
            self._sites.setdefault(site.name, []).append(site)

    def _check_target_module_exists(self, peft_config: ReftConfig, key: str) -> bool | _ExcludedModule:
        if key not in self._sites and matches(peft_config.exclude_modules, key):
            # Without it PEFT warns that `exclude_modules` had no effect.
            return _ExcludedModule()
        return key in self._sites

    def _check_target_module_compatiblity(self, peft_config: ReftConfig, model: nn.Module, target_name: str) -> None:
        """Hooks work on any module."""

    def _add_modules_to_save_to_tie(self, peft_config: ReftConfig, tied_weight_keys: list[str]) -> None:
        """Have PEFT train one copy of the input embedding, shared by all modules that the model ties to it."""
        embedding, tied = self.model.get_input_embeddings(), set(tied_weight_keys)
        name = next(name for name, module in named_modules(self.model) if module is embedding)
        saved = [part for part in peft_config.modules_to_save if not any(_ends_with(key, part) for key in tied)]
        peft_config.modules_to_save = saved if any(_ends_with(name, part) for part in saved) else [*saved, name]
        # Read by PEFT, which does not save it.
        peft_config.modules_to_tie = tied

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        *args: Any,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to a model; see PEFT's `BaseTuner.inject_adapter`. Mutates the model.

        Raises:
            ValueError: the name is not allowed, the config selects nothing in the model, or `state_dict` has weights
                for modules that the config does not select.
        """
        _check_name(model, adapter_name)
        # If the model has adapters already, PEFT stores it only on the model, where another tuner may delete it.
        if "peft_config" not in vars(self):
            self.peft_config = self.peft_config
        if state_dict is not None:
            self._check_state_dict(model, self.peft_config[adapter_name], state_dict)
            # PEFT takes the text before the prefix for the target; here it ends with a child of the target.
            state_dict = {self._markers.sub(f".{self.prefix}", key): value for key, value in state_dict.items()}
        super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        config = self.peft_config[adapter_name]
        subspaces = tuple(config.subspaces or ())
        modules = bool(config.modules_to_save or config.trainable_token_indices)
        tracker_of(model).add(adapter_name, AdapterNames(config.parsed_positions, subspaces, modules))
        _warn_of_completion(model, config.parsed_positions)

    def _check_state_dict(self, model: nn.Module, config: ReftConfig, state_dict: dict[str, torch.Tensor]) -> None:
        named = {self._markers.split(key)[0] for key in state_dict if self._markers.search(key)}
        left_out = named - {site.name for site in find_sites(model, config)}
        if left_out:
            raise ValueError(
                f"state_dict has weights for {sorted(left_out)}, which the config does not select in this model."
            )

    def _create_and_replace(
        self,
        peft_config: ReftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        for site in self._sites[current_key]:
            layer = ReftLayer.attach(site, tracker_of(self.model) or track(self.model))
            layer.update_layer(adapter_name, peft_config)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype and not _has_reft_alone(self.model):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        # PEFT's version visits every adapter.
        for layer in layers(self.model):
            if adapter_name not in layer.reft_intervention:
                continue
            intervention = layer.reft_intervention[adapter_name]
            if autocast_adapter_dtype:
                if any(parameter.element_size() < 4 for parameter in intervention.parameters()):
                    intervention.float()
                continue
            # As with LoRA, no autocast means the dtype of the adapted module.
            floats = (p.dtype for p in _own_parameters(layer) if p.is_floating_point())
            if (dtype := next(floats, None)) is not None:
                intervention.to(dtype)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        if not _has_reft_alone(model):
            super()._mark_only_adapters_as_trainable(model)
            return
        # PEFT's version visits every adapter.
        for module in modules_around(model):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if (names := kwargs.get("adapter_names")) is None:
            yield
            return
        tracker = Entry.of(self.model).tracker
        # Threads of a server take turns, as in `generate`.
        with tracker.lock, tracker.asking(RowRequests(names, None)):
            yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """
        Merge adapters into the weights of the linear layers whose output they edit. Mutates the model;
        `unmerge_adapter` restores the weights.

        Exact for affine edits (no `act_fn`) of all tokens (`positions="all"`) after a linear layer, up to the rounding
        of the weights. A layer without a bias gets one if an edit has a `b`. Merged adapters edit in the order in which
        they were merged, and before unmerged ones. A copy of the original weights is kept.

        Args:
            adapter_names (`list[str]`, *optional*): The adapters, by default the active ones.
            safe_merge (`bool`, *optional*): Check that the new weights are finite before they replace the old ones.

        Raises:
            ValueError: An adapter cannot be merged exactly; the message names the layer and the reason. The model is
                then unchanged.
        """
        self._check_exact_merge(adapter_names)
        touched: list[tuple[ReftLayer, list[str]]] = []
        try:
            for layer in list(layers(self.model)):
                touched.append((layer, layer.merged_adapters))
                with onload_layer(layer.host):
                    layer.merge(safe_merge, adapter_names)
        except Exception:
            for layer, before in touched:
                with onload_layer(layer.host):
                    layer.unmerge()
                    layer.merge(False, before)
            raise

    def unmerge_adapter(self) -> None:
        """Restore the weights from before merging, bit for bit. The adapters edit as before."""
        for layer in list(layers(self.model)):
            with onload_layer(layer.host):
                layer.unmerge()

    def disable_adapter_layers(self) -> None:
        """Disable all adapters. Merged ones are unmerged first."""
        self.unmerge_adapter()
        super().disable_adapter_layers()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. Merged ones are unmerged first, with a warning."""
        if self._merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        super().set_adapter(adapter_name, inference_mode)

    @property
    def _merged(self) -> bool:
        return any(layer.merged_adapters for layer in layers(self.model))

    def _check_exact_merge(self, adapter_names: list[str] | None) -> None:
        if unknown := sorted(set(adapter_names or ()) - set(self.peft_config)):
            raise ValueError(f"There is no adapter {unknown[0]!r} to merge; there are {sorted(self.peft_config)}.")
        for layer in layers(self.model):
            for name in layer.active_adapters if adapter_names is None else adapter_names:
                if name not in layer.reft_intervention or name in layer.merged_adapters:
                    continue
                why = layer.why_not_merge(name) or self._tied(layer.host)
                if why is not None:
                    raise ValueError(
                        f"The ReFT adapter {name!r} cannot be merged exactly: at {layer.site_name!r} {why}. Keep the "
                        "adapter, which costs little, or remove it with unload(). For use_vllm=True in TRL's "
                        "trainers, create the trainer in `with peft_reft.integrations.trl.vllm_rollouts():`."
                    )

    def _tied(self, module: nn.Module) -> str | None:
        weight = module.weight
        for name, other in self.model.named_modules():
            if other is not module and other._parameters.get("weight") is weight:
                return f"the weight is shared with {name!r}"
        return None

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._merge_for_good(safe_merge, adapter_names)
        else:
            self.unmerge_adapter()
        names = set(tracker_of(self.model).adapters)
        for layer in list(layers(self.model)):
            layer.detach()
        untrack(self.model)
        model = super()._unload_and_optionally_merge(False, progressbar)
        if self.peft_config.keys() - names:
            # Another method's adapters stay on the model, whose tuner shares this dictionary.
            for name in names:
                self.peft_config.pop(name, None)
            model.peft_config = self.peft_config
        return model

    def _merge_for_good(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        self._check_exact_merge(adapter_names)
        plain = isinstance(self.model, PreTrainedModel)
        flags = merging.bias_flags(self.model, self._new_biases(adapter_names)) if plain else None
        if safe_merge:
            self.merge_adapter(adapter_names, safe_merge)
        else:
            # Nothing can fail from here on, so each layer's original weights can be freed after it is merged.
            for layer in list(layers(self.model)):
                with onload_layer(layer.host):
                    layer.merge(False, adapter_names)
                layer.forget_original()
        if flags is not None:
            merging.add_biases(self.model, *flags)

    def _new_biases(self, adapter_names: list[str] | None) -> set[str]:
        """Names of the biases that merging adds, or has added."""
        biased = (layer for layer in layers(self.model) if layer.lacks_bias(adapter_names))
        return {f"{layer.site_name}.bias" for layer in biased}

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Only called to unwrap modules_to_save and layers of other methods, which stay. PEFT's own method needs a
        # `weight`, which many heads lack.
        if not isinstance(child, BaseTunerLayer):
            setattr(parent, child_name, new_module)


def _has_reft_alone(model: nn.Module) -> bool:
    """Whether the model has no other modules of PEFT: other methods, modules to save, trainable tokens."""
    adapts = (
        module for module in modules_around(model) if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    )
    return all(isinstance(module, ReftLayer) for module in adapts)


def _warn_of_completion(model: nn.Module, positions: Positions) -> None:
    """Warn if positions select only tokens after the prompt, and all tokens of the model are prompt."""
    generates = getattr(model, "can_generate", bool)()
    if not (generates or is_encoder_decoder(model) or positions.only(prompt=True, completion=False).words):
        warnings.warn(
            f"positions={str(positions)!r} selects tokens after the prompt, but {type(model).__name__} does not "
            "generate: all of its tokens are prompt, so nothing is edited unless forward gets prompt_mask. Use f<n>, "
            "l<n>, prompt or all.",
            stacklevel=2,
        )


def _ends_with(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")


def _check_name(model: nn.Module, adapter_name: str) -> None:
    """PEFT distinguishes the weights of different methods by the names of their adapters, which are module names."""
    if hasattr(nn.ModuleDict, adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot be the name of an adapter: adapters are kept in an nn.ModuleDict, "
            "which has an attribute of that name. Choose another one."
        )
    for module in modules_around(model):
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ReftLayer):
            names = {name for part in module.adapter_layer_names for name in getattr(module, part, ())}
            if adapter_name in names:
                raise ValueError(
                    f"The model has an adapter {adapter_name!r} of another method ({type(module).__module__}) already, "
                    "and PEFT would mix up their weights when it saves them. Choose another adapter_name."
                )


def _refuse_loading_beside_disk(model: nn.Module) -> None:
    # PEFT removes Accelerate's hooks before it loads an adapter, and offloads the model to disk again afterwards.
    device_map = getattr(model, "hf_device_map", None) or {}
    if "disk" in device_map.values() and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise NotImplementedError(
            "PEFT cannot load a ReFT adapter into a model with layers on disk (device_map): it would look for the "
            "adapter's weights there. Do it in two steps:\n"
            "    model = get_peft_model(base, PeftConfig.from_pretrained(folder))\n"
            "    set_peft_model_state_dict(model, load_peft_weights(folder))"
        )


def _own_parameters(layer: ReftLayer) -> Iterator[nn.Parameter]:
    """The parameters of the edited module."""
    adapters = {id(parameter) for parameter in layer.parameters()}
    return (parameter for parameter in layer.host.parameters() if id(parameter) not in adapters)

"""One-line summaries of adapters."""

from __future__ import annotations

from collections.abc import Sequence

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_reft.config import ReftConfig
from peft_reft.interventions import INTERVENTIONS
from peft_reft.layer import ReftLayer, layers
from peft_reft.modules import named_base_modules
from peft_reft.sites import matches
from peft_reft.steering import configs_of

# PEFT's default.
_LORA_RANK = 8


def summary(model: nn.Module) -> str:
    """One line per ReFT adapter of a model: method, rank, tokens, places and number of parameters.

    The number is compared with a LoRA adapter with PEFT's defaults, if PEFT has defaults for this type of model.

        >>> print(summary(model))
        default: loreft r=4 on l1, 3 of 3 layers, 780 parameters (29% of those of LoRA with r=8 on q_proj, v_proj)

    Raises:
        ValueError: the model has no ReFT adapters.
    """
    places = list(layers(model))
    names = dict.fromkeys(name for layer in places for name in layer.reft_intervention)
    if not names:
        raise ValueError(f"There is no ReFT adapter on this {type(model).__name__}.")
    return "\n".join(f"{name}: {_describe(model, name, places)}" for name in names)


def _describe(model: nn.Module, name: str, places: list[ReftLayer]) -> str:
    own = [layer for layer in places if name in layer.reft_intervention]
    interventions = [layer.reft_intervention[name] for layer in own]
    count = sum(parameter.numel() for part in interventions for parameter in part.parameters())
    parts = [describe_options(configs_of(model)[name])] if name in configs_of(model) else []
    parts += [_where(own), f"{count:,} parameters{_share_of_lora(model, count)}"]
    if name in own[0].merged_adapters:
        parts.append("merged")
    elif name not in own[0].active_adapters or own[0].disable_adapters:
        parts.append("not active")
    return ", ".join(parts)


def describe_options(config: ReftConfig) -> str:
    """Method, rank and tokens of a configuration."""
    rank = [f"r={config.r}"] if INTERVENTIONS[config.intervention].low_rank else []
    untied = [] if config.parsed_positions.shared else ["untied"]
    bias = [] if config.use_bias else ["without bias"]
    return " ".join([config.intervention, *rank, "on", config.positions, *untied, *bias])


def _where(own: list[ReftLayer]) -> str:
    blocks = {(layer.stream, layer.index) for layer in own}
    if any(index is None for _, index in blocks):
        return f"{len(own)} modules"
    depth = own[0].depth
    return f"{len(blocks)} of {depth} layers" if len({stream for stream, _ in blocks}) == 1 else f"{len(blocks)} layers"


def _share_of_lora(model: nn.Module, count: int) -> str:
    """A number of parameters as a share of a LoRA adapter's, in words; empty if PEFT has no LoRA defaults here."""
    base = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    model_type = None if base is None else base.config.get_text_config().model_type
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if targets is None:
        return ""
    widths = (_widths(module) for name, module in named_base_modules(base) if matches(targets, name))
    lora = sum(_LORA_RANK * (inputs + outputs) for inputs, outputs in widths)
    return f" ({count / lora:.0%} of those of LoRA with r={_LORA_RANK} on {_listed(targets)})" if lora else ""


def _widths(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return getattr(module, "in_features", 0), getattr(module, "out_features", 0)


def _listed(targets: Sequence[str] | str) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)

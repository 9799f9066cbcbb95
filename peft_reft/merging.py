"""Merges an adapter's edits into the weights of linear layers, where that is exact.

An affine edit of *all* tokens behind a linear layer `W0 h + b0` is another linear layer: with `M = I + s L^T (W - L)`
(LoReFT; `W` alone for DiReFT, and so on) its weight is `M W0` and its bias `M b0 + s L^T b`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_reft.interventions import Intervention


@dataclass
class Edit:
    """An affine edit: an intervention, its strength, and the coordinates that it edits (see `Intervention.forward`)."""

    intervention: Intervention
    strength: float = 1.0
    coordinates: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        coordinates = None if self.coordinates is None else self.coordinates.to(hidden)
        return self.strength * self.intervention.edit(hidden, None, coordinates)


class Original:
    """Weight and bias of a linear layer before anything was merged into it."""

    def __init__(self, linear: nn.Module) -> None:
        self.weight = linear.weight.data
        # What turns quantized numbers into weights.
        self.scales = (
            linear.weight.quant_state if _is_4bit(linear) else _row_scales(linear) if _is_8bit(linear) else None
        )
        self.bias = None if linear.bias is None else linear.bias.data.clone()

    def restore(self, linear: nn.Module) -> None:
        """Put them back, on the device (and, unless quantized, in the dtype) that the layer has by now."""
        device = linear.weight.device
        if _is_4bit(linear):
            linear.weight.data, linear.weight.quant_state = self.weight, self.scales
            linear.weight = linear.weight.to(device)
            linear.quant_state = linear.weight.quant_state
        elif _is_8bit(linear):
            _set_int8(linear, self.weight.to(device), self.scales.to(device))
        else:
            linear.weight.data = self.weight.to(linear.weight)
        if self.bias is None:
            linear.bias = None
        else:
            linear.bias.data = self.bias.to(linear.bias)


def obstacle(module: nn.Module, positions: str, intervention: Intervention, side_is_output: bool) -> str | None:
    """Why an adapter cannot be merged into the module it edits, None if it can."""
    if positions != "all":
        return f"positions={positions!r} edits some tokens only, but weights act on all of them (positions='all')"
    if not intervention.affine:
        return f"act_fn={intervention.act_name!r} makes the edit nonlinear"
    if not side_is_output:
        return "it edits the input of a module (component='block_input'), not the output of a linear layer"
    if isinstance(module, BaseTunerLayer):
        return "the layer is wrapped by another PEFT method; merge that one first"
    if not (isinstance(module, (nn.Linear, Conv1D)) or _quantized(module)):
        return (
            f"the edited module is a {type(module).__name__}, not a linear layer (component='attention_output' or "
            "'mlp_output', or linear layers in target_modules)"
        )
    if not _quantized(module) and not (type(module.weight) is nn.Parameter and module.weight.is_floating_point()):
        return f"its weights are stored as {type(module.weight).__name__} {module.weight.dtype}, which is not supported"
    return None


def merge(linear: nn.Module, edit: Edit, safe: bool, name: str) -> None:
    """Change the weight and the bias of `linear` to what it computes together with `edit`.

    Raises:
        ValueError: `safe` and the result is not finite; the layer is as it was then.
    """
    weight, bias = _merged(linear, edit)
    if safe and not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise ValueError(f"NaNs detected in the merged weights of {name!r}. The adapter seems to be broken.")
    _set_weight(linear, weight)
    if linear.bias is not None:
        linear.bias.data = bias.to(linear.bias)
    elif bias.any():
        dtype = linear.weight.dtype if linear.weight.is_floating_point() else edit_dtype(linear)
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def edit_dtype(linear: nn.Module) -> torch.dtype:
    """The dtype that a quantized layer computes in."""
    return getattr(linear, "compute_dtype", None) or torch.float16


def _merged(linear: nn.Module, edit: Edit) -> tuple[torch.Tensor, torch.Tensor]:
    dense = _dense(linear)
    precise = torch.float32 if dense.device.type == "mps" else torch.float64
    # A row of `columns` is what the layer puts out for one unit vector, without the bias.
    columns = dense.to(precise)
    columns = columns if isinstance(linear, Conv1D) else columns.mT
    zero = columns.new_zeros(1, columns.shape[1])
    bias = zero if linear.bias is None else linear.bias.detach().to(precise)[None]
    columns = columns + edit(columns) - edit(zero)
    return columns if isinstance(linear, Conv1D) else columns.mT, (bias + edit(bias))[0]


def _dense(linear: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, dequantized."""
    if not _quantized(linear):
        return linear.weight.detach()
    import bitsandbytes as bnb

    if _is_4bit(linear):
        return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return bnb.functional.int8_vectorwise_dequant(linear.weight.data, _row_scales(linear))


def _set_weight(linear: nn.Module, weight: torch.Tensor) -> None:
    if not _quantized(linear):
        linear.weight.data = weight.to(linear.weight.dtype).contiguous()
        return
    import bitsandbytes as bnb

    if _is_4bit(linear):
        old = linear.weight
        new = bnb.nn.Params4bit(
            weight.to(old.quant_state.dtype).contiguous(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=linear,
        )
        # Moving it, if only to where it is, quantizes it.
        linear.weight = new.to(old.device)
    else:
        _set_int8(linear, *bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))[:2])


def _set_int8(linear: nn.Module, weight: torch.Tensor, scales: torch.Tensor) -> None:
    import bitsandbytes as bnb

    # The first forward pass takes both over into the layer's state.
    linear.state.CB = linear.state.SCB = None
    linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scales)


def _row_scales(linear: nn.Module) -> torch.Tensor:
    return linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB


def _quantized(module: nn.Module) -> bool:
    return _is_4bit(module) or _is_8bit(module)


def _is_4bit(module: nn.Module) -> bool:
    if not is_bnb_4bit_available():
        return False
    import bitsandbytes as bnb

    return isinstance(module, bnb.nn.Linear4bit)


def _is_8bit(module: nn.Module) -> bool:
    if not is_bnb_available():
        return False
    import bitsandbytes as bnb

    return isinstance(module, bnb.nn.Linear8bitLt)


# A merged model as a plain Transformers model: biases have to be where its class would create them.


def bias_flags(model: PreTrainedModel, biases: set[str]) -> tuple[dict[str, list[str]], set[str]]:
    """Options of the model's configuration that make its class create biases which it does not have.

    Args:
        model: the model.
        biases: names of the biases that are needed.

    Returns:
        Name of each part of the configuration (`""` for all of it) -> names of the options to switch on; and all
        biases that the class then has and this model has not.

    Raises:
        ValueError: no option gives the class all of these biases.
    """
    plain = _parameter_names(model, {})
    flags: dict[str, list[str]] = {}
    created: set[str] = set()
    for part, name in _bias_options(model.config):
        gained = _parameter_names(model, {part: [name]}) - plain
        if gained & biases:
            flags.setdefault(part, []).append(name)
            created |= gained
    if missing := sorted(biases - created - plain):
        raise ValueError(
            f"Merging gives {missing[0]!r} (and {len(missing) - 1} more) a value, but {type(model).__name__} has no "
            "such bias and no option for it in its configuration, so the merged model would lose it when it is saved "
            "and loaded. merge_adapter() merges in memory."
        )
    return flags, created


def add_biases(model: PreTrainedModel, flags: dict[str, list[str]], created: set[str]) -> None:
    """Switch options on, and give the model the biases that come with them, zero where there is none yet."""
    _switch_on(model.config, flags)
    for name in created:
        linear = model.get_submodule(name.rpartition(".")[0])
        if linear.bias is None:
            width = linear.nf if isinstance(linear, Conv1D) else linear.out_features
            dtype = edit_dtype(linear) if _quantized(linear) else linear.weight.dtype
            linear.bias = nn.Parameter(
                torch.zeros(width, dtype=dtype, device=linear.weight.device), requires_grad=False
            )


def _bias_options(config: PretrainedConfig) -> Iterator[tuple[str, str]]:
    parts = {"": config} | {name: v for name, v in vars(config).items() if isinstance(v, PretrainedConfig)}
    for part, values in parts.items():
        for name, value in vars(values).items():
            if "bias" in name and value is False:
                yield part, name


def _switch_on(config: PretrainedConfig, flags: dict[str, list[str]]) -> None:
    for part, names in flags.items():
        for name in names:
            setattr(getattr(config, part) if part else config, name, True)


def _parameter_names(model: PreTrainedModel, flags: dict[str, list[str]]) -> set[str]:
    """Names of the parameters that the model's class creates with these options."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _switch_on(config, flags)
    with torch.device("meta"):
        return {name for name, _ in type(model)(config).named_parameters()}

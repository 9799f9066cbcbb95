"""Merges an adapter's edits into the weights of linear layers, where that is exact.

An affine edit of *all* tokens after a linear layer `W0 h + b0` gives another linear layer: with
`M = I + s L^T (W - L)` (LoReFT; `W` alone for DiReFT, and so on) its weight is `M W0` and its bias `M b0 + s L^T b`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_reft.edits import Edit
from peft_reft.interventions import Intervention

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Original:
    """Weight and bias of a linear layer before anything was merged into it."""

    def __init__(self, linear: nn.Module) -> None:
        self.weight = linear.weight.data
        # What dequantizes the weight.
        self.scales = (
            linear.weight.quant_state if _is_4bit(linear) else _row_scales(linear) if _is_8bit(linear) else None
        )
        self.bias = None if linear.bias is None else linear.bias.data.clone()

    def dense(self) -> torch.Tensor:
        """The weight, dequantized."""
        if self.scales is None:
            return self.weight
        import bitsandbytes as bnb

        if isinstance(self.scales, torch.Tensor):
            return bnb.functional.int8_vectorwise_dequant(self.weight, self.scales)
        return bnb.functional.dequantize_4bit(self.weight, self.scales)

    def restore(self, linear: nn.Module) -> None:
        """Restore weight and bias, on the layer's current device (and, unless quantized, in its current dtype)."""
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
    """Why an adapter cannot be merged into the module it edits, None if it can.

    Args:
        module: the edited module.
        positions: the position spec of the adapter.
        intervention: its intervention at the module.
        side_is_output: whether it edits the module's output.
    """
    if positions != "all":
        return f"positions={positions!r} edits only some tokens, but weights act on all of them (positions='all')"
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
    if module.weight.is_meta:
        return "its weights are offloaded; load the whole model into memory"
    if _quantized(module):
        return None
    if not (type(module.weight) is nn.Parameter and module.weight.dtype in _DTYPES):
        return f"its weights are stored as {type(module.weight).__name__} {module.weight.dtype}, which is not supported"
    if not _is_affine(module):
        return f"{type(module).__name__} does not compute its weight times its input plus its bias"
    return None


@torch.no_grad()
def _is_affine(linear: nn.Module) -> bool:
    """Whether a linear layer computes what merging assumes; subclasses may override the forward pass."""
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight = linear.weight if isinstance(linear, Conv1D) else linear.weight.mT
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, weight.shape[0], generator=generator).to(weight)
    expected = inputs @ weight + (0 if linear.bias is None else linear.bias)
    try:
        outputs = type(linear).forward(linear, inputs)
    except (RuntimeError, TypeError, ValueError):
        return False
    return outputs.shape == expected.shape and bool((outputs - expected).norm() < 1e-2 * expected.norm())


def merge(linear: nn.Module, original: Original, edits: Mapping[str, Edit], safe: bool, where: str) -> None:
    """Set the weight and bias of `linear` to those of the original layer followed by edits, one after the other.

    Mutates `linear`. All edits are rounded (and quantized) together, once.

    Args:
        linear: the layer.
        original: its weight and bias before anything was merged.
        edits: name of each adapter -> its edit.
        safe: whether to check the result before it replaces anything.
        where: name of the layer in messages.

    Raises:
        ValueError: `safe` and the result is not finite; the layer is then unchanged.
    """
    weight, bias = _merged(linear, original, list(edits.values()))
    weight, bias = weight.to(_weight_dtype(linear)), bias.to(_weight_dtype(linear))
    if safe and not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        broken = [name for name, edit in edits.items() if not _is_finite(edit)]
        names = ", ".join(broken or edits)
        raise ValueError(f"NaNs detected in the merged weights. The adapter {names} seems to be broken (at {where!r}).")
    _set_weight(linear, weight)
    if linear.bias is not None:
        linear.bias.data = bias.to(linear.bias)
    elif bias.any():
        linear.bias = nn.Parameter(bias, requires_grad=False)


def _is_finite(edit: Edit) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in edit.intervention.parameters())


def _weight_dtype(linear: nn.Module) -> torch.dtype:
    """The dtype of a layer's weight before it is quantized."""
    if _is_4bit(linear):
        return linear.weight.quant_state.dtype
    return torch.float16 if _is_8bit(linear) else linear.weight.dtype


def _merged(linear: nn.Module, original: Original, edits: Sequence[Edit]) -> tuple[torch.Tensor, torch.Tensor]:
    dense = original.dense().to(linear.weight.device)
    precise = torch.float32 if dense.device.type == "mps" else torch.float64
    # A row of `columns` is the layer's output for one unit vector, without the bias.
    columns = dense.to(precise)
    columns = columns if isinstance(linear, Conv1D) else columns.mT
    zero = columns.new_zeros(1, columns.shape[1])
    bias = zero if original.bias is None else original.bias.to(columns)[None]
    for edit in edits:
        columns = columns + edit.function(columns) - edit.function(zero)
        bias = bias + edit.function(bias)
    return columns if isinstance(linear, Conv1D) else columns.mT, bias[0]


def _set_weight(linear: nn.Module, weight: torch.Tensor) -> None:
    if not _quantized(linear):
        linear.weight.data = weight.contiguous()
        return
    import bitsandbytes as bnb

    if _is_4bit(linear):
        old = linear.weight
        new = bnb.nn.Params4bit(
            weight.contiguous(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=linear,
        )
        # `to` quantizes it, even if the device does not change.
        linear.weight = new.to(old.device)
    else:
        _set_int8(linear, *bnb.functional.int8_vectorwise_quant(weight.contiguous())[:2])


def _set_int8(linear: nn.Module, weight: torch.Tensor, scales: torch.Tensor) -> None:
    import bitsandbytes as bnb

    # The first forward pass moves both into the layer's state.
    linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scales)


def _row_scales(linear: nn.Module) -> torch.Tensor:
    return linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB


def _quantized(module: nn.Module) -> bool:
    return _is_4bit(module) or _is_8bit(module)


def _is_4bit(module: nn.Module) -> bool:
    if not is_bnb_4bit_available():
        return False
    import bitsandbytes as bnb

    return isinstance(module, bnb.nn.Linear4bit) and getattr(module.weight, "quant_state", None) is not None


def _is_8bit(module: nn.Module) -> bool:
    if not is_bnb_available():
        return False
    import bitsandbytes as bnb

    return isinstance(module, bnb.nn.Linear8bitLt) and module.weight.dtype == torch.int8


# A merged model as a plain Transformers model: biases must be where its class would create them.


def bias_flags(model: PreTrainedModel, biases: set[str]) -> tuple[dict[str, list[str]], dict[str, torch.Size]]:
    """Options of the model's configuration that make its class create missing biases.

    Args:
        model: the model.
        biases: names of the biases that are needed.

    Returns:
        Name of each part of the configuration (`""` for all of it) -> names of the options to switch on; and all
        parameters that the class has with these options only, with their shapes.

    Raises:
        ValueError: no option gives the class all of these biases.
    """
    if not biases:
        return {}, {}
    plain = _parameter_shapes(model, {})
    flags: dict[str, list[str]] = {}
    created: dict[str, torch.Size] = {}
    for part, name in _bias_options(model.config):
        shapes = _parameter_shapes(model, {part: [name]})
        gained = {key: shape for key, shape in shapes.items() if key not in plain}
        if gained.keys() & biases:
            flags.setdefault(part, []).append(name)
            created |= gained
    if missing := sorted(biases - created.keys() - plain.keys()):
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise ValueError(
            f"Merging creates {missing[0]!r}{others}, but {type(model).__name__} has no such bias and no option for it "
            "in its configuration, so saving and loading the merged model would lose it. merge_adapter() merges in "
            "memory. Adapters trained with use_bias=False need no bias."
        )
    return flags, created


def add_biases(model: PreTrainedModel, flags: dict[str, list[str]], created: dict[str, torch.Size]) -> None:
    """Switch the options of `bias_flags` on, and add the biases that they create, as zeros. Mutates the model."""
    _switch_on(model.config, flags)
    for name, shape in created.items():
        module = model.get_submodule(name.rpartition(".")[0])
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if module.bias is None:
            zeros = torch.zeros(shape, dtype=_weight_dtype(module), device=module.weight.device)
            module.bias = nn.Parameter(zeros, requires_grad=False)


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


def _parameter_shapes(model: PreTrainedModel, flags: dict[str, list[str]]) -> dict[str, torch.Size]:
    """Names and shapes of the parameters that the model's class creates with these options."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _switch_on(config, flags)
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in type(model)(config).named_parameters()}

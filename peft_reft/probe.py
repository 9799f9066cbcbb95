"""Input and output shapes of the modules of a vision or audio model, found by a pass on the meta device.

Such models have blocks of different widths, and grids of places, features first or last. Neither their structure nor
their configurations say so in a uniform way, so a copy of the model without weights runs on the meta device.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from peft_reft.components import INPUT, OUTPUT
from peft_reft.layouts import first_tensor

_BATCH = 2
# Name of a module, side -> shape.
Shapes = dict[tuple[str, str], tuple[int, ...]]
# Results in this process, by model and names: further adapters reuse them.
_found: dict[tuple[type, str, tuple[str, ...]], list[Shapes]] = {}


def takes_places(model: PreTrainedModel) -> bool:
    """Whether a model's input is an image, a video or a sound, rather than tokens."""
    return model.main_input_name in ("pixel_values", "pixel_values_videos", "input_values")


def takes_tokens(model: PreTrainedModel) -> bool:
    """Whether a model takes token ids."""
    return "input_ids" in inspect.signature(model.forward).parameters


def shapes_of(model: PreTrainedModel, names: Sequence[str]) -> list[Shapes]:
    """Shapes at the blocks of these names in a model, and of the output of every module in them: for an input of the
    configured size, and for larger ones if the model takes them. Empty if the model does not run on the meta device.
    """
    try:
        key = (type(model), repr(model.config), tuple(names))
        if key not in _found:
            with torch.device("meta"):
                twin = type(model)(copy.deepcopy(model.config)).eval()
            _found[key] = list(_runs(twin, names))
        return _found[key]
    except Exception:
        # Models whose code depends on values of tensors, or on packages that are not installed.
        return []


def _runs(twin: PreTrainedModel, names: Sequence[str]) -> Iterator[Shapes]:
    found: Shapes = {}

    def keep(name: str, side: str, value: Any) -> None:
        hidden = first_tensor(value)
        if isinstance(hidden, torch.Tensor):
            found.setdefault((name, side), tuple(hidden.shape))

    for name in names:
        twin.get_submodule(name).register_forward_pre_hook(
            lambda m, args, kwargs, name=name: keep(name, INPUT, args or kwargs), with_kwargs=True
        )
    for name, module in twin.named_modules():
        module.register_forward_hook(lambda m, args, output, name=name: keep(name, OUTPUT, output))
    outputs = {(name, OUTPUT) for name in names}
    for group in _inputs(twin):
        whole = False
        for inputs in group:
            found.clear()
            # A failure after the blocks does not matter.
            with suppress(Exception), torch.no_grad():
                twin(**inputs)
            if found.keys() >= outputs:
                whole = True
                yield dict(found)
        if whole:
            return


def _inputs(model: PreTrainedModel) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Inputs to try, in groups of which one is enough: the first of a group has the configured size, the rest more."""
    name, config = model.main_input_name, model.config
    channels = _told(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    if name == "input_values":
        for leading in ((_BATCH, 1), (_BATCH,)):
            yield [{name: _empty(*leading, length)} for length in (30720, 61440)]
        return
    size = _told(config, "image_size", "input_size", default=224)
    height, width = map(int, (size if isinstance(size, (tuple, list)) else (size, size))[-2:])
    frames = _told(config, "frames_per_clip", "num_frames", default=4)
    for leading in ((channels,), (frames, channels), (channels, frames)):
        yield [{name: _empty(_BATCH, *leading, n * height, n * width)} for n in (1, 2, 4)]


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _told(config: PreTrainedConfig, *names: str, default: Any) -> Any:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), default)


def axis_of_features(shape: tuple[int, ...], larger: tuple[int, ...] | None) -> int:
    """Which axis holds features, given a shape and the shape for a larger input (None if there is none)."""
    last = len(shape) - 1
    if larger is not None and len(larger) == len(shape):
        steady = [axis for axis in range(1, len(shape)) if shape[axis] == larger[axis]]
        return steady[0] if len(steady) == 1 else last
    # The inputs are square images.
    return 1 if len(shape) == 4 and shape[2] == shape[3] != shape[1] else last

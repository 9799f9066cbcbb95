"""Reads ReFT adapters that AdapterHub's `adapters` saved.

A folder of `save_adapter` has an `adapter_config.json` with positions, sharing, dropout and activation, the weights by
their names in the model, and the prediction head. It does not store the option that distinguishes NoReFT from DiReFT
(adapters 1.3.0, which itself loads a saved DiReFT adapter as NoReFT).
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_reft.config import ReftConfig
from peft_reft.convert.common import Edit, ForeignAdapter, Place, Weights, read_base_weights
from peft_reft.convert.files import present, read_json, read_tensors
from peft_reft.stacks import only_block_list

CONFIG = "adapter_config.json"
HEAD_CONFIG = "head_config.json"

_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
_HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
_KEY = re.compile(
    r"(?P<stack>.+)\.(?P<layer>\d{1,9})\.reft_layer\.refts\.(?P<name>.+)\.units\.(?P<unit>[01])\.(?P<key>.+)"
)
# orthogonality, subtract_projection -> the method. If the latter is missing, `adapters` loads the first of two.
_METHODS = {
    (True, True): "loreft",
    (True, False): "direft",
    (False, True): "noreft",
    (False, False): "nodireft",
}
_ACTIVATIONS = {"leakyrelu": "leaky_relu"}
_MOST_LABELS = 2**16


def is_adapterhub(folder: Path) -> bool:
    """Whether a folder holds an adapter of `adapters`, of any method."""
    path = folder / CONFIG
    return present(path) and "peft_type" not in (config := read_json(path)) and "model_class" in config


def base_model(folder: Path) -> tuple[str | None, int | None]:
    """Name of the base model and number of labels in the folder, each None if the folder lacks it.

    Raises:
        ValueError: the name is not a string, or the number of labels is out of range.
    """
    path, head = folder / CONFIG, folder / HEAD_CONFIG
    name = read_json(path).get("model_name")
    if not isinstance(name, str | None):
        raise ValueError(f"{path}: 'model_name' is {name!r}.")
    labels = read_json(head).get("num_labels") if present(head) else None
    # Transformers creates a name for each label, so a huge number would exhaust memory.
    if labels is not None and not (type(labels) is int and 0 < labels <= _MOST_LABELS):
        raise ValueError(f"{head}: 'num_labels' is {labels!r}, but must be from 1 to {_MOST_LABELS}.")
    return name or None, labels


def read(folder: Path, model: PreTrainedModel, intervention: str | None = None) -> ForeignAdapter:
    """Read a folder, which `is_adapterhub`.

    Args:
        folder: the folder.
        model: the base model, for its names; its weights are not read.
        intervention: the method, needed for NoReFT and DiReFT.

    Raises:
        ValueError: the folder is broken, contradicts the arguments, or holds something without an exact counterpart.
        FileNotFoundError: it lacks a file.
    """
    path = folder / CONFIG
    full = read_json(path)
    _check_class(full, model, path)
    config = full.get("config")
    if not isinstance(config, dict) or config.get("architecture") != "reft":
        method = config.get("architecture") if isinstance(config, dict) else config
        raise ValueError(f"{path}: only ReFT adapters have a counterpart, this one's 'architecture' is {method!r}.")
    positions, units = _positions(config, path)
    name = _method(config, intervention, path)
    activation = _entry(config, path, "non_linearity", str, NoneType)
    options = {
        "intervention": name,
        "positions": positions,
        "share_weights": len(units) == 1,
        "act_fn": activation and _ACTIVATIONS.get(activation.lower(), activation.lower()),
        "dropout": _entry(config, path, "dropout", int, float),
    }
    try:
        ReftConfig(**options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return ForeignAdapter(options, _edits(folder, config, units, name, model), _head(folder))


def _check_class(config: dict[str, Any], model: PreTrainedModel, path: Path) -> None:
    name = str(config["model_class"])
    # `adapters`' own classes with heads hold the same base model; for others the class must be the same.
    if name != type(model).__name__ and not name.endswith("Model"):
        raise ValueError(
            f"{path}: the adapter was made for {name}, but the base model is {type(model).__name__}: pass the right "
            "task_type (--task-type), or the model itself."
        )


def _entry(config: dict[str, Any], path: Path, key: str, *kinds: type) -> Any:
    value = config.get(key)
    if type(value) not in kinds:
        raise ValueError(f"{path}: {key!r} is {value!r}.")
    return value


def _positions(config: dict[str, Any], path: Path) -> tuple[str, list[int]]:
    """The positions, and which of the saved units serves each word (one for all, if there is only one)."""
    first, last = (_entry(config, path, key, int) for key in ("prefix_positions", "suffix_positions"))
    tied = _entry(config, path, "tied_weights", bool)
    if min(first, last) < 0:
        raise ValueError(
            f"{path}: 'prefix_positions' is {first} and 'suffix_positions' {last}, but none can be negative."
        )
    words = [f"f{first}"] * (first > 0) + [f"l{last}"] * (last > 0)
    if not words:
        raise ValueError(f"{path}: 'prefix_positions' and 'suffix_positions' are both 0, nothing is edited.")
    units = [0] if tied else [0] * (first > 0) + [1] * (last > 0)
    return "+".join(words), units


def _method(config: dict[str, Any], asked: str | None, path: Path) -> str:
    orthogonal = _entry(config, path, "orthogonality", bool)
    subtracts = _entry(config, path, "subtract_projection", bool, NoneType)
    candidates = [_METHODS[orthogonal, known] for known in (True, False) if subtracts in (None, known)]
    if asked is not None and asked not in candidates:
        raise ValueError(f"intervention={asked!r}, but {path} fits {' or '.join(candidates)}.")
    if asked is None and subtracts is None and not orthogonal:
        raise ValueError(
            f"{path} fits NoReFT and DiReFT alike: `adapters` does not save 'subtract_projection', in which they "
            "differ. Pass the method that it was trained with as intervention (--intervention): 'noreft' for "
            "NoReftConfig, 'nodireft' for DiReftConfig. ('adapters' loads it as NoReFT in either case.)"
        )
    return asked or candidates[0]


def _edits(
    folder: Path, config: dict[str, Any], units: list[int], method: str, model: PreTrainedModel
) -> dict[Place, list[Edit]]:
    path = _existing(folder, _WEIGHTS)
    if path is None:
        raise FileNotFoundError(f"{folder} has neither {' nor '.join(_WEIGHTS)}.")
    states: dict[tuple[int, int], dict[str, torch.Tensor]] = defaultdict(dict)
    prefixes = {}
    for key, tensor in read_tensors(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{path}: nothing is known of {key!r}; is it of another method than ReFT?")
        where = _layer(match["stack"], int(match["layer"]), model, path), int(match["unit"])
        states[where][match["key"]] = tensor
        prefix = key.removesuffix(match["key"])
        if prefixes.setdefault(where, prefix) != prefix:
            raise ValueError(f"{path} has two adapters for one layer: {prefix!r} and {prefixes[where]!r}.")
    layers = {layer for layer, _ in states}
    wanted = config.get("layers")
    if wanted == "all":
        wanted = list(range(len(only_block_list(model).blocks)))
    if not isinstance(wanted, list) or any(type(n) is not int for n in wanted) or layers != set(wanted):
        raise ValueError(f"{path} has weights for the layers {sorted(layers)}, but {CONFIG} names {wanted!r}.")
    edits = {}
    for layer in sorted(layers):
        saved = [
            _edit(Weights(states[layer, unit], path, prefixes.get((layer, unit), f"{layer}, unit {unit}: ")), config)
            for unit in units
        ]
        edits[Place("block_output", layer)] = saved
    return edits


def _layer(stack: str, layer: int, model: PreTrainedModel, path: Path) -> int:
    name = only_block_list(model).name
    # If the adapter was saved from a bare model, or is converted for one, a prefix is missing.
    if f".{name}".endswith(f".{stack}") or f".{stack}".endswith(f".{name}"):
        return layer
    raise ValueError(f"{path} has weights for {stack!r}, but the blocks of {type(model).__name__} are {name!r}.")


def _edit(weights: Weights, config: dict[str, Any]) -> Edit:
    if config["orthogonality"]:
        projection = weights.take_orthogonal("projection", tall=False)
    else:
        projection = weights.take("projection.weight", None, None)
    rank, features = projection.shape
    weight, bias = weights.take("learned_source.weight", rank, features), weights.take("learned_source.bias", rank)
    weights.finish()
    return Edit(projection, weight, bias, f"{weights.source}: {weights.prefix}*")


def _head(folder: Path) -> dict[str, torch.Tensor]:
    path = _existing(folder, _HEAD_WEIGHTS)
    weights = read_base_weights(path) if path is not None else {}
    foreign = [key for key in weights if key.startswith("heads.")]
    if foreign:
        raise ValueError(
            f"{path}: the prediction head {foreign[0]!r} is one that only `adapters` has. "
            "To convert only the edits, remove the head's files from a copy of the folder."
        )
    return weights


def _existing(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if present(folder / name)), None)

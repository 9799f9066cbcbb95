"""Reads adapters that pyreft saved.

A folder of `ReftModel.save` has a `config.json` of pyvene and a `torch.save` file for each intervention, named by what
it edits; a checkpoint of `ReftTrainer` has only these files. Neither holds positions, sharing, dropout or activation.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from peft_reft.components import COMPONENTS
from peft_reft.convert.common import Edit, ForeignAdapter, Place, Weights, read_base_weights
from peft_reft.convert.files import present, read_json, read_tensors
from peft_reft.stacks import only_block_list
from peft_reft.tokens.positions import Positions

TRAINER_FOLDER = "intervenable_model"
BASE_WEIGHTS = "pytorch_model.bin"

# Models whose attention and MLP end in a projection: pyvene's outputs of the whole are the projection's outputs.
_PLAIN_MODELS = ("gemma", "gemma2", "gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "olmo", "qwen2")
_FILE = re.compile(r"intkey_(?P<place>.+)_unit_(?P<unit>.+)_nunit_(?P<units>\d+)#(?P<number>\d+)\.bin")
_LORA_PREFIX = "base_model.model."


class _File(NamedTuple):
    """One intervention's file, the place that it edits, and its number among the interventions there."""

    path: Path
    place: Place
    number: int


def is_pyreft(folder: Path) -> bool:
    """Whether a folder holds interventions of pyreft, or contains the folder where its trainer saves them."""
    return any(any(place.glob("intkey_*.bin")) for place in (folder, folder / TRAINER_FOLDER))


def read(
    folder: Path,
    model: PreTrainedModel,
    positions: Positions,
    intervention: str | None = None,
    act_fn: str | None = None,
    dropout: float = 0.0,
) -> ForeignAdapter:
    """Read a folder, which `is_pyreft`.

    Args:
        folder: the folder.
        model: the base model, for its names; its weights are not read.
        positions: which tokens were edited.
        intervention: the method, needed if the files do not store it.
        act_fn, dropout: the options that the interventions were created with.

    Raises:
        ValueError: the folder is broken, contradicts the arguments, or holds something without an exact counterpart.
        FileNotFoundError: it lacks a file.
    """
    if not any(folder.glob("intkey_*.bin")):
        folder = folder / TRAINER_FOLDER
    files = _files_from_config(folder, model) if present(folder / "config.json") else _files_from_names(folder, model)
    name = _method(folder, files, intervention)
    edits: dict[Place, dict[int, Edit]] = defaultdict(dict)
    for file in files:  # one at a time: some hold a [d, d] matrix
        if file.number in edits[file.place]:
            raise ValueError(f"{file.path} edits the same place as another file of the folder, with the same number.")
        weights = Weights(read_tensors(file.path), file.path)
        edits[file.place][file.number] = _READERS[name](weights, act_fn)
        weights.finish()
    options = {
        "intervention": name,
        "positions": str(positions),
        "share_weights": positions.shared,
        "act_fn": act_fn,
        "dropout": dropout,
    }
    return ForeignAdapter(options, _by_words(edits, positions, folder), _base_weights(folder))


def _by_words(edits: dict[Place, dict[int, Edit]], positions: Positions, folder: Path) -> dict[Place, list[Edit]]:
    """The edits of each place in the order of the position words."""
    # pyreft puts first-words before last-words, in whichever order they are written.
    kinds = [word.kind for word in positions.words]
    order = [("first", "last").index(kind) for kind in kinds] if set(kinds) == {"first", "last"} else range(len(kinds))
    found = {}
    for place, numbered in edits.items():
        if sorted(numbered) != list(range(positions.units)):
            raise ValueError(
                f"{folder} has {len(numbered)} intervention(s) on {place.component!r}"
                f"{'' if place.layer is None else f' of layer {place.layer}'} (numbers {sorted(numbered)}), but "
                f"positions={str(positions)!r} with share_weights={positions.shared} need {positions.units}. Unshared "
                "words have one each, shared words one for all."
            )
        found[place] = [numbered[0]] if positions.units == 1 else [numbered[number] for number in order]
    return found


# The files and the places that they edit.


def _files_from_config(folder: Path, model: PreTrainedModel) -> list[_File]:
    """The files that the `config.json` lists, with the names that pyvene gives them."""
    path = folder / "config.json"
    seen: Counter[str] = Counter()
    files = []
    for entry in _config_list(path, "representations"):
        if not isinstance(entry, list) or len(entry) < 4:
            raise ValueError(f"{path}: 'representations' holds {entry!r}, not a list of pyvene's fields.")
        layer, component, unit, units = entry[:4]
        if unit != "pos" or units != 1:
            raise ValueError(f"{path}: interventions on unit {unit!r} x {units!r} have no counterpart, only 'pos' x 1.")
        where = f"comp_{component}" if "." in str(component) else f"layer_{layer}_comp_{component}"
        key = f"{where.replace('.', '_')}_unit_pos_nunit_1"
        file = folder / f"intkey_{key}#{seen[key]}.bin"
        files.append(_File(file, _place(str(component), layer, model, path), seen[key]))
        seen[key] += 1
    unlisted = sorted({file.name for file in folder.glob("intkey_*.bin")} - {file.path.name for file in files})
    if unlisted:
        raise ValueError(f"{path} does not list {', '.join(unlisted)}.")
    return files


def _files_from_names(folder: Path, model: PreTrainedModel) -> list[_File]:
    """All files of interventions, with the places in their names."""
    files = []
    for path in sorted(folder.glob("intkey_*.bin")):
        match = _FILE.fullmatch(path.name)
        if match is None or (match["unit"], match["units"]) != ("pos", "1"):
            raise ValueError(f"{path}: the name is not that of an intervention on single positions (unit 'pos' x 1).")
        numbered = re.fullmatch(r"layer_(-?\d+)_comp_(.+)", match["place"])
        if numbered:
            place = _place(numbered[2], int(numbered[1]), model, path)
        else:
            place = _place(_dotted(match["place"].removeprefix("comp_"), model, path), None, model, path)
        files.append(_File(path, place, int(match["number"])))
    return files


def _dotted(mangled: str, model: PreTrainedModel, path: Path) -> str:
    """The component whose dots pyvene replaced by underscores."""
    name, _, side = mangled.rpartition("_")
    name = re.sub(r"\[(\d+)\]", r"_\1", name).removeprefix(_LORA_PREFIX.replace(".", "_"))
    found = [module for module, _ in model.named_modules() if module.replace(".", "_") == name]
    if len(found) != 1:
        raise ValueError(
            f"{path}: the name must mean one module of {type(model).__name__}, but fits {found or 'none'}. Is this the "
            "right base model?"
        )
    return f"{found[0]}.{side}"


def _place(component: str, layer: int | None, model: PreTrainedModel, path: Path) -> Place:
    stack_of_blocks = only_block_list(model).name
    if "." not in component:
        _check_component(component, layer, model, path)
        return Place(component, layer)
    name, _, side = component.rpartition(".")
    name = re.sub(r"\[(\d+)\]", r".\1", name).removeprefix(_LORA_PREFIX)
    if name not in dict(model.named_modules()) or side not in ("input", "output"):
        raise ValueError(
            f"{path}: component {component!r} is no input or output of a module of {type(model).__name__}."
        )
    stack, _, index = name.rpartition(".")
    if stack == stack_of_blocks:
        return Place(f"block_{side}", int(index))
    if side == "input":
        raise ValueError(f"{path}: component {component!r}: only the input of a block has a counterpart.")
    return Place(name)


def _check_component(component: str, layer: Any, model: PreTrainedModel, path: Path) -> None:
    if component not in COMPONENTS:
        raise ValueError(f"{path}: component {component!r} has no counterpart; those of {list(COMPONENTS)} have.")
    if type(layer) is not int:
        raise ValueError(f"{path}: layer {layer!r} of component {component!r} is no number.")
    kind = model.config.get_text_config().model_type
    if not component.startswith("block_") and kind not in _PLAIN_MODELS:
        raise ValueError(
            f"{path}: component {component!r} of a {kind!r} model: it has only been verified for "
            f"{list(_PLAIN_MODELS)} that pyvene edits the same tensor."
        )


# The method.


def _method(folder: Path, files: list[_File], asked: str | None) -> str:
    """The method: the one in the config.json, else the one that fits the keys, else the one asked for.

    Raises:
        ValueError: the sources contradict each other, or leave several methods.
    """
    path = folder / "config.json"
    if present(path):
        candidates = {_class_method(text, path) for text in _config_list(path, "intervention_types")}
        if len(candidates) > 1:
            raise ValueError(f"{path}: 'intervention_types' mixes {sorted(candidates)}; an adapter has one method.")
        source = f"{path} has the method"
    else:
        candidates = set.intersection(*(_key_methods(read_tensors(file.path).keys()) for file in files))
        source = f"the keys in {folder} fit"
    if not candidates:
        raise ValueError(f"{folder}: the files have the keys of no method, or of different ones.")
    if asked is not None and asked not in candidates:
        raise ValueError(f"intervention={asked!r}, but {source} {' or '.join(sorted(candidates))}.")
    if asked is None and len(candidates) > 1:
        raise ValueError(
            f"There is no {path}, and {source} {' and '.join(sorted(candidates))} alike: say which it is with "
            "intervention (--intervention)."
        )
    return asked or candidates.pop()


def _class_method(text: str, path: Path) -> str:
    match = re.fullmatch(r"<class 'pyreft\.(?:\w+\.)*(\w+)Intervention'>", str(text))
    name = match[1].lower() if match else None
    if name not in _READERS:
        raise ValueError(f"{path}: 'intervention_types' holds {text!r}; known are pyreft's {sorted(_READERS)}.")
    return name


def _key_methods(keys: Collection[str]) -> set[str]:
    if "proj_layer.weight" in keys:
        return {"noreft", "nodireft"}
    if "rotate_layer" in keys:
        return {"loreft"}
    if "learned_source.weight" in keys:
        return {"direft"}
    return {"consreft", "lobireft"} if "learned_source" in keys else set()


def _config_list(path: Path, key: str) -> list[Any]:
    value = read_json(path).get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path}: {key!r} is {value!r}, not a list with entries. Is this a folder of pyreft?")
    return value


# The weights of each method, as its class in pyreft saves them.


def _loreft(weights: Weights, act_fn: str | None) -> Edit:
    rotation = weights.take("rotate_layer", None, None).mT
    rank, features = rotation.shape
    return Edit(rotation, weights.take("weight", rank, features), weights.take("bias", rank), weights.source)


def _noreft(weights: Weights, act_fn: str | None) -> Edit:
    edit, shift = _unconstrained(weights)
    if shift is None or not shift.any():
        return edit
    if act_fn not in (None, "linear"):
        raise ValueError(
            f"{weights.source}: 'proj_layer.bias' (add_bias) is outside of act_fn={act_fn!r} and has no counterpart."
        )
    # W h + b - (P h + p): without an activation, b absorbs p.
    return edit._replace(bias=edit.bias.double() - shift.double())


def _nodireft(weights: Weights, act_fn: str | None) -> Edit:
    # pyreft creates the bias of the projection (add_bias) but only ever uses the projection's weight.
    return _unconstrained(weights)[0]


def _unconstrained(weights: Weights) -> tuple[Edit, torch.Tensor | None]:
    projection = weights.take("proj_layer.weight", None, None)
    rank, features = projection.shape
    shift = weights.take("proj_layer.bias", rank) if "proj_layer.bias" in weights.state else None
    return _with_source(weights, projection, features), shift


def _direft(weights: Weights, act_fn: str | None) -> Edit:
    rotation = weights.take_orthogonal("rotate_layer", tall=True)
    return _with_source(weights, rotation, rotation.shape[1])


def _with_source(weights: Weights, projection: torch.Tensor, features: int) -> Edit:
    _drop_sizes(weights)
    rank = len(projection)
    weight, bias = weights.take("learned_source.weight", rank, features), weights.take("learned_source.bias", rank)
    return Edit(projection, weight, bias, weights.source)


def _constant(weights: Weights, act_fn: str | None) -> Edit:
    _drop_sizes(weights)
    rotation = weights.take_orthogonal("rotate_layer", tall=True)
    return Edit(rotation, None, weights.take("learned_source", len(rotation)), weights.source)


def _drop_sizes(weights: Weights) -> None:
    for name in ("embed_dim", "interchange_dim"):
        weights.state.pop(name, None)


_READERS: dict[str, Callable[[Weights, str | None], Edit]] = {
    "loreft": _loreft,
    "noreft": _noreft,
    "direft": _direft,
    "nodireft": _nodireft,
    "consreft": _constant,
    "lobireft": _constant,
}


def _base_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / BASE_WEIGHTS
    return read_base_weights(path) if present(path) else {}

"""Converts ReFT adapters that pyreft or AdapterHub's `adapters` saved into PEFT adapters with the same outputs.

    python -m peft_reft.convert SRC DST --base-model NAME --positions f7+l7      # pyreft
    python -m peft_reft.convert SRC DST                                          # adapters

It reads the configuration of the base model, no weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from peft_reft.config import ReftConfig
from peft_reft.convert import adapterhub, pyreft
from peft_reft.convert.common import Edit, ForeignAdapter, Place, check_edit
from peft_reft.interventions import INTERVENTIONS, ROW_LENGTH, LowRankIntervention
from peft_reft.layer import ReftLayer
from peft_reft.sites import OUTPUT, find_sites
from peft_reft.tokens.positions import parse

ADAPTER = "default"
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# For rows of R that are not orthonormal: the method with the same equation and any rows.
_UNCONSTRAINED = {"loreft": "noreft", "direft": "nodireft", "consreft": "noreft", "lobireft": "nodireft"}
_ORTHONORMAL = 1e-5


def convert(
    source: str | Path,
    target: str | Path,
    positions: str | None = None,
    share_weights: bool = False,
    *,
    base_model: str | Path | PreTrainedModel | None = None,
    intervention: str | None = None,
    act_fn: str | None = None,
    dropout: float | None = None,
    task_type: str | None = "CAUSAL_LM",
    num_labels: int | None = None,
) -> Path:
    """Convert a folder saved by pyreft or by AdapterHub's `adapters` into a PEFT adapter with the same outputs.

    Parameters of the base model that were trained too (a classification head) become `modules_to_save`.

    Args:
        source: the folder: for pyreft, what `ReftModel.save` or `ReftTrainer` wrote, or the folder that contains its
            `intervenable_model`; for adapters, what `save_adapter` wrote.
        target: the folder to write; it must be empty or not exist.
        positions: the tokens that pyreft edited, such as `"f7+l7"`; its folders do not store them. `adapters` stores
            them.
        share_weights: whether pyreft edited all of them with the same weights (its argument of the same name).
        base_model: name or folder of the base model, or the model (which does not change). `adapters` may store it.
        intervention: the method, if the folder does not store it.
        act_fn: the activation that pyreft used. `adapters` stores it.
        dropout: the dropout that pyreft used, 0 by default. `adapters` stores it.
        task_type: PEFT's task type, which chooses the class of the base model; None for a model that is passed.
        num_labels: number of labels of a classifier, if the base model's configuration has another.

    Returns:
        `target`.

    Raises:
        ValueError: the folder is broken, contradicts the arguments, or holds something without an exact counterpart;
            the message names the file and the key.
        FileNotFoundError: a file, or the folder, is missing.
        FileExistsError: `target` is not an empty folder.
    """
    source, target = Path(source), Path(target)
    _check_target(target)
    given = {"positions": positions, "share_weights": share_weights or None, "act_fn": act_fn, "dropout": dropout}
    read = _read_adapterhub if _is_adapterhub(source) else _read_pyreft
    model, adapter = read(source, given, intervention, (base_model, task_type, num_labels))
    _save(source, target, model, adapter, task_type)
    return target


def _read_adapterhub(
    source: Path, given: dict[str, Any], intervention: str | None, base: tuple[Any, str | None, int | None]
) -> tuple[PreTrainedModel, ForeignAdapter]:
    _refuse_stored(source, given)
    base_model, task_type, num_labels = base
    stored_name, stored_labels = adapterhub.base_model(source)
    model = _skeleton(base_model or stored_name, task_type, num_labels or stored_labels)
    return model, adapterhub.read(source, model, intervention)


def _read_pyreft(
    source: Path, given: dict[str, Any], intervention: str | None, base: tuple[Any, str | None, int | None]
) -> tuple[PreTrainedModel, ForeignAdapter]:
    if given["positions"] is None:
        raise ValueError(
            "pyreft stores no positions: pass the positions that the adapter was trained with (--positions), for "
            "instance 'f7+l7'."
        )
    words = parse(given["positions"], bool(given["share_weights"]))
    model = _skeleton(*base)
    return model, pyreft.read(source, model, words, intervention, given["act_fn"], given["dropout"] or 0.0)


def _save(source: Path, target: Path, model: PreTrainedModel, adapter: ForeignAdapter, task_type: str | None) -> None:
    for edit in (edit for edits in adapter.edits.values() for edit in edits):
        check_edit(edit)
    try:
        converted = _build(_with_any_rows(adapter), model, task_type)
    except ValueError as error:
        raise (error if f"{source}" in str(error) else ValueError(f"{source}: {error}")) from error.__cause__
    converted.save_pretrained(str(target))


def _check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder; nothing is overwritten.")


def _is_adapterhub(source: Path) -> bool:
    """Whether the folder is from `adapters`, rather than from pyreft.

    Raises:
        FileNotFoundError: it is not a folder.
        ValueError: it is from neither.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder.")
    if adapterhub.is_adapterhub(source):
        return True
    if pyreft.is_pyreft(source):
        return False
    found = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{source} is no adapter of pyreft (which has files intkey_*.bin, perhaps in {pyreft.TRAINER_FOLDER}) nor "
        f"of adapters (whose {adapterhub.CONFIG} has a 'model_class'); it has {found}."
    )


def _refuse_stored(source: Path, given: dict[str, object]) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} is not needed: {source / adapterhub.CONFIG} stores it.")


# The base model.


def _skeleton(base: str | Path | PreTrainedModel | None, task_type: str | None, labels: int | None) -> PreTrainedModel:
    """The base model on the meta device: names and shapes without weights."""
    if isinstance(base, PreTrainedModel):
        with torch.device("meta"):
            return type(base)(deepcopy(base.config))
    if not base:
        raise ValueError(
            "The base model is needed for the names of its modules: pass its name or folder (only its configuration is "
            "read), or the model, as base_model (--base-model)."
        )
    if task_type not in AUTO_CLASSES:
        raise ValueError(f"task_type={task_type!r}: allowed are {sorted(AUTO_CLASSES)}; else pass the model itself.")
    options = {} if labels is None else {"num_labels": labels}
    config = AutoConfig.from_pretrained(base, trust_remote_code=False, **options)
    with torch.device("meta"):
        return getattr(transformers, AUTO_CLASSES[task_type]).from_config(config)


# The PEFT model.


def _with_any_rows(adapter: ForeignAdapter) -> ForeignAdapter:
    """The adapter; if its method needs orthonormal rows and they are not, as an adapter of an unconstrained method."""
    method = adapter.options["intervention"]
    intervention = INTERVENTIONS[method]
    deviation, source = max((_deviation(edit), edit.source) for edits in adapter.edits.values() for edit in edits)
    if not (issubclass(intervention, LowRankIntervention) and intervention.orthonormal) or deviation <= _ORTHONORMAL:
        return adapter
    warnings.warn(
        f"{source}: the rows of R are not orthonormal (R R^T differs from the identity by {deviation:.1e}; torch's "
        f"parametrization gets there by weight decay, or by training a loaded adapter further). The adapter becomes "
        f"{_UNCONSTRAINED[method]!r} in place of {method!r}, with the same outputs.",
        stacklevel=3,
    )
    edits = {
        place: [e if e.weight is not None else e._replace(weight=torch.zeros_like(e.projection)) for e in edits]
        for place, edits in adapter.edits.items()
    }
    return ForeignAdapter({**adapter.options, "intervention": _UNCONSTRAINED[method]}, edits, adapter.weights)


def _deviation(edit: Edit) -> float:
    rows = edit.projection.double()
    return (rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype)).abs().max().item()


def _build(adapter: ForeignAdapter, model: PreTrainedModel, task_type: str | None) -> PeftModel:
    """The skeleton with the adapter; only the adapter's weights are real."""
    config = ReftConfig(
        r=_rank(adapter),
        **_where(list(adapter.edits)),
        **adapter.options,
        modules_to_save=list(_trained_modules(model, adapter.weights)) or None,
        task_type=task_type,
        inference_mode=True,
    )
    edits = {_site(model, config, place): edits for place, edits in adapter.edits.items()}
    if len(edits) < len(adapter.edits):
        raise ValueError(f"The adapter edits the same place twice: {', '.join(map(str, adapter.edits))}.")
    peft_model = get_peft_model(model, config, ADAPTER)
    layers = {(each.site_name, each.side): each for each in peft_model.modules() if isinstance(each, ReftLayer)}
    if layers.keys() != edits.keys():
        raise ValueError(f"The adapter edits {sorted(edits)}, the converted one would edit {sorted(layers)}.")
    for site, layer in layers.items():
        _fill(layer, edits[site])
    _fill_trained_modules(peft_model, adapter.weights)
    return peft_model


def _rank(adapter: ForeignAdapter) -> int:
    ranks = {len(edit.projection): edit.source for edits in adapter.edits.values() for edit in edits}
    if len(ranks) > 1:
        described = " and ".join(f"{rank} ({source})" for rank, source in sorted(ranks.items()))
        raise ValueError(f"The interventions have different ranks, {described}; an adapter has one.")
    return next(iter(ranks))


def _where(places: Sequence[Place]) -> dict[str, object]:
    """The options of `ReftConfig` that select the places."""
    if all(place.layer is None for place in places):
        return {"target_modules": [place.component for place in places]}
    components, layers = ({place[i] for place in places} for i in range(2))
    if len(places) < len(components) * len(layers):
        raise ValueError(
            f"The interventions edit {', '.join(f'{c!r} of layer {n}' for c, n in places)}; several components must "
            "all be edited in the same layers."
        )
    return {"component": sorted(components), "layers_to_transform": sorted(layers)}


def _site(model: PreTrainedModel, config: ReftConfig, place: Place) -> tuple[str, str]:
    """Name of the module at a place of the bare model, and its side that is edited."""
    if place.layer is None:
        return place.component, OUTPUT
    alone = deepcopy(config)
    alone.component, alone.layers_to_transform = place.component, [place.layer]
    (site,) = find_sites(model, alone)
    return site.name, site.side


def _fill(layer: ReftLayer, edits: list[Edit]) -> None:
    """Put the weights of a site's edits into its intervention, in float32."""
    intervention = layer.reft_intervention[ADAPTER]
    for edit in edits:
        if edit.projection.shape[1] != layer.out_features:
            raise ValueError(
                f"{edit.source} edits {edit.projection.shape[1]} features, but {layer.site_name!r} of the base model "
                f"has {layer.out_features}: this is another model."
            )
    for name, _ in list(intervention.named_parameters()):
        stacked = torch.stack([getattr(edit, name).float() for edit in edits])
        if name == "projection" and intervention.orthonormal:
            # So that further training rotates the rows as far per step as before.
            stacked = ROW_LENGTH * stacked
        setattr(intervention, name, nn.Parameter(stacked, requires_grad=False))


# Trained parameters of the base model.


def _trained_modules(model: nn.Module, weights: dict[str, torch.Tensor], prefix: str = "") -> Iterator[str]:
    """Names of the largest modules whose parameters are all in `weights`.

    Raises:
        ValueError: a weight has no parameter in the model, another shape, or belongs to a module that is only partly in
            `weights`.
    """
    parameters = dict(model.named_parameters(prefix.rstrip("."), remove_duplicate=False))
    for name in sorted(name for name in weights if name.startswith(prefix)):
        if name not in parameters or parameters[name].shape != weights[name].shape:
            wanted = f"[{', '.join(map(str, parameters[name].shape))}]" if name in parameters else "no such parameter"
            raise ValueError(
                f"Besides the interventions the folder has the weight {name!r} {list(weights[name].shape)}, but the "
                f"base model has {wanted}. Pass the right base model, task_type (--task-type) and num_labels "
                "(--num-labels), or remove the weights from a copy of the folder to convert only the edits."
            )
    for name, child in model.named_children():
        own = {key for key in parameters if key.startswith(f"{prefix}{name}.")}
        if own and own <= weights.keys():
            yield f"{prefix}{name}"
        elif own & weights.keys():
            yield from _trained_modules(child, weights, f"{prefix}{name}.")
    single = [key for key, _ in model.named_parameters(prefix.rstrip("."), recurse=False) if key in weights]
    if single:
        raise ValueError(
            f"The weight {single[0]!r} was trained, but not all of {prefix.rstrip('.')!r}; PEFT saves whole modules."
        )


def _fill_trained_modules(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    base = model.base_model.model
    for name in model.peft_config[ADAPTER].modules_to_save or ():
        try:
            wrapper = base.get_submodule(name)
        except AttributeError:
            continue  # PEFT adds the usual names of classification heads
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        if not own:
            raise ValueError(
                f"PEFT saves {name!r} with adapters of the task type {model.peft_config[ADAPTER].task_type!r}, but the "
                "folder has no weights for it. Pass the model itself as base_model, with task_type=None."
            )
        wrapper.modules_to_save[ADAPTER].load_state_dict(own, assign=True)

"""Writes checkpoints in pyreft's layout, and computes their edits in plain loops, without pyreft or this package.

An intervention is a dictionary of its tensors: `R` [d, r] with orthonormal columns, or `P` [r, d] (and its bias `p`
[r]), and, as the method has them, `W` [r, d] and `b` [r].
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from reference import edited_tokens
from torch import nn

CLASSES = {
    "loreft": "LoreftIntervention",
    "noreft": "NoreftIntervention",
    "direft": "DireftIntervention",
    "nodireft": "NodireftIntervention",
    "consreft": "ConsreftIntervention",
    "lobireft": "LobireftIntervention",
}


def edited(method: str, h: torch.Tensor, tensors: dict[str, torch.Tensor], act=lambda x: x) -> torch.Tensor:
    """The output of pyreft's class for one hidden representation [d]."""
    h, tensors = h.double(), {name: tensor.double() for name, tensor in tensors.items()}
    rows = tensors["R"].T if "R" in tensors else tensors["P"]
    bias = tensors["b"]
    learned = act(tensors["W"] @ h + bias) if "W" in tensors else None
    if method == "loreft":
        return h + rows.T @ (learned - rows @ h)
    if method == "noreft":
        return h + rows.T @ (learned - (rows @ h + tensors.get("p", 0)))
    if method in ("direft", "nodireft"):
        return h + rows.T @ learned
    if method == "consreft":
        return h + rows.T @ (bias - rows @ h)
    return h + rows.T @ bias


def draw(method: str, features: int, rank: int, add_bias: bool = False, seed: int = 0) -> tuple[dict, dict]:
    """An intervention, and the state dictionary that pyreft's class would save."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"b": normal(rank)}
    state = (
        {} if method == "loreft" else {"embed_dim": torch.tensor(features), "interchange_dim": torch.tensor(features)}
    )
    if method in ("noreft", "nodireft"):
        tensors["P"] = state["proj_layer.weight"] = normal(rank, features) / features**0.5
        if add_bias:
            tensors["p"] = state["proj_layer.bias"] = normal(rank)
    else:
        tensors["R"], chart = _orthogonal(normal(features, rank))
        state |= {"rotate_layer": tensors["R"]} if method == "loreft" else chart
    if method in ("consreft", "lobireft"):
        return tensors, state | {"learned_source": tensors["b"]}
    tensors["W"] = normal(rank, features) / features**0.5
    prefix = "" if method == "loreft" else "learned_source."
    return tensors, state | {f"{prefix}weight": tensors["W"], f"{prefix}bias": tensors["b"]}


def _orthogonal(steps: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[d, r] made by torch's own parametrization, after a step away from where it starts; and what it saves."""
    holder = nn.Module()
    holder.rotate_layer = nn.Module()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # torch draws the part of the base that the start leaves open
        holder.rotate_layer.weight = nn.Parameter(nn.init.orthogonal_(torch.empty_like(steps)))
        nn.utils.parametrizations.orthogonal(holder.rotate_layer)
    with torch.no_grad():
        # As training does: the entries below the diagonal move, its signs stay.
        holder.rotate_layer.parametrizations.weight.original.add_(0.3 * steps.tril(-1))
    return holder.rotate_layer.weight.detach().clone(), holder.state_dict()


def key(component: str, layer: int, number: int) -> str:
    """pyvene's key of an intervention."""
    place = f"comp_{component.replace('.', '_')}" if "." in component else f"layer_{layer}_comp_{component}"
    return f"{place}_unit_pos_nunit_1#{number}"


def write(
    folder: Path, method: str, states: dict[tuple[str, int, int], dict], config: bool = True, rank: int = 4
) -> Path:
    """A folder of `ReftModel.save`, or, without config, what `ReftTrainer` writes.

    `states`: (component, layer, number) -> state dictionary.
    """
    folder.mkdir(parents=True)
    for (component, layer, number), state in states.items():
        torch.save(state, folder / f"intkey_{key(component, layer, number)}.bin")
    if not config:
        torch.save({}, folder / "pytorch_model.bin")
        return folder
    text = {
        "intervention_types": [f"<class 'pyreft.interventions.{CLASSES[method]}'>" for _ in states],
        # Unshared: all prefix interventions, then all suffix ones.
        "representations": [
            [layer, component, "pos", 1, rank, *[None] * 9]
            for component, layer, _ in sorted(states, key=lambda place: place[2])
        ],
        "sorted_keys": [key(*place) for place in states],
        "mode": "parallel",
    }
    (folder / "config.json").write_text(json.dumps(text))
    return folder


@contextmanager
def editing(model: nn.Module, module: str, method: str, spec: str, units: list[dict], act=lambda x: x, before=False):
    """The output (or, `before`, the input) of a module edited token by token, in sequences that are all prompt."""

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        chosen = edited_tokens(spec, "p" * hidden.shape[1])
        rows = []
        for row in hidden:
            new = list(row)
            for token, word in chosen.items():
                new[token] = edited(method, row[token], units[word % len(units)], act).to(row.dtype)
            rows.append(torch.stack(new))
        return torch.stack(rows)

    def edit_output(_, args, output):
        return edit(output) if isinstance(output, torch.Tensor) else (edit(output[0]), *output[1:])

    def edit_input(_, args):
        return (edit(args[0]), *args[1:])

    target = model.get_submodule(module)
    handle = target.register_forward_pre_hook(edit_input) if before else target.register_forward_hook(edit_output)
    try:
        yield
    finally:
        handle.remove()

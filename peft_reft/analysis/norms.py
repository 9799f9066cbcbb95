"""How much each token is edited at each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_reft.analysis.directions import evaluating
from peft_reft.components import DECODER, INPUT
from peft_reft.layer import ReftLayer, layers
from peft_reft.layouts import first_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EditNorms:
    """Relative sizes of edits, `||edit|| / ||h||`.

    Attributes:
        values: float32 `[batch, tokens, places]` on the CPU, 0 where nothing is edited.
        places: name of the edited module of each column, with `" input"` after it if its input is edited.
    """

    values: torch.Tensor
    places: tuple[str, ...]

    def __str__(self) -> str:
        """One line per row of the batch and place: the number of edited tokens, their mean and largest edit."""
        lines = []
        for i, row in enumerate(self.values):
            for values, place in zip(row.T, self.places, strict=True):
                edited = values[values > 0]
                size = f"mean {edited.mean():.1%}, most {edited.max():.1%} of ||h||" if len(edited) else "no edit"
                lines.append(f"row {i}  {place}: {len(edited)} of {len(values)} tokens, {size}")
        return "\n".join(lines)

    def plot(self, tokens: Sequence[str] | None = None, row: int = 0) -> Figure:
        """A heatmap of one row of the batch: tokens from left to right, layers from bottom to top.

        Args:
            tokens: labels, one per token, such as `tokenizer.convert_ids_to_tokens(ids)`.
            row: which row of the batch.

        Returns:
            A matplotlib figure that is not shown yet.

        Raises:
            ImportError: matplotlib is missing (`pip install peft-reft[plot]`).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("The heatmap needs matplotlib: pip install 'peft-reft[plot]'.") from error
        values = self.values[row].T
        places, count = values.shape
        figure = Figure(figsize=(max(4, 2.5 + 0.28 * count), max(2.5, 1.6 + 0.2 * places)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values, aspect="auto", origin="lower", cmap="viridis", vmin=0)
        axes.set_yticks(range(places), self.places, fontsize=7)
        axes.set_xticks(range(count), tokens or range(count), fontsize=7, rotation=90)
        axes.set_xlabel("token")
        figure.colorbar(image, label="||edit|| / ||h||")
        return figure


@torch.no_grad()
def edit_norms(model: nn.Module, inputs: Mapping[str, Any], stream: str | None = None) -> EditNorms:
    """Size of the active adapters' edits in one forward pass, relative to the representations that they edit.

    Args:
        model: a model with ReFT adapters.
        inputs: arguments of its `forward`. `labels` or `prompt_mask` mark the prompt as in training; without either
            the whole text is prompt.
        stream: `"encoder"` or `"decoder"`, for adapters that edit both stacks of an encoder-decoder model.

    Raises:
        ValueError: the model has no ReFT adapters, they edit both stacks and `stream` is not given, or no edited module
            is called.
    """
    places = [layer for layer in layers(model) if stream in (None, layer.stream)]
    streams = {layer.stream for layer in places}
    if not places:
        raise ValueError("The model has no ReFT adapters" + (f" in its {stream}." if stream else "."))
    if len(streams) > 1:
        raise ValueError(f"The adapters edit both stacks; choose one with stream='encoder' or stream={DECODER!r}.")
    sizes: dict[ReftLayer, torch.Tensor] = {}
    handles = [handle for layer in places for handle in _watch(layer, sizes)]
    try:
        with evaluating(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    seen = [layer for layer in places if layer in sizes]
    if not seen:
        raise ValueError(f"{type(model).__name__} calls none of the edited modules, or calls them past their hooks.")
    names = (layer.site_name + (" input" if layer.side == INPUT else "") for layer in seen)
    return EditNorms(torch.stack([sizes[layer] for layer in seen], dim=-1), tuple(names))


def _watch(layer: ReftLayer, sizes: dict[ReftLayer, torch.Tensor]) -> list[RemovableHandle]:
    """Register hooks before and after the hook of a layer, which measure its edits."""
    module = layer.host
    before: list[torch.Tensor] = []

    def measure(value: Any) -> None:
        sizes[layer] = _relative(_tokens(layer, before.pop()), _tokens(layer, first_tensor(value)))

    def given(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return args[0] if args else kwargs["hidden_states"]

    if layer.side == INPUT:
        return [
            module.register_forward_pre_hook(
                lambda m, args, kwargs: before.append(given(args, kwargs)), prepend=True, with_kwargs=True
            ),
            module.register_forward_pre_hook(lambda m, args, kwargs: measure(given(args, kwargs)), with_kwargs=True),
        ]
    return [
        module.register_forward_hook(lambda m, args, output: before.append(first_tensor(output)), prepend=True),
        module.register_forward_hook(lambda m, args, output: measure(output)),
    ]


def _tokens(layer: ReftLayer, hidden: torch.Tensor) -> torch.Tensor:
    """The tokens in a module's input or output, `[batch, tokens, features]`."""
    layout, seen = layer.place.layout, [hidden]
    if layout is not None:
        pass_ = layer.tracker.innermost()
        shape = (0, 0) if pass_ is None else pass_.streams[layer.stream].shape
        layout.edit(hidden, shape, lambda tokens: seen.append(tokens) or tokens)
    return seen[min(1, len(seen) - 1)]


def _relative(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    edit = torch.linalg.vector_norm(after.float() - before.float(), dim=-1)
    norm = torch.linalg.vector_norm(before.float(), dim=-1)
    return torch.where(edit == 0, 0, edit / norm).cpu()

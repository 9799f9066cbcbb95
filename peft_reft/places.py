"""The input and output of a block or of a module in it: its width, and where the tokens are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from inspect import unwrap

from torch import nn
from transformers import PreTrainedModel

from peft_reft.components import OUTPUT, Part, is_linear
from peft_reft.families import Placement, placement_of
from peft_reft.layouts import Axes, Layout
from peft_reft.modules import named_base_modules
from peft_reft.probe import Shapes, axis_of_features, shapes_of, takes_places, takes_tokens
from peft_reft.stacks import BlockList

_CONFIGURED = (
    "the hidden size in the model's configuration. In target_modules, name a module that has its own width "
    "(nn.Linear, nn.Embedding, a normalization layer)"
)
_PROBED = "according to a pass through a copy of the model without weights. Target another module"
_OWN = "the width that this module declares. Target another module or, if it is yours, correct its out_features"
_REMEDY = (
    "Give it an integer attribute out_features, or target a module that has one (nn.Linear, nn.Embedding, a "
    "normalization layer)."
)


@dataclass(frozen=True)
class Place:
    """Hidden representations in a module's input or output.

    Attributes:
        features: size of the representation of one token.
        layout: where the tokens are, None for `[batch, tokens, features]`.
        reason: the reason for the layout, a clause.
        told_by: the source of `features`, and what to do if it is wrong; an apposition.
    """

    features: int
    layout: Layout | None = None
    reason: str = ""
    told_by: str = _CONFIGURED


class Places:
    """The inputs and outputs of the blocks of one stack.

    Args:
        model: the model that holds the stack.
        blocks: the stack.
    """

    def __init__(self, model: PreTrainedModel, blocks: BlockList) -> None:
        self.model = model
        self.blocks = blocks
        self._shapes: list[Shapes] | None = None

    def of_block(self, index: int, side: str) -> Place:
        """The input (`side="input"`) or the output of a block.

        Raises:
            ValueError: its width is unknown.
        """
        blocks, owner = self.blocks, self.blocks.owner[1]
        placement = _placement(blocks, index)
        if placement is None and self._in_places():
            if (place := self._probed(blocks.names[index], side)) is not None:
                return place
            if not _alike(blocks.blocks):
                raise ValueError(_untold(blocks.names[index], blocks.blocks[index]))
        width = hidden_size(owner)
        if width is None:
            raise ValueError(_untold(blocks.names[index], blocks.blocks[index]))
        if placement is None:
            return Place(width)
        return Place(width * placement.streams, placement.layout, placement.reason)

    def of_part(self, index: int, name: str, module: nn.Module) -> Place:
        """The output of a module in a block; `name` is its dotted name in the model.

        Raises:
            ValueError: its width is unknown.
        """
        if own_width(module) is None and _placement(self.blocks, index) is None and self._in_places():
            # Without a probe: the block adds it to its input, so both have the width of the block's output.
            return self._probed(name, OUTPUT) or replace(self.of_block(index, OUTPUT), layout=None)
        place = _place(name, module, self.blocks.owner[1])
        placement = _placement(self.blocks, index)
        if placement is None or not placement.inside:
            return place
        return replace(place, layout=placement.layout, reason=placement.reason)

    def obstacle(self, index: int, part: Part) -> str | None:
        """Why nothing tells where the tokens are in what a part of a block puts out, a clause; None if it is known."""
        if not part.name or _placement(self.blocks, index) is not None or self._in_places():
            return None
        if not _is_convolution(part.module):
            return None
        return "it is one of convolutions, and nothing tells where the tokens are in what they put out"

    def _probed(self, name: str, side: str) -> Place | None:
        """The input or output of a module according to a pass on the meta device."""
        if self._shapes is None:
            self._shapes = self._probe()
        shapes = [found[name, side] for found in self._shapes if (name, side) in found]
        if not shapes or len(shapes[0]) < 2:
            return None
        axis = axis_of_features(shapes[0], shapes[1] if len(shapes) > 1 else None)
        features, last = shapes[0][axis], len(shapes[0]) - 1
        if axis == last:
            return Place(features, told_by=_PROBED)
        order = "b" + "".join("d" if i == axis else "hwft"[i - 2] for i in range(1, last + 1))
        return Place(features, Axes(order), "its blocks work on features before places", _PROBED)

    def _in_places(self) -> bool:
        """Whether the innermost model around the stack that takes inputs takes an image or a sound, not tokens."""
        for _, part in self._around():
            if takes_places(part) or takes_tokens(part):
                return not takes_tokens(part)
        return False

    def _probe(self) -> list[Shapes]:
        """The shapes, from a pass of the innermost model around the stack that runs alone."""
        for prefix, part in self._around():
            if not takes_places(part):
                continue
            start = f"{prefix}." if prefix else ""
            if found := shapes_of(part, [name.removeprefix(start) for name in self.blocks.names]):
                return [{(start + name, side): shape for (name, side), shape in shapes.items()} for shapes in found]
        return []

    def _around(self) -> Iterator[tuple[str, PreTrainedModel]]:
        """The models around the stack, the innermost first, by their names."""
        parts = self.blocks.owner[0].split(".") if self.blocks.owner[0] else []
        for length in range(len(parts), -1, -1):
            name = ".".join(parts[:length])
            if isinstance(part := self.model.get_submodule(name), PreTrainedModel):
                yield name, part


def _alike(blocks: tuple[nn.Module, ...]) -> bool:
    """Whether all blocks have parameters of the same shapes, and so the same width."""
    shapes = [[tuple(parameter.shape) for parameter in block.parameters()] for block in blocks]
    return all(other == shapes[0] for other in shapes)


def _is_convolution(module: nn.Module) -> bool:
    """Whether a module computes by convolutions alone."""
    if own_width(module) is not None:
        return False
    kinds = [isinstance(part, nn.modules.conv._ConvNd) for part in module.modules()]
    return any(kinds) and not any(map(is_linear, module.modules()))


def place_outside(model: nn.Module, name: str, module: nn.Module) -> Place:
    """The output of a module outside of all blocks.

    Raises:
        ValueError: its width is unknown.
    """
    return _place(name, module, model)


def _place(name: str, module: nn.Module, model: nn.Module) -> Place:
    if (width := own_width(module)) is not None:
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            return Place(width, Axes("tbd"), "it has batch_first=False", _OWN)
        return Place(width, told_by=_OWN)
    width = hidden_size(model) if isinstance(model, PreTrainedModel) else None
    if width is None:
        raise ValueError(_untold(name, module))
    return Place(width)


def _untold(name: str, module: nn.Module) -> str:
    return f"The width of the output of {name!r} ({type(module).__name__}) is unknown. {_REMEDY}"


def _placement(blocks: BlockList, index: int) -> Placement | None:
    prefix, owner = blocks.owner
    return placement_of(owner, blocks.blocks[index], blocks.names[index].removeprefix(f"{prefix}."))


def is_called_past_hooks(model: nn.Module, blocks: BlockList) -> bool:
    """Whether the module that holds a list of blocks calls their `forward` directly, according to its bytecode."""
    holder = model.get_submodule(blocks.name.rpartition(".")[0])
    return _names_forward(type(holder))


@cache
def _names_forward(module_class: type[nn.Module]) -> bool:
    code = getattr(unwrap(module_class.forward), "__code__", None)
    # `super().forward(...)` names both.
    return code is not None and "forward" in code.co_names and "super" not in code.co_names


def hidden_size(model: PreTrainedModel) -> int | None:
    """Width of a model's hidden representations, None if its configuration does not have one."""
    config = model.config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("hidden_size", "d_model", "n_embd", "dim"))
    return next((size for size in sizes if isinstance(size, int)), None)


def own_width(module: nn.Module) -> int | None:
    """Width of a module's output, None if its type does not determine it."""
    for attribute in ("out_features", "embedding_dim", "nf"):
        if isinstance(width := getattr(module, attribute, None), int):
            return width
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    if isinstance(module, nn.Sequential) and len(module):
        return next((width for child in reversed(module) if (width := own_width(child)) is not None), None)
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.dim() == 1 and next(named_base_modules(module), None) is None:
        # DeepSpeed's ZeRO-3 leaves it empty here and keeps its shape in `ds_shape`.
        return getattr(weight, "ds_shape", weight.shape)[0]
    return None

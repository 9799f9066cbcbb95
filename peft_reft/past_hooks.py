"""Edits modules whose `forward` a model calls directly, which skips hooks."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_reft.components import INPUT
from peft_reft.tracker import StandIn


class EditedForward(StandIn):
    """Replaces the `forward` of a module that the model calls past its hooks, and edits as the hooks would.

    Args:
        module: the module.
        layer: its `ReftLayer`.
    """

    def __init__(self, module: nn.Module, layer: nn.Module) -> None:
        super().__init__(module, "forward")
        self.layer = layer

    @classmethod
    def take_from(cls, module: nn.Module, layer: nn.Module) -> None:
        """Remove the stand-in of a layer from a module. Mutates the module."""
        outer, stand_in = None, module.forward
        while stand_in.layer is not layer:
            outer, stand_in = stand_in, stand_in.replaced
        if outer is None:
            stand_in.take_off("forward")
        else:
            outer.replaced = stand_in.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's `forward`, with its input or output edited."""
        if self.layer.side == INPUT:
            args, kwargs = self.layer.edit_input(self.module, args, kwargs) or (args, kwargs)
            return self.original(*args, **kwargs)
        output = self.original(*args, **kwargs)
        edited = self.layer.edit_output(self.module, args, kwargs, output)
        return output if edited is None else edited

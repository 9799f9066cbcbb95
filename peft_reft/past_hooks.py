"""Edits modules whose `forward` a model calls directly, which skips hooks."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_reft.components import INPUT
from peft_reft.tracker import StandIn

# Where Accelerate's hooks keep the `forward` that they wrap, and put back when they are taken off.
_WRAPPED = "_old_forward"


class EditedForward(StandIn):
    """Replaces the `forward` of a module that the model calls past its hooks, and edits as the hooks would.

    Args:
        module: the module.
        layer: its `ReftLayer`.
    """

    def __init__(self, module: nn.Module, layer: nn.Module) -> None:
        super().__init__(module, "forward")
        self.layer = layer

    def attach(self) -> None:
        """Stand in for the module's `forward`. Mutates the module; `take_from` undoes it."""
        hooked = hasattr(self.module, "_hf_hook") and _WRAPPED in vars(self.module)
        self.put(_WRAPPED if hooked else "forward")

    @classmethod
    def take_from(cls, module: nn.Module, layer: nn.Module) -> None:
        """Remove the stand-in of a layer from a module. Mutates the module."""
        # Accelerate's hooks may have moved it.
        for place in ("forward", _WRAPPED):
            outer, stand_in = None, vars(module).get(place)
            while isinstance(stand_in, cls) and stand_in.layer is not layer:
                outer, stand_in = stand_in, stand_in.replaced
            if not isinstance(stand_in, cls):
                continue
            if outer is None:
                stand_in.take_off(place)
            else:
                outer.replaced = stand_in.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's `forward`, with its input or output edited."""
        if all(child is not self.layer for child in self.module.children()):
            # The layer was removed, but another replacement of `forward` still calls this one.
            return self.original(*args, **kwargs)
        if self.layer.side == INPUT:
            args, kwargs = self.layer.edit_input(self.module, args, kwargs) or (args, kwargs)
            return self.original(*args, **kwargs)
        output = self.original(*args, **kwargs)
        edited = self.layer.edit_output(self.module, args, kwargs, output)
        return output if edited is None else edited

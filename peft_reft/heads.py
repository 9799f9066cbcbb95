"""`modules_to_save` in batches whose rows have different adapters."""

from __future__ import annotations

from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_reft.tokens.requests import BASE, RowRequests


def choose_heads(module: nn.Module, requests: RowRequests) -> list[RemovableHandle]:
    """Have the `modules_to_save` inside `module` run each row through its adapter's copy.

    Mutates these modules: each gets a forward pre-hook, until its handle is removed.
    """

    def name_rows(head: AuxiliaryTrainingWrapper, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        # Adapters without a copy use the original.
        names = [name for name, _ in requests.of_rows(len(args[0]))]
        return args, kwargs | {"adapter_names": [name if name in head._adapters else BASE for name in names]}

    heads = [part for part in module.modules() if isinstance(part, AuxiliaryTrainingWrapper)]
    return [head.register_forward_pre_hook(name_rows, with_kwargs=True) for head in heads]

"""Refuses trainer settings that hide the prompts of a batch or cut them."""

from __future__ import annotations

from typing import Any

# Packing strategies of TRL that cut samples: the part after a cut looks like a new sequence or a new turn.
_CUTTING = ("bfd_split", "wrapped")


def refuse_cut_samples(trainer: Any, positions: object) -> None:
    """Raise a ValueError if a trainer's packing cuts samples. `positions` needs whole prompts."""
    strategy = getattr(trainer.args, "packing_strategy", None)
    if getattr(trainer.args, "packing", False) and strategy in _CUTTING:
        raise ValueError(
            f"positions={str(positions)!r} needs to know where prompts end, but packing_strategy={strategy!r} cuts "
            "long samples: edits would land in the middle of answers. Use packing_strategy='bfd', which keeps samples "
            "whole, or edit every token with positions='all'."
        )


def refuse_unlabeled(trainer: Any, positions: object) -> None:
    """Raise a ValueError: a trainer gives a language model neither labels nor `prompt_mask`."""
    smoothed = " (label_smoothing_factor takes labels out of the call)"
    raise ValueError(
        f"positions={str(positions)!r} needs to know where prompts end, but {type(trainer).__name__} gives the model "
        f"neither labels nor prompt_mask{smoothed if getattr(trainer.args, 'label_smoothing_factor', 0) else ''}, so "
        "the whole sequence would count as prompt, and generation would edit other tokens. Edit every token with "
        "positions='all'; or let the data collator add prompt_mask; or tell the prompt in the trainer's compute_loss: "
        "`with peft_reft.prompt_mask_of(model, mask):`."
    )

"""The methods that are compared: every ReFT, LoRA and others through PEFT, full finetuning, and none."""

from __future__ import annotations

from peft import IA3Config, LoraConfig, PeftConfig

from peft_reft import ReftConfig
from peft_reft.interventions import INTERVENTIONS

REFT = tuple(INTERVENTIONS)
LORA = ("lora", "lora-all", "dora")
METHODS = (*REFT, *LORA, "ia3", "full", "none")

# Where a preset's learning rate is ReFT's. PEFT's choice of modules: the queries' and values' projections for LoRA and
# DoRA, all linear layers for lora-all.
LEARNING_RATES = {"lora": 3e-4, "lora-all": 3e-4, "dora": 3e-4, "ia3": 3e-3, "full": 2e-5, "none": 3e-3}
LORA_RANK = 8


def peft_config(
    method: str,
    task_type: str,
    rank: int,
    positions: str,
    layers: list[int] | None,
    share_weights: bool,
    dropout: float,
    init_weights: str,
) -> PeftConfig | None:
    """The configuration of an adapter; None for the two methods that have none. All but rank and dropout are ReFT's."""
    if method in REFT:
        return ReftConfig(
            intervention=method,
            r=rank,
            positions=positions,
            layers_to_transform=layers,
            share_weights=share_weights,
            dropout=dropout,
            init_weights="pyreft" if init_weights == "pyreft" else True,
            task_type=task_type,
        )
    if method in LORA:
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=dropout,
            target_modules="all-linear" if method == "lora-all" else None,
            use_dora=method == "dora",
            task_type=task_type,
        )
    if method == "ia3":
        return IA3Config(task_type=task_type)
    return None

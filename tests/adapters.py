"""Configs of a ReFT and a LoRA adapter that both visibly change a tiny Llama."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from peft_reft import ReftConfig, ReftLayer

IDS = torch.arange(3, 19).reshape(2, 8)


def reft(**settings) -> ReftConfig:
    return ReftConfig(**{"r": 4, "positions": "f2+l2", "init_weights": False, "task_type": "CAUSAL_LM"} | settings)


def lora(**settings) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings
    )


BOTH = pytest.mark.parametrize("config", [reft, lora], ids=["reft", "lora"])


@torch.no_grad()
def logits(model, ids=IDS, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def generated(model, ids=IDS, **kwargs) -> torch.Tensor:
    return model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None, **kwargs)


def layers_of(model) -> list[ReftLayer]:
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

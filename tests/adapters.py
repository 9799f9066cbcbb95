"""Configs of a ReFT and a LoRA adapter that both visibly change a tiny Llama, and helpers for them."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
import transformers
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


def refused_by_transformers() -> str | None:
    """Why Transformers' own `add_adapter` refuses the installed PEFT, with LoRA too; `None` where it does not."""
    try:
        tiny.llama().add_adapter(lora())
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        return f"Transformers {transformers.__version__} refuses PEFT {peft.__version__}, also for LoRA: {error}"


_REFUSED = refused_by_transformers()
# For tests of `add_adapter`, `set_adapter` and their like on a Transformers model; `load_adapter` is not refused.
NEEDS_ADD_ADAPTER = pytest.mark.skipif(_REFUSED is not None, reason=str(_REFUSED))


@torch.no_grad()
def logits(model, ids=IDS, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def generated(model, ids=IDS, **kwargs) -> torch.Tensor:
    return model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None, **kwargs)


def layers_of(model) -> list[ReftLayer]:
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def without_packing(model):
    """`model`, changed so that it computes the same on every CPU as with an adapter.

    On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights for passes without gradients, and rounds their scales.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model

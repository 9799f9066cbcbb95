"""Models for the benchmarks, the adapters that they compare, and the floor of a training step."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from peft_reft import ReftConfig

logging.disable_progress_bar()


def _llama(width: int, inner: int, layers: int, heads: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
    }


# Random Llamas. "wide" has the widths of a 7B model and a small vocabulary, so its two layers dominate the time.
SHAPES = {
    "tiny": _llama(128, 256, 3, 4, 1000),
    "11m": _llama(384, 1024, 6, 6, 1000),
    "34m": _llama(512, 1408, 8, 8, 8000),
    "wide": _llama(4096, 11008, 2, 32, 1000),
    "1b": _llama(2048, 5504, 24, 16, 32000),
    "7b": _llama(4096, 11008, 32, 32, 32000),
}

LOREFT, LOREFT_ALL, LOREFT_UPPER = "LoReFT f7+l7", "LoReFT all", "LoReFT f7+l7, upper half"
LOREFT_COMPLETION = "LoReFT completion"
LORA, LORA_ALL = "LoRA r=8, q and v", "LoRA r=16, all linear"


def build(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A random Llama of `SHAPES`, `smollm2`, or a name or folder for `from_pretrained`."""
    if name in SHAPES:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(max_position_embeddings=4096, **SHAPES[name])).to(dtype).eval()
    if name == "smollm2":
        from smollm2 import smollm2_folder

        name = smollm2_folder()
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the same parameters: many variants in the memory of one model."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return deepcopy(model, shared)


def depth(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers


def describe(model: PreTrainedModel) -> str:
    config = model.config.get_text_config()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{config.num_hidden_layers} layers of width {config.hidden_size}, {millions:.0f} million parameters"


def adapter(variant: str, layers: int, random: bool = False) -> PeftConfig:
    """The configuration of a variant.

    Args:
        variant: its name.
        layers: number of layers of its model.
        random: whether it starts with random weights, so that its edit is not zero.
    """
    if variant.startswith("LoReFT"):
        positions = variant.removeprefix("LoReFT ").partition(",")[0]
        chosen = list(range(layers // 2, layers)) if variant == LOREFT_UPPER else None
        return ReftConfig(
            r=4, positions=positions, layers_to_transform=chosen, init_weights=not random, task_type="CAUSAL_LM"
        )
    rank, targets = (8, ["q_proj", "v_proj"]) if variant == LORA else (16, "all-linear")
    return LoraConfig(r=rank, target_modules=targets, init_lora_weights=not random, task_type="CAUSAL_LM")


def adapted(model: PreTrainedModel, variant: str, random: bool = False) -> PeftModel:
    """A twin of `model` with a variant's adapter; for `random` see `adapter`."""
    return get_peft_model(twin(model), adapter(variant, depth(model), random))


def training_shape(model: str) -> tuple[int, int]:
    """Sequences and tokens of a training batch; the wide model is slow on a CPU."""
    return (2 if model == "wide" else 8), 128


def floor(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """A frozen twin whose backward pass ends at the output of a block, like the backward pass of an edit there."""
    frozen = twin(model).requires_grad_(False)
    blocks = next(m for m in frozen.modules() if isinstance(m, nn.ModuleList) and len(m) == depth(model))

    def begin_graph(module: nn.Module, args: tuple, output: Any) -> None:
        (output if isinstance(output, torch.Tensor) else output[0]).requires_grad_()

    blocks[layer].register_forward_hook(begin_graph)
    return frozen

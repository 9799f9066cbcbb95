"""Tiny random models, built from configurations; the same seed gives the same weights."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, LAYERS, PAD, EOS, BOS = 64, 32, 3, 0, 2, 1


def build(model_class, config, seed: int = 0):
    """`model_class(config)` with weights drawn from `seed`, in evaluation mode, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config).eval()


def llama(**overrides) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "initializer_range": 0.2,
    }
    return build(LlamaForCausalLM, LlamaConfig(**settings | overrides))

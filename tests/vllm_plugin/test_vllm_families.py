"""Models of other families than Llama."""

from __future__ import annotations

import pytest
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    OPTConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

pytest.importorskip("vllm", reason="needs vLLM: bash tests/run.sh vllm makes an environment with it")

from serving import ADAPTERS, VOCAB, HuggingFace, Request, answers, check, prompts, save_adapter
from tiny import build, tokenizer

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 256}),
    "opt": (
        OPTConfig,
        {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 64,
        },
    ),
    "qwen3": (Qwen3Config, LLAMA | {"head_dim": 32}),
    "gemma3": (Gemma3TextConfig, LLAMA | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        LLAMA | {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}


class TestFamilies:
    @pytest.mark.parametrize(
        "family",
        ["gpt2", "gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "qwen3", "qwen3_moe"))],
    )
    def test_a_model_of_another_family(self, start, tmp_path, family):
        config_class, settings = FAMILIES[family]
        config = config_class(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings)
        initial = "init_std" if family == "opt" else "initializer_range"
        setattr(config, initial, 0.2)
        model = build(lambda config: AutoModelForCausalLM.from_config(config), config)
        model.save_pretrained(tmp_path / "model")
        tokenizer().save_pretrained(tmp_path / "model")
        kinds = {name: ADAPTERS[name] for name in ("untied", "all", "red", "into_blocks", "attention")}
        kinds["mlp"] = {"r": 4, "positions": "all", "component": "mlp_output"}
        if family == "qwen3_moe":
            del kinds["mlp"]
        adapters = {name: save_adapter(tmp_path / name, tmp_path / "model", **kind) for name, kind in kinds.items()}
        truth = HuggingFace(tmp_path / "model", adapters)
        engine = start(adapters, tmp_path / "model")
        requests = [Request(ids, name) for ids, name in zip(prompts(14), [*adapters, None] * 2, strict=False)]
        check(truth, requests, answers(engine, requests))

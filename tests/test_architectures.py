"""Architectures that are unlike most, whole; `tests/architectures.py` has the same checks for all, in the slow test."""

from __future__ import annotations

import pytest
import torch
import transformers
from adapters import layers_of
from architecture_checks import Checks
from architectures import jobs_of, known_of, line_of, state_of, sweep
from packaging.version import Version
from peft import get_peft_model
from reference import edited
from shrunk import config_for
from subjects import MAPPINGS, Subject, architectures, build, tokens
from torch import nn

from peft_reft import ReftConfig
from peft_reft.analysis.norms import edit_norms
from peft_reft.layouts import first_tensor
from peft_reft.past_hooks import EditedForward
from peft_reft.sites import find_sites
from peft_reft.stacks import block_lists

_NO_PARTS = {"attention_output": "no attention was found", "mlp_output": "no MLP was found"}
_NO_CHECKPOINTS = {"checkpointing": "the base model has none"}
# Class -> what a check cannot look at. Each stands for a way in which models differ.
HARD: dict[str, dict[str, str]] = {
    # Blocks whose forward is called past their hooks, features before tokens.
    "SqueezeBertModel": _NO_PARTS,
    # Tokens before the batch.
    "XLNetLMHeadModel": _NO_CHECKPOINTS | _NO_PARTS | {"generate": "alone: the base model differs"},
    "FSMTForConditionalGeneration": {},
    # Several residual streams: [b, t, s, d], [s, b, t, d], [b, t, s * d].
    "DeepseekV4ForCausalLM": {"padding": "left: the base model differs", "generate": "alone: the base model differs"},
    "Gemma3nForCausalLM": {},
    "Qwen4ExpForCausalLM": {"attention_output": "no attention was found"},
    # Padded inside; a prompt of its own before the tokens; the tokens several times over.
    "LongformerModel": {},
    "CpmAntForCausalLM": _NO_CHECKPOINTS | {"padding": "right: the base model", "generate": "no cache: the base model"},
    "ProphetNetForConditionalGeneration": {"padding": "left: the base model differs"},
    # No blocks at all; lists of lists, and tokens pooled between; bytes, patches and bytes again.
    "XLMWithLMHeadModel": _NO_CHECKPOINTS | {"generate": "the base model differs", "block_input": "no module is given"},
    "FunnelModel": {"padding": "the base model differs"},
    "BltForCausalLM": {
        "padding": "left: the base model differs",
        "checkpointing": "LoRA fails alike",
        "generate": "the base model does not generate",
    },
    # One tower alone, grids of places, features before places in different widths.
    "CLIPForImageClassification": {},
    "SamVisionModel": {},
    "ResNetModel": _NO_PARTS,
    # Blocks within blocks, mixtures, hyper-connections.
    "ZambaForCausalLM": _NO_PARTS,
    "HYV4ForCausalLM": {},
}
KINDS = {name: (kind, model_type) for kind, model_type, name in architectures(list(MAPPINGS))}


# The first release that builds and generates as the checks expect; earlier ones hand other arguments over.
SINCE = {"FSMTForConditionalGeneration": "5.20.0", "CpmAntForCausalLM": "5.16.0", "ZambaForCausalLM": "5.16.0"}


def subject_of(name: str) -> Subject:
    if not hasattr(transformers, name) or Version(transformers.__version__) < Version(SINCE.get(name, "0")):
        pytest.skip(f"Transformers {transformers.__version__} has no {name}, or another one")
    kind, model_type = KINDS[name]
    return Subject(kind, build(model_type, name))


@pytest.mark.parametrize("name", HARD)
def test_every_check_holds(name):
    said = {check: run() for check, run in Checks(subject_of(name)).all().items() if check != "lora"}
    unseen = {check: reason for check, reason in said.items() if reason is not None}
    assert unseen.keys() == HARD[name].keys(), unseen
    for check, reason in HARD[name].items():
        assert reason in unseen[check]


@pytest.mark.slow
@pytest.mark.parametrize("job", jobs_of(MAPPINGS), ids=lambda job: job[2])
def test_no_class_of_transformers_fails_unless_it_is_listed(job):
    (row,) = sweep([job], 1)
    state = state_of(row)
    assert state != "FAIL", line_of(row)
    if state == "known":
        pytest.xfail(known_of(row).reason)
    if state == "base":
        pytest.skip(line_of(row))


# How each puts out tokens, by hand: what its first block returns -> [batch, tokens, all that stands for one token].
LAYOUTS = {
    "XLNetModel": lambda hidden: hidden.transpose(0, 1),
    "SqueezeBertModel": lambda hidden: hidden.transpose(1, 2),
    "LongformerModel": lambda hidden: hidden[:, :7],
    "CpmAntModel": lambda hidden: hidden[:, -7:],
    "DeepseekV4Model": lambda hidden: hidden.flatten(2),
    "Gemma3nTextModel": lambda hidden: torch.cat(list(hidden), dim=-1),
    "Qwen4ExpTextModel": lambda hidden: hidden,
    # Its hidden states are those of what it generates, which no edit of the prompt's tokens is in.
    "DiffusionGemmaModel": lambda hidden: hidden,
}


def record(block: nn.Module, outputs: list[torch.Tensor]) -> None:
    """Keep what a block puts out, behind all edits, whether it is called or its `forward` is."""
    forward = block.forward
    if not isinstance(forward, EditedForward):
        block.register_forward_hook(lambda module, args, output: outputs.append(first_tensor(output)))
        return

    def recorded(*args, **kwargs):
        output = forward(*args, **kwargs)
        outputs.append(first_tensor(output))
        return output

    block.forward = recorded


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_the_edit_of_a_token_is_the_equation_wherever_the_token_stands(name):
    subject = subject_of(name)
    settings = {"r": 2, "init_weights": False, "positions": "f1+l2", "layers_to_transform": 0}
    model = get_peft_model(subject.model, ReftConfig(**settings)).eval()
    (layer,) = layers_of(model)
    outputs = []
    record(layer.host, outputs)
    batch = subject.told(tokens((7, 4)))
    model(**batch)
    with model.disable_adapter():
        model(**batch)
    after, before = map(LAYOUTS[name], outputs)
    params = {name: p[0].detach() for name, p in layer.reft_intervention["default"].named_parameters()}
    for row, places in enumerate(({0, 5, 6}, {0, 2, 3})):
        for token in range(7):
            if token in places:
                expected = edited("loreft", before[row, token], params)
                torch.testing.assert_close(after[row, token], expected, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(after[row, token], before[row, token])


@pytest.mark.parametrize("name", ["XLNetModel", "DeepseekV4Model", "LongformerModel", "CpmAntModel"])
def test_sizes_of_edits_are_told_of_the_tokens_of_the_input(name):
    subject = subject_of(name)
    settings = {"r": 2, "init_weights": False, "positions": "f1+l2", "layers_to_transform": 0}
    model = get_peft_model(subject.model, ReftConfig(**settings)).eval()
    norms = edit_norms(model, subject.told(tokens((7, 4))))
    assert norms.values.shape == (2, 7, 1)
    edited_tokens = [row.nonzero().flatten().tolist() for row in norms.values[..., 0]]
    assert edited_tokens == [[0, 5, 6], [0, 2, 3]]


# Stacks of models that have several lists of blocks, or hide theirs: how many blocks, and of which class.
STACKS = {
    "RTDetrModel": {"encoder.aifi": (1, "RTDetrAIFILayer"), "decoder.layers": (2, "RTDetrDecoderLayer")},
    "RTDetrV2Model": {"encoder.aifi": (1, "RTDetrV2AIFILayer"), "decoder.layers": (2, "RTDetrV2DecoderLayer")},
    "Deimv2Model": {"encoder.aifi": (1, "Deimv2AIFILayer"), "decoder.layers": (2, "Deimv2DecoderLayer")},
    "RfDetrModel": {"decoder.layers": (2, "RfDetrDecoderLayer")},
    "VitsModel": {"text_encoder.encoder.layers": (4, "VitsEncoderLayer")},
    "IdeficsModel": {"layers": (4, "IdeficsDecoderLayer")},
    "EvollaModel": {"layers": (4, "EvollaDecoderLayer")},
    "PI0Model": {"vlm.language_model.layers": (4, "GemmaDecoderLayer")},
    "BltModel": {"local_decoder.layers": (4, "BltTransformerLayer")},
    "ParakeetForCTC": {"encoder.layers": (4, "ParakeetEncoderBlock")},
    "LasrForCTC": {"encoder.layers": (4, "LasrEncoderBlock")},
    "SiglipForImageClassification": {"vision_model.encoder.layers": (4, "SiglipEncoderLayer")},
    "Siglip2ForImageClassification": {"vision_model.encoder.layers": (4, "Siglip2EncoderLayer")},
    "MetaClip2ForImageClassification": {"vision_model.encoder.layers": (4, "MetaClip2EncoderLayer")},
    "SwiftFormerModel": {"encoder.network": (4, "SwiftFormerStage")},
    "GLPNModel": {"encoder.block": (8, "GLPNLayer")},
    "PoolFormerModel": {"encoder.block": (8, "PoolFormerLayer")},
    "PvtModel": {"encoder.block": (8, "PvtLayer")},
    "MgpstrForSceneTextRecognition": {"mgp_str.encoder.blocks": (4, "MgpstrLayer")},
    "MobileNetV1Model": {"layer": (26, "MobileNetV1ConvLayer")},
    "HrmTextModel": {"L_module.layers": (4, "HrmTextDecoderLayer"), "H_module.layers": (4, "HrmTextDecoderLayer")},
}


def on_meta(name: str) -> nn.Module:
    if not hasattr(transformers, name):
        pytest.skip(f"Transformers {transformers.__version__} has no {name}")
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        return model_class(config_for(model_class, KINDS[name][1]))


@pytest.mark.parametrize("name", STACKS)
def test_the_stack_is_the_one_that_transformers_itself_takes_for_the_blocks(name):
    found = {stack.name: (len(stack.blocks), type(stack.blocks[0]).__name__) for stack in block_lists(on_meta(name))}
    assert found == STACKS[name]


def test_blocks_of_lists_in_a_list_are_numbered_through():
    (stack,) = block_lists(on_meta("PvtModel"))
    assert stack.names == tuple(f"encoder.block.{stage}.{layer}" for stage in range(4) for layer in range(2))
    sites = find_sites(on_meta("PvtModel"), ReftConfig(positions="all", r=2, layers_to_transform=[3, -1]))
    assert [site.name for site in sites] == ["encoder.block.1.1", "encoder.block.3.1"]


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("ResNetModel", [256, 512, 1024, 2048]),
        ("HieraModel", [32, 64, 128, 256]),
        ("PvtModel", [64, 64, 128, 128, 320, 320, 512, 512]),
        ("DacModel", [64, 128, 256, 512]),
        ("ConvNextModel", [96, 192, 384, 768]),
        ("MobileViTV2Model", [64, 128, 256, 384, 512]),
    ],
)
def test_each_block_has_its_own_width_known_when_attaching(name, widths):
    sites = find_sites(on_meta(name), ReftConfig(positions="all", r=2))
    assert [site.features for site in sites] == widths


def test_a_second_adapter_needs_no_second_pass_without_numbers(monkeypatch):
    model, config = on_meta("PvtModel"), ReftConfig(positions="all", r=2)
    first = find_sites(model, config)
    monkeypatch.setattr("peft_reft.probe._runs", None)
    assert find_sites(model, config) == first
    other = on_meta("PvtModel")
    other.config.hidden_sizes = [32, 64, 160, 256]
    with pytest.raises(ValueError, match="is unknown"):
        find_sites(other, config)


def test_each_part_of_a_vision_block_has_its_own_width():
    sites = find_sites(on_meta("LevitModel"), ReftConfig(positions="all", r=2, component="attention_output"))
    # All stages but the last end with an attention that makes the grid smaller, and the features more.
    assert [site.features for site in sites] == [128, 128, 256, 256, 256, 384, 384, 384]


@pytest.mark.parametrize(
    ("name", "component", "part"),
    [
        ("LxmertModel", "mlp_output", "encoder.x_layers.{}.lang_output.dense"),
        ("LxmertModel", "attention_output", "encoder.x_layers.{}.lang_self_att.output.dense"),
        ("LiltModel", "mlp_output", "encoder.layer.{}.output.dense"),
        ("LiltModel", "attention_output", "encoder.layer.{}.attention.output.dense"),
        ("GroundingDinoModel", "mlp_output", "encoder.layers.{}.deformable_layer.fc2"),
        ("GroundingDinoModel", "attention_output", "encoder.layers.{}.deformable_layer.self_attn.output_proj"),
    ],
)
def test_the_parts_of_a_block_with_two_streams_are_those_of_what_it_returns_first(name, component, part):
    sites = find_sites(on_meta(name), ReftConfig(positions="all", r=2, component=component))
    found = [site.name for site in sites if ".decoder." not in f".{site.name}"]
    assert found
    assert found == [part.format(i) for i in range(len(found))]


@pytest.mark.parametrize(
    ("name", "component", "parts"),
    [
        ("Swinv2Model", "attention_output", ["blocks.0.attention.output.dense", "blocks.1.attention.output.dense"]),
        ("Swinv2Model", "mlp_output", ["blocks.0.output.dense", "blocks.1.output.dense"]),
        ("HieraModel", "mlp_output", ["layers.0.mlp.fc2", "layers.1.mlp.fc2"]),
    ],
)
def test_all_blocks_of_a_stage_are_edited(name, component, parts):
    model = on_meta(name)
    sites = find_sites(model, ReftConfig(positions="all", r=2, component=component, layers_to_transform=0))
    (stack,) = block_lists(model)
    assert [site.name for site in sites] == [f"{stack.names[0]}.{part}" for part in parts]


def test_the_mlp_of_a_block_with_several_is_the_last():
    sites = find_sites(on_meta("MobileBertModel"), ReftConfig(positions="all", r=2, component="mlp_output"))
    assert [site.name for site in sites] == [f"encoder.layer.{i}.output.dense" for i in range(len(sites))]


def test_an_mlp_in_a_norm_is_not_that_of_the_block():
    sites = find_sites(on_meta("AXK2Model"), ReftConfig(positions="all", r=2, component="mlp_output"))
    assert [site.name for site in sites] == ["layers.0.mlp.down_proj", *(f"layers.{i}.mlp" for i in (1, 2, 3))]


def test_an_attention_that_calls_no_projection_is_edited_as_a_whole():
    model = on_meta("WavLMModel")
    sites = find_sites(model, ReftConfig(positions="all", r=2, component="attention_output"))
    assert [site.name for site in sites] == [f"encoder.layers.{i}.attention" for i in range(len(sites))]
    with pytest.raises(ValueError, match=r"WavLMAttention uses its weight without calling it\. Target .*attention'"):
        find_sites(model, ReftConfig(positions="all", r=2, target_modules=["out_proj"]))


def test_an_mlp_of_convolutions_is_passed_over_where_nothing_tells_its_layout():
    config = ReftConfig(positions="all", r=2, component="mlp_output")
    with pytest.warns(UserWarning, match=r"2 have none and are passed over \(.*it is one of convolutions"):
        sites = find_sites(on_meta("Sam3LiteTextTextModel"), config)
    assert all(site.name.endswith("mlp.fc2") for site in sites)


def test_a_model_whose_layers_lie_in_pieces_has_no_blocks_where_norms_come_first():
    config = transformers.FlaubertConfig(emb_dim=32, n_layers=2, n_heads=4, n_words=64, pre_norm=True)
    with torch.device("meta"):
        model = transformers.FlaubertModel(config)
    with pytest.raises(ValueError, match="none were found in FlaubertModel"):
        find_sites(model, ReftConfig(positions="all", r=2))


# Models of sound -> how their ids [batch, tokens, codebooks] are handed over.
CODEBOOKS = {
    "MusicgenForCausalLM": lambda ids: ids.transpose(1, 2).flatten(0, 1),
    "MusicgenMelodyForCausalLM": lambda ids: ids.transpose(1, 2).flatten(0, 1),
    "CsmBackboneModel": lambda ids: ids,
}


@torch.no_grad()
@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_token_of_sound_has_an_id_of_each_codebook(name):
    base = build({"M": "musicgen_decoder", "C": "csm"}[name[0]], name)
    settings = {"r": 2, "init_weights": False, "positions": "f1+l2", "layers_to_transform": 0}
    model = get_peft_model(base, ReftConfig(**settings)).eval()
    (layer,) = layers_of(model)
    outputs = []
    record(layer.host, outputs)
    ids = torch.randint(10, 33, (2, 7, base.config.num_codebooks))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    model(input_ids=CODEBOOKS[name](ids), attention_mask=mask)
    with model.disable_adapter():
        model(input_ids=CODEBOOKS[name](ids), attention_mask=mask)
    changed = (outputs[0] != outputs[1]).any(-1)
    assert [row.nonzero().flatten().tolist() for row in changed] == [[0, 5, 6], [0, 2, 3]]


@torch.no_grad()
def test_the_sound_that_generate_is_given_is_the_prompt():
    base = build("musicgen_decoder", "MusicgenForCausalLM")
    # A number that stands for no sound, between codebooks whose sound begins later.
    base.generation_config.decoder_start_token_id = base.generation_config.pad_token_id = base.config.vocab_size
    config = ReftConfig(r=2, init_weights=False, positions="f1+l1", layers_to_transform=0, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    outputs = []
    record(base.model.decoder.layers[0], outputs)
    ids = torch.randint(10, 33, (2 * base.config.num_codebooks, 5))
    # With a cache the base model begins with one token, whatever it is given.
    options = {"max_new_tokens": 3, "do_sample": False, "guidance_scale": 1, "num_return_sequences": 1}
    try:
        base.generate(ids, use_cache=False, **options)
    except AttributeError:
        pytest.skip(f"MusicGen of Transformers {transformers.__version__} does not generate without a cache")
    outputs.clear()
    model.generate(ids, use_cache=False, **options)
    edited = [hidden.clone() for hidden in outputs]
    outputs.clear()
    with model.disable_adapter():
        model.generate(ids, use_cache=False, **options)
    assert [hidden.shape[1] for hidden in edited] == [5, 6, 7]
    for after, before in zip(edited, outputs, strict=True):
        # What is generated differs, and is not prompt.
        changed = (after != before).any(-1)[:, :5]
        assert [row.nonzero().flatten().tolist() for row in changed] == [[0, 4], [0, 4]]


@torch.no_grad()
def test_layers_that_a_pass_leaves_out_are_said():
    subject = subject_of("MllamaForCausalLM")
    model = get_peft_model(subject.model, ReftConfig(r=2, positions="all")).eval()
    # Without an image the model skips the layer that attends to one.
    with pytest.warns(UserWarning, match=r"did not call 'model\.layers\.3' in this pass"):
        model(**subject.inputs)


def test_a_counted_token_is_refused_when_attaching_where_it_has_no_place():
    with pytest.raises(ValueError, match=r"'f1' has no meaning at 'encoder\.layer\.0': .* one vector for several char"):
        find_sites(on_meta("CanineModel"), ReftConfig(positions="f1"))
    with pytest.raises(ValueError, match=r"'f1' has no meaning at 'encoder\.blocks\.1\.0': .* pools tokens"):
        find_sites(on_meta("FunnelModel"), ReftConfig(positions="f1"))
    sites = find_sites(on_meta("FunnelModel"), ReftConfig(positions="f1", layers_to_transform=[0]))
    assert [site.name for site in sites] == ["encoder.blocks.0.0"]


@torch.no_grad()
def test_a_hybrid_encoder_of_feature_maps_is_edited_at_every_place():
    backbone = transformers.RTDetrResNetConfig(
        embeddings_size=10,
        hidden_sizes=[10, 20, 30, 40],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {"encoder_hidden_dim": 32, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 1}
    base = transformers.RTDetrModel(
        transformers.RTDetrConfig(
            backbone_config=backbone,
            encoder_in_channels=[20, 30, 40],
            decoder_in_channels=[32, 32, 32],
            num_queries=12,
            num_denoising=0,
            anchor_image_size=None,
            **sizes,
            **heads,
        )
    ).eval()
    model = get_peft_model(base, ReftConfig(r=2, positions="all", init_weights=False, layers_pattern="aifi")).eval()
    (layer,) = layers_of(model)
    outputs = []
    record(base.encoder.aifi[0], outputs)
    pixels = torch.randn(1, 3, 64, 64)
    model(pixels)
    with model.disable_adapter():
        model(pixels)
    after, before = (output[0].flatten(1).T for output in outputs)  # [places, features]
    params = {name: p[0] for name, p in layer.reft_intervention["default"].named_parameters()}
    assert len(before) > 1
    for place, hidden in enumerate(before):
        torch.testing.assert_close(after[place], edited("loreft", hidden, params), rtol=1e-4, atol=1e-5)

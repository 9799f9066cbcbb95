"""Components of a block: each edits the tensor that it names, in tiny random models of every family."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from accelerate import cpu_offload
from adapters import IDS, layers_of, lora
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from reference import Reference, gradients
from routes import GENERATE, PARAMETERS, TOLERANCE, sequences
from test_sites import hidden_of
from tiny import HIDDEN, LAYERS, VOCAB, ZOO, Tiny, in_float64
from torch import nn

from peft_reft import ReftConfig
from peft_reft.components import COMPONENTS, find_component
from peft_reft.layer import layers

# Names of the modules whose outputs the self-attention and the MLP of a block add to the residual stream.
LLAMA = ("self_attn.o_proj", "mlp.down_proj")
BERT = ("attention.output.dense", "output.dense")
BART = ("self_attn.out_proj", "fc2")
MIXTURE = ("self_attn.o_proj", "mlp")
PARTS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "llama_classifier"], LLAMA),
    **dict.fromkeys(["t5gemma", "llava", "gemma3_vision", "qwen2_vision"], LLAMA),
    **dict.fromkeys(["mixtral", "qwen3_moe"], MIXTURE),
    **dict.fromkeys(["bert", "bert_classifier", "roberta", "deberta_v2", "electra"], BERT),
    **dict.fromkeys(["opt", "opt_projected", "bart", "bart_classifier", "bart_decoder"], BART),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "t5": ("layer.0.SelfAttention.o", "layer.2.DenseReluDense.wo"),
    "t5_encoder": ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"),
}
T5_ENCODER = PARTS["t5_encoder"]
MAMBAS = ("mamba", "mamba2")


def parts_of(name: str, component: str) -> list[str]:
    """Names of the modules that hold a component of every block, written by hand."""
    model = ZOO[name]
    if component.startswith("block"):
        return [f"{stack}.{i}" for stack in (model.encoder, model.blocks) if stack for i in range(LAYERS)]
    which = ("attention_output", "mlp_output").index(component)
    if name == "jamba":  # attention and experts in the second block alone
        attention = ["model.layers.1.self_attn.o_proj"]
        return (
            attention
            if which == 0
            else [
                "model.layers.0.feed_forward.down_proj",
                "model.layers.1.feed_forward",
                "model.layers.2.feed_forward.down_proj",
            ]
        )
    names = [f"{model.blocks}.{i}.{PARTS[name][which]}" for i in range(LAYERS)]
    if model.encoder:
        in_encoder = T5_ENCODER if name == "t5" else PARTS[name]
        names += [f"{model.encoder}.{i}.{in_encoder[which]}" for i in range(LAYERS)]
    return names


def adapted(base: nn.Module, **settings) -> PeftModel:
    return get_peft_model(base, ReftConfig(**{"r": 2, "init_weights": False} | settings)).eval()


def sites_of(model: nn.Module, side: str = "output") -> set[str]:
    return {layer.site_name for layer in layers_of(model) if layer.side == side}


def reference_of(model: PeftModel, base: nn.Module, spec: str, adapter: str = "default") -> Reference:
    """The oracle with the parameters of an adapter, on a separate base; sites by their names there."""
    sites, inputs = {}, {}
    names = {module: name for name, module in model.get_base_model().named_modules()}
    for layer in layers(model):
        if adapter not in layer.reft_intervention:
            continue
        intervention = layer.reft_intervention[adapter]
        params = {name: getattr(intervention, name).detach().clone().requires_grad_() for name in PARAMETERS}
        (inputs if layer.side == "input" else sites)[names[layer.host]] = params
    return Reference(base, sites, spec, inputs=inputs)


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, VOCAB, (2, 7))
    ids[:, -1] = tiny.EOS  # BART classifies at the end of the sequence
    if ZOO[name].encoder and ZOO[name].task_type:
        return {"input_ids": ids, "decoder_input_ids": torch.randint(10, VOCAB, (2, 4))}
    return {"input_ids": ids}


def roles_of(name: str, site: str) -> str:
    """The encoder's tokens are the prompt; without an encoder, all tokens passed in."""
    if not ZOO[name].encoder or site.startswith(f"{ZOO[name].encoder}."):
        return "p" * 7
    return "c" * (4 if ZOO[name].task_type else 7)


ALL = list(COMPONENTS)
CASES = [
    (name, component)
    for name in ZOO
    for component in ("block_input", "attention_output", "mlp_output", ALL)
    if component == "block_input" or name not in MAMBAS
]


@pytest.mark.parametrize(("name", "component"), CASES, ids=[f"{n}-{'all' if c is ALL else c}" for n, c in CASES])
@torch.no_grad()
def test_a_component_is_edited_at_the_tensor_that_it_names(name, component):
    components = [component] if isinstance(component, str) else component
    base, inputs = in_float64(ZOO[name].build()), inputs_of(name)
    plain = hidden_of(base(**inputs))
    alone = copy.deepcopy(base)
    spec = "all" if ZOO[name].encoder else "f2+l1"
    model = adapted(base, component=component, positions=spec, task_type=ZOO[name].task_type).double()
    reference = reference_of(model, alone, spec)

    assert reference.inputs.keys() == set(parts_of(name, "block_input") if "block_input" in components else ())
    outputs = [parts_of(name, c) for c in components if c != "block_input"]
    assert reference.sites.keys() == {site for sites in outputs for site in sites}
    assert sites_of(model) == reference.sites.keys()
    with reference.editing({site: roles_of(name, site) for site in (*reference.sites, *reference.inputs)}):
        expected = hidden_of(alone(**inputs))
    got = hidden_of(model(**inputs))
    assert (got - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", MAMBAS)
@pytest.mark.parametrize("component", ["attention_output", "mlp_output"])
def test_a_model_without_the_component_says_so(name, component):
    base = ZOO[name].build()
    missing = {"attention_output": "attention", "mlp_output": "MLP"}[component]
    reason = rf"component='{component}' was not found in .* \(Mamba2?Block: no {missing} was found in it\)\. Name the"
    with pytest.raises(ValueError, match=reason):
        adapted(base, component=component)
    assert not layers_of(base)


def test_layers_without_the_component_are_passed_over_and_counted():
    said = r"'attention_output' is edited in 1 layers; 2 have none .* \(JambaMambaDecoderLayer: no attention was found"
    with pytest.warns(UserWarning, match=said):
        adapted(ZOO["jamba"].build(), component="attention_output")
    assert sites_of(adapted(ZOO["jamba"].build(), component="attention_output")) == {"model.layers.1.self_attn.o_proj"}
    with pytest.raises(ValueError, match="component='attention_output' was not found"):
        adapted(ZOO["jamba"].build(), component="attention_output", layers_to_transform=[0, 2])


def test_a_block_that_adds_up_two_mlps_has_no_mlp_output():
    settings = tiny._LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}
    alone = Tiny("GraniteMoeForCausalLM", settings, "")
    beside = Tiny("GraniteMoeSharedForCausalLM", settings | {"shared_intermediate_size": 32}, "")
    sites = sites_of(adapted(alone.build(), component="mlp_output"))
    assert sites == {f"model.layers.{i}.block_sparse_moe" for i in range(LAYERS)}
    # Older releases do not name which parts are experts.
    why = r"it (adds up the outputs of|has) several MLPs"
    with pytest.raises(ValueError, match=rf"component='mlp_output' was not found .* {why}"):
        adapted(beside.build(), component="mlp_output")


def test_several_mlps_without_a_known_projection_are_named():
    def mlp() -> nn.Module:
        return nn.ModuleDict({"expand": nn.Linear(4, 8), "shrink": nn.Linear(8, 4)})

    block = nn.ModuleDict({"sparse_moe": mlp(), "shared_mlp": mlp()})
    assert find_component(block, "mlp_output") == "it has several MLPs (sparse_moe, shared_mlp)"
    del block["sparse_moe"]
    assert [part.name for part in find_component(block, "mlp_output")] == ["shared_mlp"]


def test_experts_in_the_attention_are_not_the_mlp():
    settings = tiny._LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    sites = sites_of(adapted(Tiny("JetMoeForCausalLM", settings, "").build(), component="mlp_output"))
    assert sites == {f"model.layers.{i}.mlp" for i in range(LAYERS)}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: Tiny("GPT2LMHeadModel", tiny._GPT2 | {"add_cross_attention": True}, "").build(), "attn.c_proj"),
        (
            lambda: Tiny("BertLMHeadModel", tiny._BERT | {"is_decoder": True, "add_cross_attention": True}, "").build(),
            "attention.output.dense",
        ),
        (lambda: ZOO["t5"].build(), "layer.0.SelfAttention.o"),
        (lambda: ZOO["bart"].build(), "self_attn.out_proj"),
        (tiny.WHISPER.build, "self_attn.out_proj"),
    ],
    ids=["gpt2", "bert", "t5", "bart", "whisper"],
)
def test_the_attention_of_a_decoder_that_listens_is_its_self_attention(build, expected):
    sites = sites_of(adapted(build(), component="attention_output", positions="completion"))
    assert len(sites) == LAYERS
    assert all(site.endswith(f".{expected}") for site in sites)


def test_a_block_that_attends_to_images_only_has_no_attention_output():
    model = Tiny("MllamaForCausalLM", tiny._LLAMA | {"cross_attention_layers": [1]}, "").build()
    sites = sites_of(adapted(model, component="attention_output"))
    assert sites == {f"model.layers.{i}.self_attn.o_proj" for i in (0, 2)}


def test_a_block_that_is_applied_several_times_has_its_components():
    sites = sites_of(adapted(tiny.ALBERT.build(), component=["attention_output", "mlp_output"], positions="all"))
    inside = "encoder.albert_layer_groups.0.albert_layers.0"
    assert sites == {f"{inside}.attention.dense", f"{inside}.ffn_output"}


# Layers and modules left out


def test_layers_are_chosen_as_for_blocks():
    model = adapted(tiny.llama(), component=["attention_output", "block_input"], layers_to_transform=[0, -1])
    assert sites_of(model) == {f"model.layers.{i}.self_attn.o_proj" for i in (0, 2)}
    assert sites_of(model, "input") == {"model.layers.0", "model.layers.2"}
    with pytest.raises(ValueError, match="there is no layer 3"):
        adapted(tiny.llama(), component="mlp_output", layers_to_transform=3)


@pytest.mark.filterwarnings("error:You have passed exclude_modules")
@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["layers.1"], {"0 mlp", "1 mlp", "2 mlp", "0", "2"}),  # the block itself, not what is inside
        (["layers.1.mlp.down_proj"], {"0 mlp", "2 mlp", "0", "1", "2"}),
        (r".*\.[01]\..*", {"2 mlp", "0", "1", "2"}),
        (["down_proj"], {"0", "1", "2"}),
    ],
    ids=["block", "part", "regex", "component"],
)
def test_exclude_modules_takes_single_places(exclude, left):
    model = adapted(tiny.llama(), component=["mlp_output", "block_output"], exclude_modules=exclude)
    short = {s.removeprefix("model.layers.").replace(".mlp.down_proj", " mlp") for s in sites_of(model)}
    assert short == left


# Several components


def test_several_components_have_parameters_of_their_own_that_are_saved_and_loaded(tmp_path):
    base = tiny.llama()
    plain, alone = base(input_ids=IDS).logits, copy.deepcopy(base)
    model = adapted(base, component=ALL, task_type="CAUSAL_LM", r=3)
    per_site = 2 * 3 * HIDDEN + 3
    assert model.get_nb_trainable_parameters()[0] == 4 * LAYERS * per_site
    places = ("reft", "input_reft", "self_attn.o_proj.reft", "mlp.down_proj.reft")
    expected = {
        f"base_model.model.model.layers.{i}.{place}.reft_intervention.{name}"
        for i in range(LAYERS)
        for place in places
        for name in PARAMETERS
    }
    assert get_peft_model_state_dict(model).keys() == expected

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(alone, tmp_path).eval()
    assert loaded.peft_config["default"].component == ALL
    logits = model(input_ids=IDS).logits
    assert not torch.equal(logits, plain)
    assert torch.equal(loaded(input_ids=IDS).logits, logits)
    with loaded.disable_adapter():
        assert torch.equal(loaded(input_ids=IDS).logits, plain)


def test_the_input_and_the_output_of_one_block_are_edited_by_different_weights():
    base = tiny.llama()
    model = adapted(base, component=["block_input", "block_output"], positions="all", layers_to_transform=1)
    one, other = layers_of(model)
    assert (one.side, other.side) in {("input", "output"), ("output", "input")}
    block = base.model.layers[1]
    assert {one, other} == {block.reft, block.input_reft}
    assert not torch.equal(one.reft_intervention["default"].weight, other.reft_intervention["default"].weight)
    model(input_ids=IDS).logits.square().sum().backward()
    assert all(p.grad.any() for layer in (one, other) for p in layer.parameters())


def test_adapters_on_different_components_are_switched_and_deleted():
    base = tiny.llama()
    plain, alone = base(input_ids=IDS).logits, copy.deepcopy(base)
    model = adapted(base, component=["attention_output", "block_input"], task_type="CAUSAL_LM")
    first = model(input_ids=IDS).logits
    model.add_adapter("other", ReftConfig(component="mlp_output", r=2, init_weights=False, positions="l1"))
    model.set_adapter("other")
    reference = reference_of(model, alone, "l1", "other")
    with reference.editing("p" * IDS.shape[1]), torch.no_grad():
        expected = alone(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    model.delete_adapter("other")
    assert model.active_adapter == "default"
    assert torch.equal(model(input_ids=IDS).logits, first)
    model.delete_adapter("default")
    assert torch.equal(base(input_ids=IDS).logits, plain)


def test_unload_leaves_no_trace():
    base = tiny.llama()
    plain = base(input_ids=IDS).logits
    modules = [name for name, _ in base.named_modules()]
    model = adapted(base, component=ALL)
    model(input_ids=IDS)
    unloaded = model.unload()
    assert [name for name, _ in unloaded.named_modules()] == modules
    for module in unloaded.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
    assert torch.equal(unloaded(input_ids=IDS).logits, plain)


# Modules of other widths, and modules that are not called


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("llama", {"q_proj": 32, "k_proj": 16, "gate_proj": 64}),
        ("phi3", {"qkv_proj": 64, "gate_up_proj": 128}),
        ("gpt2", {"c_attn": 96, "c_fc": 128}),
        ("falcon", {"query_key_value": 96, "dense_h_to_4h": 128}),
    ],
    ids=["llama", "phi3", "gpt2", "falcon"],
)
@torch.no_grad()
def test_named_modules_are_edited_in_their_own_width(name, widths):
    base = ZOO[name].build().double()
    alone, inputs = copy.deepcopy(base), inputs_of(name)
    model = adapted(base, target_modules=list(widths), positions="f2+l1", task_type="CAUSAL_LM").double()
    for layer in layers_of(model):
        assert layer.out_features == widths[layer.site_name.rpartition(".")[2]]
    assert len(layers_of(model)) == LAYERS * len(widths)
    reference = reference_of(model, alone, "f2+l1")
    with reference.editing("p" * 7):
        expected = alone(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, hidden):
        return self.attention(hidden, hidden, hidden)[0]


@pytest.mark.parametrize(
    ("build", "target", "parent"),
    [
        (Attends, "attention.out_proj", "attention"),
        (lambda: ZOO["mamba"].build(), "out_proj", r"backbone\.layers\.0\.mixer"),
        (lambda: ZOO["mamba2"].build(), "out_proj", r"backbone\.layers\.0\.mixer"),
        (lambda: ZOO["jamba"].build(), "mamba.out_proj", r"model\.layers\.0\.mamba"),
    ],
    ids=["multihead", "mamba", "mamba2", "jamba"],
)
def test_a_projection_whose_weight_is_used_without_a_call_is_refused(build, target, parent):
    base = build()
    with pytest.raises(ValueError, match=rf"{parent}\.out_proj' cannot be edited: .* Target '{parent}' instead"):
        adapted(base, target_modules=[target])
    assert not layers_of(base)


def test_the_module_that_is_to_be_targeted_instead_works():
    base = Attends().eval()
    base.attention.out_features = 8
    hidden = torch.randn(2, 5, 8)
    plain = base(hidden)
    assert not torch.allclose(adapted(base, target_modules=["attention"], positions="all")(hidden), plain)


def test_what_lora_has_wrapped_is_edited_behind_lora():
    base = tiny.llama()
    model = get_peft_model(base, lora(target_modules=["o_proj", "down_proj"]), adapter_name="lora").eval()
    wrapped = adapted(model.base_model.model, component=["attention_output", "mlp_output"], positions="all")
    assert sites_of(wrapped) == {
        f"model.layers.{i}.{part}" for i in range(LAYERS) for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    layer = base.model.layers[1].self_attn.o_proj
    seen = {}
    layer.register_forward_hook(lambda m, a, out: seen.update(before=out.detach()), prepend=True)
    layer.register_forward_hook(lambda m, a, out: seen.update(after=out.detach(), given=a[0].detach()))
    with torch.no_grad():
        wrapped(input_ids=IDS)
        lora_output = (
            layer.base_layer(seen["given"])
            + layer.lora_B["lora"](layer.lora_A["lora"](seen["given"])) * layer.scaling["lora"]
        )
    torch.testing.assert_close(seen["before"], lora_output)
    assert (seen["after"] - seen["before"]).abs().max() > 1e-3


# Routes


def pair(component, spec: str = "f2+l1"):
    base = tiny.llama().double()
    alone = copy.deepcopy(base)
    model = adapted(base, component=component, positions=spec, task_type="CAUSAL_LM").double()
    return model, reference_of(model, alone, spec)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("component", ["block_input", ALL], ids=["block_input", "all"])
def test_gradients_of_inputs_under_gradient_checkpointing(component, reentrant):
    model, reference = pair(component)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids, labels = IDS[:1], IDS[:1].clone()
    labels[:, :5] = -100
    # Two passes before one backward: each recomputation needs its own plan.
    probe = torch.randn(1, 8, VOCAB, dtype=torch.float64)
    other = IDS[1:, :6]
    both = (model(input_ids=ids, labels=labels).logits * probe).sum() + model(input_ids=other).logits.square().sum()
    both.backward()
    expected = (reference.logits(ids[0].tolist(), "pppppccc") * probe[0]).sum()
    expected = expected + reference.logits(other[0].tolist(), "pppppp").square().sum()
    sites = reference.sites
    reference.sites = {(name, "output"): p for name, p in sites.items()} | {
        (name, "input"): p for name, p in reference.inputs.items()
    }
    names = {module: name for name, module in model.get_base_model().named_modules()}
    mine = {
        ((names[layer.host], layer.side), name): getattr(layer.reft_intervention["default"], name).grad
        for layer in layers(model)
        for name in PARAMETERS
    }
    for key, grad in gradients(reference, expected).items():
        assert grad.any()
        torch.testing.assert_close(mine[key], grad, rtol=TOLERANCE, atol=TOLERANCE * max(1, grad.abs().max().item()))


@pytest.mark.parametrize("spec", ["f2+l3", "all", "completion"])
@pytest.mark.parametrize("component", ["block_input", ["attention_output", "mlp_output"]], ids=["input", "parts"])
def test_generation_with_and_without_a_cache(component, spec):
    model, reference = pair(component, spec)
    (ids,) = sequences(("p" * 6,))
    expected = reference.generate(ids, **GENERATE)
    for use_cache in (True, False):
        got = model.generate(input_ids=torch.tensor([ids]), use_cache=use_cache, **GENERATE)
        assert got.tolist() == expected.tolist()
    assert expected.tolist() != tiny.llama().double().generate(input_ids=torch.tensor([ids]), **GENERATE).tolist()


def test_a_batch_of_rows_on_one_axis_is_edited_in_the_right_rows():
    base = ZOO["opt"].build().double()
    alone = copy.deepcopy(base)
    model = adapted(base, component="mlp_output", positions="f2+l1", task_type="CAUSAL_LM").double()
    reference = reference_of(model, alone, "f2+l1")
    batch = torch.tensor(sequences(("p" * 6, "p" * 6)))
    got = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), **GENERATE | {"eos_token_id": None})
    for row, ids in zip(got.tolist(), batch.tolist(), strict=True):
        while len(ids) < len(row):
            ids.append(int(reference.logits(ids, "p" * 6 + "c" * (len(ids) - 6))[-1].argmax()))
        assert row == ids


@torch.no_grad()
def test_models_whose_weights_are_loaded_by_accelerate_when_they_are_needed():
    base = tiny.llama()
    model = adapted(base, component=ALL, positions="f2+l1", task_type="CAUSAL_LM")
    expected = model(input_ids=IDS).logits
    parameters = get_peft_model_state_dict(model)
    offloaded = cpu_offload(tiny.llama(), execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].mlp.down_proj.weight.is_meta
    model = adapted(offloaded, component=ALL, positions="f2+l1", task_type="CAUSAL_LM")
    model.load_state_dict(
        {k.replace("reft_intervention.", "reft_intervention.default."): v for k, v in parameters.items()}, strict=False
    )
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)


# Configs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"component": "attention"}, r"Unknown component 'attention'; allowed are \['block_output', 'block_input'"),
        ({"component": ["block_output", "mlp"]}, "Unknown component 'mlp'"),
        ({"component": []}, r"component=\[\] must name something"),
        ({"component": ["mlp_output", "mlp_output"]}, "nothing twice"),
        (
            {"component": "mlp_output", "target_modules": ["o_proj"]},
            r"target_modules=\['o_proj'\] and component='mlp_output' contradict",
        ),
        ({"component": ["block_output", "block_input"], "target_modules": "x"}, "contradict each other"),
    ],
)
def test_wrong_components_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReftConfig(**settings)


@pytest.mark.parametrize("component", [("mlp_output", "block_input"), {"mlp_output", "block_input"}], ids=type)
def test_components_of_any_collection_are_stored_as_a_list(component, tmp_path):
    config = ReftConfig(component=component)
    config.save_pretrained(tmp_path)
    loaded = ReftConfig.from_pretrained(tmp_path)
    assert loaded.component == config.component
    assert sorted(loaded.components) == ["block_input", "mlp_output"]

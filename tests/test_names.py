"""The public names compared with PEFT's: ReFT's layers and models offer what LoRA's do, on every kind of model."""

from __future__ import annotations

import inspect

import pytest
import tiny
import torch
from adapters import IDS, NEEDS_ADD_ADAPTER, layers_of, logits, lora, reft
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from reference import edited
from tiny import ZOO
from transformers import AutoModelForCausalLM

import peft_reft
from peft_reft import Intervention, LowRankIntervention, ReftConfig, methods, register_intervention, steering, weighted
from peft_reft.interventions import INTERVENTIONS, LoreftIntervention

GROUPS = {"style": 1, "task": 3}


def scaled_layers(model) -> list:
    return [module for module in model.modules() if isinstance(module, LoraLayer)] or layers_of(model)


# The layer's scale


@pytest.mark.parametrize("config", [reft(layers_to_transform=[1]), lora(layers_to_transform=[1])], ids=["reft", "lora"])
def test_peft_rescales_adapters_for_a_while(config):
    model = get_peft_model(tiny.llama(), config).eval()
    before, seen = logits(model), {}
    with model.disable_adapter():
        base = logits(model)
    for multiplier in (0, 0.5, 1):
        with rescale_adapter_scale(model, multiplier):
            seen[multiplier] = logits(model)
    torch.testing.assert_close(seen[0], base)
    assert torch.equal(seen[1], before)
    assert not torch.allclose(seen[0.5], base, atol=1e-3)
    assert not torch.allclose(seen[0.5], before, atol=1e-3)
    assert torch.equal(logits(model), before)


def test_rescaling_is_set_strength():
    model = get_peft_model(tiny.llama(), reft()).eval()
    model.set_strength("default", 0.5)
    with rescale_adapter_scale(model, 3):
        rescaled = logits(model)
        assert model.get_strength("default") == 1.5
    assert model.get_strength("default") == 0.5
    model.set_strength("default", 1.5)
    assert torch.equal(logits(model), rescaled)


@pytest.mark.parametrize("config", [reft(), lora()], ids=["reft", "lora"])
def test_the_methods_of_a_layer_scale_as_those_of_lora(config):
    model = get_peft_model(tiny.llama(), config)
    model.add_adapter("other", config)
    layer = scaled_layers(model)[0]
    first = layer.scaling["default"]
    steps = []
    for call in (
        lambda: layer.set_scale("default", 3),
        lambda: layer.set_scale("other", 5),
        lambda: layer.set_scale("nobody", 7),
        lambda: layer.scale_layer(2),
        lambda: layer.scale_layer(1),
        lambda: layer.unscale_layer(4),
        lambda: layer.unscale_layer(),
    ):
        call()
        steps.append([layer.scaling[name] / first for name in ("default", "other")])
    assert steps == [[3, 1], [3, 5], [3, 5], [6, 5], [6, 5], [1.5, 5], [1, 5]]


def test_a_merged_adapter_is_not_rescaled():
    model = get_peft_model(tiny.llama(), reft(positions="all", component="mlp_output"))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged.*unmerge_adapter"), rescale_adapter_scale(model, 2):
        pytest.fail("the block was entered")
    assert model.get_strength("default") == 1
    with pytest.raises(ValueError, match="strength must be finite"):
        layers_of(model)[0].set_scale("default", float("nan"))


def test_layers_with_different_scales_have_no_one_strength():
    model = get_peft_model(tiny.llama(), reft())
    layers_of(model)[1].set_scale("default", 2)
    with pytest.raises(ValueError, match=r"no single strength.*model\.layers\.1': 2\.0"):
        model.get_strength("default")


# Steering without a PEFT model


def injected(**settings):
    return inject_adapter_in_model(reft(**settings), tiny.llama()).eval()


def added(**settings):
    model = tiny.llama()
    model.add_adapter(reft(**settings), adapter_name="default")
    return model.eval()


def wrapped(**settings):
    with torch.random.fork_rng():
        return get_peft_model(tiny.llama(), reft(**settings)).eval()


MODELS = pytest.mark.parametrize("build", [wrapped, injected, pytest.param(added, marks=NEEDS_ADD_ADAPTER)])


@MODELS
def test_steering_works_on_any_model_that_carries_adapters(build):
    torch.manual_seed(3)
    model = build(subspaces=GROUPS)
    twin = wrapped(subspaces=GROUPS)
    for mine, theirs in zip(layers_of(model), layers_of(twin), strict=True):
        mine.reft_intervention.load_state_dict(theirs.reft_intervention.state_dict())
    assert torch.equal(logits(model), logits(twin))
    steering.set_strength(model, "default", 0.5)
    twin.set_strength("default", 0.5)
    assert steering.get_strength(model, "default") == twin.get_strength("default") == 0.5
    assert torch.equal(logits(model), logits(twin))
    with steering.rescaled(model, "default", 2), twin.rescaled("default", 2):
        assert torch.equal(logits(model), logits(twin))
    with steering.use_subspaces(model, "default", "style"), twin.use_subspaces("default", "style"):
        assert torch.equal(logits(model), logits(twin))
    steering.set_subspaces(model, "default", ["task"])
    twin.set_subspaces("default", ["task"])
    assert torch.equal(logits(model), logits(twin))
    assert torch.equal(steering.projection(model, "default", 1), twin.projection("default", 1))
    directions = {0: torch.randn(4, tiny.HIDDEN)}
    steering.set_directions(model, "default", directions)
    twin.set_directions("default", directions)
    assert model.peft_config["default"].freeze_subspace
    assert torch.equal(logits(model), logits(twin))
    assert not any(layer.reft_intervention["default"].projection.requires_grad for layer in layers_of(model))


@MODELS
def test_adapters_are_added_on_any_model_that_carries_them(build):
    torch.manual_seed(3)
    model = build(positions="all")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    before = logits(model)
    weighted.add_weighted_adapter(model, ["default"], [0.5], "sum")
    assert torch.equal(logits(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    assert set(model.peft_config) == {"default", "sum"}
    steering.set_strength(model, "default", 0.5)
    expected = logits(model)
    for layer in layers_of(model):
        layer.set_adapter("sum")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_module_around_a_model_is_steered_too():
    around = torch.nn.ModuleDict({"inner": injected()})
    steering.set_strength(around, "default", 0)
    assert steering.get_strength(around, "default") == 0
    steering.set_directions(around, "default", {1: torch.randn(4, tiny.HIDDEN)}, trainable=True)


def test_every_method_that_steers_is_a_function_with_the_model_in_front():
    own = {name for name in vars(methods.SteeringMixin) if not name.startswith("_")}
    old = {"strength", "only_subspaces", "subspace"}
    for name in own - old:
        function = getattr(weighted if name == "add_weighted_adapter" else steering, name)
        expected, got = inspect.signature(function), inspect.signature(getattr(methods.SteeringMixin, name))
        assert [*got.parameters][1:] == [*expected.parameters][1:], name
        assert "adapter" not in got.parameters
    model = get_peft_model(tiny.llama(), reft(subspaces=GROUPS))
    assert torch.equal(model.subspace("default", 0), model.projection("default", 0))
    with model.strength("default", 0.25), model.only_subspaces("default", "style"):
        assert model.get_strength("default") == 0.25


# Methods of one's own


class Half(LowRankIntervention):
    orthonormal, learned, replaces = True, False, True


@pytest.fixture
def _half():
    yield
    INTERVENTIONS.pop("half", None)


@pytest.mark.usefixtures("_half")
def test_a_method_is_registered():
    register_intervention("half", Half)
    register_intervention("half", Half)
    assert ReftConfig(intervention="half").intervention == "half"
    with pytest.raises(ValueError, match="name='half' is taken by Half"):
        register_intervention("half", LoreftIntervention)
    assert INTERVENTIONS["half"] is Half


@pytest.mark.parametrize(
    ("name", "cls", "error", "message"),
    [
        ("loreft", Half, ValueError, "name='loreft' is taken by LoreftIntervention"),
        ("My Method", Half, ValueError, "identifier in lower case, got 'My Method'"),
        ("half", torch.nn.Linear, TypeError, "subclass of Intervention"),
        ("half", Half(4, 1), TypeError, "subclass of Intervention"),
        ("half", Intervention, TypeError, "class attribute low_rank"),
    ],
)
def test_what_is_no_method_is_refused(name, cls, error, message):
    with pytest.raises(error, match=message):
        register_intervention(name, cls)


# No b


@pytest.mark.parametrize("method", sorted(set(INTERVENTIONS) - {"lobireft"}))
def test_without_a_bias_a_method_is_its_equation_with_zero(method):
    own = INTERVENTIONS[method](12, 3, bias=False, init_weights=False).double()
    assert "bias" not in dict(own.named_parameters())
    params = {name: parameter[0] for name, parameter in own.named_parameters()}
    params["bias"] = torch.zeros(12 if method == "red" else 3, dtype=torch.float64)
    hidden = torch.randn(5, 12, dtype=torch.float64)
    expected = torch.stack([edited(method, h, params) for h in hidden])
    torch.testing.assert_close(hidden + own(hidden), expected)
    torch.testing.assert_close(own.apply_to(hidden), expected)


@pytest.mark.parametrize("init_weights", [True, "pyreft", False])
@pytest.mark.parametrize("method", sorted(set(INTERVENTIONS) - {"lobireft"}))
def test_an_adapter_without_a_bias_trains_saves_loads_and_mixes(method, init_weights, tmp_path):
    config = reft(intervention=method, use_bias=False, init_weights=init_weights)
    model = get_peft_model(tiny.llama(), config)
    model(input_ids=IDS, labels=torch.where(torch.arange(8) > 3, IDS, -100)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    model.add_adapter("other", reft(intervention=method, init_weights=False))
    expected = logits(model)
    mixed = logits(model, adapter_names=["default", "other"])
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert not loaded.peft_config["default"].use_bias
    assert torch.equal(logits(loaded), expected)


FAMILIES = [("llama", "mlp_output"), ("llama", "attention_output"), ("qwen2", "mlp_output"), ("mistral", "mlp_output")]


@pytest.mark.parametrize("method", sorted(set(INTERVENTIONS) - {"lobireft"}))
@pytest.mark.parametrize(("family", "component"), [*FAMILIES, ("qwen2", "attention_output"), ("qwen3", "mlp_output")])
def test_it_merges_for_good_into_layers_without_a_bias(family, component, method, tmp_path):
    model = get_peft_model(
        ZOO[family].build(), reft(intervention=method, positions="all", component=component, use_bias=False)
    ).eval()
    expected = logits(model)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected, atol=1e-2)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits(loaded.eval()), logits(merged))


def test_with_a_bias_the_refusal_names_the_option():
    model = get_peft_model(ZOO["mistral"].build(), reft(positions="all", component="mlp_output"))
    with pytest.raises(ValueError, match=r"no such bias.*use_bias=False"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intervention": "lobireft", "use_bias": False}, r"use_bias=False: 'lobireft' is zero without a b"),
        ({"use_bias": "none"}, "use_bias must be True or False, got 'none'"),
        ({"ensure_weight_tying": 1}, "ensure_weight_tying must be True or False, got 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReftConfig(**settings)


def test_directions_of_a_method_that_is_nothing_but_directions():
    model = get_peft_model(tiny.llama(), reft(intervention="consreft", use_bias=False, positions="all", r=1)).eval()
    direction = torch.randn(tiny.HIDDEN)
    model.set_directions("default", {1: direction}, trainable=True)
    assert layers_of(model)[1].reft_intervention["default"].projection.requires_grad
    hidden = torch.randn(4, tiny.HIDDEN)
    unit = direction / direction.norm()
    edit = layers_of(model)[1].reft_intervention["default"](hidden)
    torch.testing.assert_close(edit, -(hidden @ unit)[:, None] * unit)


# Ties


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
@pytest.mark.parametrize("config", [reft, lora], ids=["reft", "lora"])
def test_modules_to_save_stay_tied(config, saved, tmp_path):
    settings = {"modules_to_save": saved, "ensure_weight_tying": True}
    model = get_peft_model(tiny.llama(tie_word_embeddings=True), config(**settings)).eval()

    def assert_tied(model):
        base = model.get_base_model()
        embedding = base.model.embed_tokens.modules_to_save["default"].weight
        assert base.lm_head.modules_to_save["default"].weight is embedding

    assert_tied(model)
    model.get_base_model().model.embed_tokens.modules_to_save["default"].weight.data.mul_(1.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(tie_word_embeddings=True), tmp_path).eval()
    assert_tied(loaded)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("name", ["half", "keys"])
def test_names_that_no_module_can_have_are_refused(name):
    with pytest.raises(ValueError, match="cannot be the name of an adapter"):
        get_peft_model(tiny.llama(), reft(), adapter_name=name)


# What is printed


def test_a_summary_has_a_line_for_each_adapter():
    model = get_peft_model(tiny.llama(), reft(r=4, positions="f2+l2"))
    model.add_adapter("style", ReftConfig(intervention="red", positions="all", layers_to_transform=[0, 2]))
    lines = peft_reft.summary(model).split("\n")
    size = sum(p.numel() for name, p in model.named_parameters() if "reft_intervention.default." in name)
    beside = get_peft_model(tiny.llama(), lora(r=8, target_modules=["q_proj", "v_proj"])).get_nb_trainable_parameters()[
        0
    ]
    assert lines == [
        f"default: loreft r=4 on f2+l2, 3 of 3 layers, {size} parameters "
        f"({size / beside:.0%} of those of LoRA with r=8 on q_proj, v_proj)",
        f"style: red on all, 2 of 3 layers, 128 parameters ({128 / beside:.0%} of those of LoRA with r=8 on "
        "q_proj, v_proj), not active",
    ]
    with pytest.raises(ValueError, match="no ReFT adapter"):
        peft_reft.summary(tiny.llama())


def test_a_config_prints_what_is_not_as_by_default():
    config = ReftConfig(r=4, positions="l1", layers_to_transform=[3], task_type="CAUSAL_LM")
    assert repr(config) == (
        "ReftConfig(intervention='loreft', r=4, positions='l1', task_type='CAUSAL_LM', layers_to_transform=[3])"
    )
    assert eval(repr(config)) == config


@pytest.mark.parametrize("config", [reft, lora], ids=["reft", "lora"])
def test_an_adapter_that_is_deleted_leaves_the_scaling_that_somebody_holds(config):
    model = get_peft_model(tiny.llama(), config())
    model.add_adapter("second", config())
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    held, copied = layer.scaling, layer.scaling.copy()
    model.delete_adapter("second")
    assert list(held) == ["default"]
    assert list(copied) == ["default", "second"]

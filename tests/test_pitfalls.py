"""The traps of living inside PEFT and Transformers, one test each."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import cpu_offload
from adapters import NEEDS_ADD_ADAPTER
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle
from trl.trainer.utils import disable_dropout_in_model

import peft_reft
from peft_reft import ReftConfig, ReftLayer, ReftModel, registration

IDS = torch.arange(3, 19).reshape(2, 8)
LABELS = IDS.index_fill(1, torch.tensor([0, 1, 2, 3]), -100)


def reft(**settings) -> ReftConfig:
    return ReftConfig(**{"r": 4, "positions": "f1+l1", "init_weights": False, "task_type": "CAUSAL_LM"} | settings)


def adapted(**settings):
    return get_peft_model(tiny.llama(), reft(**settings)).eval()


@torch.no_grad()
def logits(model, **kwargs) -> torch.Tensor:
    return model(**{"input_ids": IDS} | kwargs).logits


def layers_of(model) -> list[ReftLayer]:
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


# Registration


def test_peft_type_has_a_complete_member():
    assert PeftType.REFT is PeftType("REFT") is PeftType["REFT"] is PeftType.__members__["REFT"]
    assert (PeftType.REFT.name, PeftType.REFT.value, PeftType.REFT) == ("REFT", "REFT", "REFT")
    assert list(PeftType).count(PeftType.REFT) == 1
    assert isinstance(PeftType.REFT, PeftType)
    assert PeftType.REFT in set(PeftType)
    for twin in (pickle.loads(pickle.dumps(PeftType.REFT)), copy.deepcopy(PeftType.REFT)):
        assert twin is PeftType.REFT


def test_importing_again_and_reloading_keep_one_registration():
    member = PeftType.REFT
    importlib.reload(registration)
    importlib.reload(peft_reft)
    peft_reft.register(ReftConfig, ReftModel, ReftLayer)
    assert PeftType.REFT is member
    assert list(PeftType).count(member) == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is ReftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is ReftModel


def test_a_reft_of_another_origin_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(PeftType.REFT, "origin", "somewhere else")
    with pytest.raises(ImportError, match=r"already exists and belongs to peft_reft\.model\.ReftModel"):
        registration.ensure_peft_type()


def test_the_prefix_is_the_one_that_transformers_derives_from_the_type():
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.REFT] == f"{PeftType.REFT.value.lower()}_" == ReftModel.prefix


# The layer


def test_the_base_model_keeps_its_names_and_classes():
    base = tiny.llama()
    names, classes = dict(base.named_parameters()), [type(module) for module in base.modules()]
    adapted_base = get_peft_model(base, reft()).get_base_model()
    kept = {name: p for name, p in adapted_base.named_parameters() if ".reft." not in name}
    assert kept.keys() == names.keys()
    assert all(kept[name] is names[name] for name in names)
    inside = {id(child) for layer in layers_of(base) for child in layer.modules()}
    assert [type(module) for module in base.modules() if id(module) not in inside] == classes


def test_the_child_is_found_by_code_that_skips_names_with_the_prefix():
    names = [name for name, module in adapted().named_modules() if isinstance(module, ReftLayer)]
    assert names
    assert not any(ReftModel.prefix in name for name in names)
    assert all(name.endswith(".reft") for name in names)


def test_the_adapter_name_is_second_to_last_in_every_key():
    keys = [name for name, p in adapted().named_parameters() if p.requires_grad]
    assert {tuple(key.split(".")[-4:-1]) for key in keys} == {("reft", "reft_intervention", "default")}


def test_the_block_is_not_registered_inside_its_child():
    model = adapted()
    blocks = {id(block) for block in model.get_base_model().model.layers}
    assert not blocks & {id(module) for layer in layers_of(model) for module in layer.modules()}


def test_weight_and_bias_are_missing_rather_than_searched_without_end():
    layer = layers_of(adapted())[0]
    assert isinstance(layer, BaseTunerLayer)
    for name in ("weight", "bias"):
        assert not hasattr(layer, name)
        with pytest.raises(AttributeError, match=name):
            getattr(layer, name)


def test_layers_tell_their_width():
    assert {(layer.in_features, layer.out_features) for layer in layers_of(adapted())} == {(tiny.HIDDEN, tiny.HIDDEN)}


def test_layers_share_no_state_through_their_class():
    first, second, _ = layers_of(adapted())
    first.merged_adapters.append("x")
    first.enable_adapters(False)
    first.set_adapter("other")
    assert (second.merged_adapters, second.disable_adapters, second.active_adapters) == ([], False, ["default"])
    assert "x" not in BaseTunerLayer.merged_adapters


def test_an_adapter_added_while_inactive_is_frozen():
    model = adapted(layers_to_transform=[0])
    model.add_adapter("other", reft())
    frozen = {name.split(".")[-2]: p.requires_grad for name, p in model.named_parameters() if ".reft." in name}
    assert frozen == {"default": True, "other": False}
    block = model.get_base_model().model.layers[0]
    block.reft.update_layer("third", reft())
    assert not any(p.requires_grad for p in block.reft.reft_intervention["third"].parameters())


def test_replaced_parameters_are_used():
    model = adapted()
    before = logits(model)
    for layer in layers_of(model):
        layer.reft_intervention["default"].bias = nn.Parameter(torch.full((1, 4), 3.0))
    changed = logits(model)
    assert not torch.equal(changed, before)
    for layer in layers_of(model):
        intervention = layer.reft_intervention["default"]
        intervention.projection = nn.Parameter(torch.randn_like(intervention.projection))
    assert not torch.equal(logits(model), changed)


def test_weights_changed_in_place_are_used():
    model = adapted()
    before = logits(model)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.reft_intervention["default"].projection.neg_()
    assert not torch.equal(logits(model), before)


def test_a_reference_adapter_copied_by_name_as_trl_does_it_computes_the_same():
    model = adapted()
    model.add_adapter("ref", reft())
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(parameter.data)
    expected = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


def test_adapters_cast_to_bfloat16_as_trl_does_it_train_with_orthonormal_rows():
    model = adapted().train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.any() for p in model.parameters() if p.requires_grad)
    for layer in layers_of(model):
        rows = layer.reft_intervention["default"].subspace()
        torch.testing.assert_close(rows @ rows.mT, torch.eye(4).expand(1, 4, 4), atol=1e-6, rtol=0)


def test_interventions_are_created_where_the_block_is():
    base = tiny.llama()
    base.model.layers[1].to("meta")
    model = get_peft_model(base, reft())
    devices = [{p.device.type for p in layer.parameters()} for layer in layers_of(model)]
    assert devices == [{"cpu"}, {"meta"}, {"cpu"}]


@pytest.mark.parametrize("on", ["model.layers.1", "model.layers.1.self_attn.q_proj"])
def test_interventions_are_created_where_accelerate_runs_an_offloaded_block(on):
    base = tiny.llama()
    base.get_submodule(on)._hf_hook = SimpleNamespace(execution_device="meta")
    devices = [{p.device.type for p in layer.parameters()} for layer in layers_of(get_peft_model(base, reft()))]
    assert devices == [{"cpu"}, {"meta"}, {"cpu"}]


# The hooks


def test_hooks_are_bound_methods_of_the_layer_of_their_own_block():
    model = adapted()
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for block in twin.get_base_model().model.layers:
            hook = next(iter(block._forward_hooks.values()))
            assert hook.__self__ is block.reft
            assert hook.__func__ is ReftLayer.edit_output


def test_hooks_that_were_there_before_see_the_edited_output():
    base = tiny.llama()
    seen = []
    base.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    base.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(get_peft_model(base, reft(positions="all")).eval())
    assert torch.equal(*seen)


def test_no_later_hook_takes_the_place_of_those_of_an_unpickled_model(monkeypatch):
    model = adapted()
    expected, stored = logits(model), pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
    twin = pickle.loads(stored)
    latest = max(max(m._forward_hooks, default=0) for m in twin.modules())
    assert RemovableHandle.next_id > latest
    for module in twin.modules():
        module.register_forward_hook(lambda *_: None)
    assert torch.equal(logits(twin), expected)


def test_a_copied_model_is_unloaded_without_the_original():
    model = adapted()
    expected = logits(model)
    base = copy.deepcopy(model).unload()
    assert torch.equal(logits(base), logits(tiny.llama()))
    assert not any(block._forward_hooks for block in base.model.layers)
    assert torch.equal(logits(model), expected)


# The tuner


def test_layers_to_transform_matches_the_blocks_themselves():
    model = adapted(layers_to_transform=[0, 2])
    assert model.targeted_module_names == ["model.layers.0", "model.layers.2"]


def test_the_config_suits_the_matching_code_of_peft():
    config = ReftConfig(peft_type="LORA")
    assert config.peft_type is PeftType.REFT
    assert (config.target_modules, config.target_parameters) == (None, None)
    assert all(field.init for field in fields(ReftConfig))


def test_a_module_that_has_a_child_named_reft_is_refused_before_anything_is_touched():
    base = tiny.llama()
    base.model.layers[2].reft = nn.Identity()
    with pytest.raises(ValueError, match="already has an attribute 'reft'"):
        get_peft_model(base, reft())
    assert not layers_of(base)
    assert "generate" not in base.__dict__
    assert not base._forward_pre_hooks


@NEEDS_ADD_ADAPTER
def test_everything_works_after_the_tuner_object_is_gone():
    base = tiny.llama()
    base.add_adapter(reft())
    base.eval()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is ReftModel and thing.model is base]
    wrapped = adapted()
    wrapped.load_state_dict({f"base_model.model.{name}": tensor for name, tensor in base.state_dict().items()})
    assert torch.equal(logits(base), logits(wrapped))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(base.generate(input_ids=IDS, **options), wrapped.generate(input_ids=IDS, **options))
    assert torch.equal(logits(base, labels=LABELS), logits(wrapped, labels=LABELS))


@pytest.mark.parametrize("positions", ["l1", "prompt", "completion"])
def test_every_door_to_the_model_finds_the_same_prompt(positions):
    model = adapted(positions=positions)
    expected = logits(model, labels=LABELS)
    doors = {"the tuner": model.base_model, "the base model": model.get_base_model()}
    for name, door in doors.items():
        assert torch.equal(logits(door, labels=LABELS), expected), name
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(logits(model, input_ids=None, inputs_embeds=embeds, labels=LABELS), expected)


def test_the_part_that_owns_the_blocks_can_be_called_alone():
    model = adapted(positions="l1")
    base = model.get_base_model()
    with torch.no_grad():
        assert torch.equal(base.lm_head(base.model(input_ids=IDS).last_hidden_state), logits(model))


def test_an_adapter_of_the_first_model_does_not_know_the_prompts_of_the_second():
    model = adapted(positions="l1")
    twin = copy.deepcopy(model)
    expected = logits(model, labels=LABELS)
    logits(twin)
    assert torch.equal(logits(model, labels=LABELS), expected)
    assert not torch.equal(logits(model), expected)


def test_an_error_inside_the_model_leaves_no_prompt_behind():
    model = adapted(positions="l1")
    inner = model.get_base_model().model
    expected = logits(model)
    with pytest.raises(IndexError):
        logits(model, input_ids=IDS + 1000, labels=LABELS)
    with torch.no_grad():
        # Not through the door that the failed pass took.
        hidden = inner(input_ids=IDS).last_hidden_state
    assert torch.equal(model.get_base_model().lm_head(hidden), expected)
    assert torch.equal(logits(model), expected)


@torch.no_grad()
def test_offloading_a_model_takes_its_adapters_along():
    model = adapted(positions="all")
    expected = logits(model)
    assert torch.equal(logits(cpu_offload(model, torch.device("cpu"))), expected)


@pytest.mark.parametrize("make", [ReftConfig, LoraConfig])
def test_trained_tokens_of_a_half_precision_model_are_float32(make):
    model = get_peft_model(tiny.llama().bfloat16(), make(r=2, trainable_token_indices=[5, 7]))
    (delta,) = [parameter for name, parameter in model.named_parameters() if "trainable_tokens_delta" in name]
    assert delta.dtype == torch.float32


def test_trainers_that_switch_dropout_off_reach_ours():
    model = adapted(positions="all", dropout=0.5)
    expected = logits(model)
    assert not torch.equal(logits(model.train()), expected)
    disable_dropout_in_model(model)
    assert torch.equal(logits(model), expected)


@torch.no_grad()
def test_a_trace_edits_the_same_tokens():
    model = adapted(positions="f2+l2").requires_grad_(False)
    # A tuple in place of a dictionary, which a trace cannot return.
    call = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False, "return_dict": False}

    def trace(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return torch.jit.trace(lambda ids: module(**call | {"input_ids": ids})[0], IDS, check_trace=False)

    try:
        trace(tiny.llama().requires_grad_(False))
    except IndexError:
        pytest.skip("this version of Transformers cannot trace the base model: its masks take sizes for tensors")
    torch.testing.assert_close(trace(model)(IDS.flip(0)), model(**call | {"input_ids": IDS.flip(0)})[0])

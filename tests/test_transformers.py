"""Transformers' own adapter methods, without a PeftModel around the model."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from adapters import BOTH, IDS, NEEDS_ADD_ADAPTER, generated, layers_of, logits, lora, reft, trainable
from peft import get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaForCausalLM


def adapted(config=reft, **settings) -> LlamaForCausalLM:
    model = tiny.llama()
    model.add_adapter(config(**settings))
    return model.eval()


def saved(folder, config=reft, **settings):
    """A PeftModel, saved into `folder`."""
    model = get_peft_model(tiny.llama(), config(**settings)).eval()
    model.save_pretrained(folder)
    return model


@NEEDS_ADD_ADAPTER
@BOTH
def test_add_adapter_trains_the_adapter_alone(config):
    model = adapted(config)
    assert model.active_adapters() == ["default"]
    assert trainable(model)
    assert all(".default." in name for name in trainable(model))
    assert not torch.equal(logits(model), logits(tiny.llama()))
    model(input_ids=IDS, labels=IDS.index_fill(1, torch.tensor([0, 1]), -100)).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@NEEDS_ADD_ADAPTER
def test_an_added_adapter_computes_what_get_peft_model_does():
    model = adapted()
    wrapped = get_peft_model(tiny.llama(), reft()).eval()
    state = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(wrapped).items()}
    model.load_state_dict(
        {key.replace("reft_intervention.", "reft_intervention.default."): v for key, v in state.items()}, strict=False
    )
    assert torch.equal(logits(model), logits(wrapped))
    assert torch.equal(generated(model), generated(wrapped))


@NEEDS_ADD_ADAPTER
@BOTH
def test_a_second_adapter_is_switched_to_and_back(config):
    model = adapted(config)
    first = logits(model)
    model.add_adapter(config(r=2), "other")
    assert model.active_adapters() == ["other"]
    assert all(".other." in name for name in trainable(model))
    second = logits(model)
    model.set_adapter("default")
    assert all(".default." in name for name in trainable(model))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.equal(logits(model), second)
    model.set_adapter(["default", "other"])
    assert model.active_adapters() == ["default", "other"]
    assert not torch.equal(logits(model), first)
    assert not torch.equal(logits(model), second)


@NEEDS_ADD_ADAPTER
@BOTH
def test_disabled_adapters_give_the_base_model_bit_for_bit(config):
    base = tiny.llama()
    expected, tokens = logits(base), generated(base)
    model = adapted(config)
    changed = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), expected)
    assert torch.equal(generated(model), tokens)
    model.enable_adapters()
    assert torch.equal(logits(model), changed)
    assert trainable(model)


@BOTH
def test_an_adapter_saved_by_peft_is_loaded(config, tmp_path):
    wrapped = saved(tmp_path, config)
    model = tiny.llama()
    info = model.load_adapter(str(tmp_path))
    assert not getattr(info, "missing_keys", None)
    assert not getattr(info, "unexpected_keys", None)
    assert torch.equal(logits(model), logits(wrapped))
    assert torch.equal(generated(model), generated(wrapped))


def test_a_loaded_adapter_is_frozen_where_that_of_lora_is(tmp_path):
    frozen = []
    for config in (reft, lora):
        saved(tmp_path / config.__name__, config)
        model = tiny.llama()
        model.load_adapter(str(tmp_path / config.__name__))
        frozen.append(not trainable(model))
    assert frozen[0] == frozen[1]


def test_a_loaded_adapter_can_be_trained_further(tmp_path):
    wrapped = saved(tmp_path)
    model = tiny.llama()
    model.load_adapter(str(tmp_path), is_trainable=True)
    assert trainable(model) == {name.removeprefix("base_model.model.") for name in trainable(wrapped)}


@NEEDS_ADD_ADAPTER
@BOTH
def test_two_adapters_are_loaded_under_their_own_names(config, tmp_path):
    one, two = saved(tmp_path / "one", config), saved(tmp_path / "two", config, r=2)
    model = tiny.llama()
    model.load_adapter(str(tmp_path / "one"), adapter_name="one")
    model.load_adapter(str(tmp_path / "two"), adapter_name="two")
    for name, expected in (("one", one), ("two", two)):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert torch.equal(logits(model), logits(expected))


@BOTH
def test_an_adapter_is_loaded_from_tensors(config):
    wrapped = get_peft_model(tiny.llama(), config()).eval()
    model = tiny.llama()
    state = get_peft_model_state_dict(wrapped)
    model.load_adapter(peft_config=config(), adapter_state_dict=state)
    assert torch.equal(logits(model.eval()), logits(wrapped))


@NEEDS_ADD_ADAPTER
@BOTH
def test_the_state_dict_of_an_adapter_has_its_weights_alone(config):
    model = adapted(config)
    model.add_adapter(config(r=2), "other")
    state = model.get_adapter_state_dict("default")
    expected = {name.replace(".default", "") for name, _ in model.named_parameters() if ".default." in name}
    assert set(state) == expected
    assert all("default" not in name and "other" not in name for name in model.get_adapter_state_dict())


@NEEDS_ADD_ADAPTER
@BOTH
def test_save_pretrained_saves_the_adapter_and_from_pretrained_puts_it_on_its_base(config, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    model.add_adapter(config())
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(generated(loaded), generated(model))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))


@NEEDS_ADD_ADAPTER
def test_a_model_card_is_saved_with_the_adapter(tmp_path):
    adapted().save_pretrained(tmp_path)
    assert "import peft_reft" in (tmp_path / "README.md").read_text()


@NEEDS_ADD_ADAPTER
@pytest.mark.filterwarnings("ignore:Adapter .* was active")
@BOTH
def test_deleted_adapters_leave_the_base_model(config):
    model = adapted(config)
    model.add_adapter(config(), "other")
    expected = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("other")
    assert torch.equal(logits(model), logits(tiny.llama()))
    model.add_adapter(config(), "third")
    assert model.active_adapters() == ["third"]
    assert not torch.equal(logits(model), logits(tiny.llama()))


@NEEDS_ADD_ADAPTER
@pytest.mark.filterwarnings("ignore:Adapter .* was active")
def test_after_deletions_all_layers_agree_on_an_adapter_that_exists():
    model = tiny.llama()
    for layer, name in enumerate(("alpha", "beta", "gamma")):
        model.add_adapter(reft(layers_to_transform=layer), name)
    model.set_adapter("alpha")
    model.delete_adapter("alpha")
    assert [layer.active_adapters for layer in layers_of(model)] == [["beta"]] * 3
    model.delete_adapter("beta")
    assert [layer.active_adapters for layer in layers_of(model)] == [["gamma"]] * 3
    assert model.active_adapters() == ["gamma"]


@NEEDS_ADD_ADAPTER
def test_reft_and_lora_live_on_one_model():
    model = adapted()
    alone = logits(model)
    model.add_adapter(lora(), "low_rank")
    both_state = copy.deepcopy(model.state_dict())
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    model.set_adapter(["default", "low_rank"])
    both = logits(model)
    assert not torch.equal(both, alone)
    other = tiny.llama()
    other.add_adapter(lora(), "low_rank")
    other.add_adapter(reft(), "default")
    other.load_state_dict(both_state)
    other.set_adapter(["low_rank", "default"])
    torch.testing.assert_close(logits(other.eval()), both)


@NEEDS_ADD_ADAPTER
def test_hidden_states_show_the_edits():
    model = adapted(positions="all", layers_to_transform=[0])
    edited = model(input_ids=IDS, output_hidden_states=True)
    plain = tiny.llama()(input_ids=IDS, output_hidden_states=True)
    assert torch.equal(edited.hidden_states[0], plain.hidden_states[0])
    assert (edited.hidden_states[1] != plain.hidden_states[1]).any(-1).all()
    block = tiny.llama().model.layers[1]
    positions = torch.arange(8)[None]
    rotary = tiny.llama().model.rotary_emb(edited.hidden_states[1], positions)
    mask = torch.full((8, 8), float("-inf")).triu(1)[None, None]
    following = block(edited.hidden_states[1], position_embeddings=rotary, attention_mask=mask)
    torch.testing.assert_close(following, edited.hidden_states[2], atol=1e-5, rtol=1e-5)


@NEEDS_ADD_ADAPTER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_models_take_an_adapter(dtype, tmp_path):
    model = tiny.llama().to(dtype)
    model.add_adapter(reft())
    model.eval().save_pretrained(tmp_path)
    assert logits(model).dtype == dtype
    loaded = tiny.llama().to(dtype)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))

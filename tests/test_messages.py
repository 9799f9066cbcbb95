"""Messages name a cause and a remedy: in loading, in steering, and for what a model cannot do."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from adapters import IDS, logits, lora, reft
from peft import PeftModel, get_peft_model
from tiny import ZOO

from peft_reft import ReftConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    get_peft_model(tiny.llama(), reft()).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# Loading


def test_missing_weights_are_named(copy):
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{copy} holds no weights.*adapter_model.safetensors.*README.md"):
        PeftModel.from_pretrained(tiny.llama(), copy)
    model = get_peft_model(tiny.llama(), reft())
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        model.load_adapter(str(copy.parent), "other", subfolder="copy")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", None])
def test_a_broken_file_is_named(copy, content):
    file = copy / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=rf"{file} \({file.stat().st_size} bytes\) is broken: .*git-lfs"):
        PeftModel.from_pretrained(tiny.llama(), copy)


def test_a_broken_configuration_is_named(copy):
    model = get_peft_model(tiny.llama(), reft())
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is no JSON file that can be read: Expecting"):
        model.load_adapter(copy, "other")


def test_weights_in_the_older_format_are_loaded(copy):
    from safetensors.torch import load_file

    torch.save(load_file(copy / "adapter_model.safetensors"), copy / "adapter_model.bin")
    expected = logits(PeftModel.from_pretrained(tiny.llama(), copy).eval())
    (copy / "adapter_model.safetensors").unlink()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), copy).eval()), expected)


@pytest.mark.parametrize("method", ["loreft", "red"])
def test_another_hidden_size_is_one_sentence(method, tmp_path):
    get_peft_model(tiny.llama(), reft(intervention=method)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter 'default' do not fit.*model\.layers\.0.*32\).*64\)") as error:
        PeftModel.from_pretrained(tiny.llama(hidden_size=64), tmp_path)
    assert "\n" not in str(error.value)
    assert "size mismatch" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"positions": "all"}, "positions"),
        ({"share_weights": False}, "share_weights"),
        ({"intervention": "noreft"}, "intervention"),
        ({"r": 3}, "r"),
        ({"act_fn": "relu"}, "act_fn"),
        ({"use_bias": False}, "use_bias"),
        ({"subspaces": {"a": 1, "b": 3}}, "subspaces"),
    ],
)
def test_loading_onto_a_name_with_other_options_is_refused(settings, name, saved):
    model = get_peft_model(tiny.llama(), reft(**settings)).eval()
    before = logits(model)
    with pytest.raises(ValueError, match=rf"'default' exists with {name}=.*but .* has {name}=.*delete_adapter\('def"):
        model.load_adapter(saved, "default")
    assert torch.equal(logits(model), before)
    model.load_adapter(saved, "other")


def test_loading_onto_a_name_with_the_same_options_replaces_the_weights(saved):
    model = get_peft_model(tiny.llama(), reft(positions="f2 + l2", dropout=0.5)).eval()
    model.load_adapter(saved, "default")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny.llama(), saved).eval()))


def test_adapters_of_other_methods_are_left_to_peft(tmp_path):
    get_peft_model(tiny.llama(), lora()).save_pretrained(tmp_path)
    model = get_peft_model(tiny.llama(), lora(r=2))
    model.load_adapter(tmp_path, "other")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(Exception, match="header"):
        model.load_adapter(tmp_path, "third")
    assert not hasattr(json.loads, "_checks_reft_adapters")


# Steering


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.zeros(4, tiny.HIDDEN), r"must map layers to tensors, such as \{10: direction\}, got a tensor \(4, 32\)"),
        ({torch.tensor(0): torch.zeros(4, tiny.HIDDEN)}, "a Tensor is no layer"),
        ({0: [0.0] * tiny.HIDDEN}, "directions of layer 0 must be a tensor, got list"),
        ([torch.zeros(4, tiny.HIDDEN)], "must map layers to tensors"),
    ],
)
def test_no_message_about_directions_prints_them(directions, message):
    with pytest.raises(TypeError, match=message) as error:
        get_peft_model(tiny.llama(), reft()).set_directions("default", directions)
    assert len(str(error.value)) < 200


# What a model cannot do


@pytest.mark.parametrize("positions", ["c2", "completion"])
@pytest.mark.parametrize("family", ["bert", "bert_classifier", "llama_classifier", "t5_encoder"])
def test_positions_behind_the_prompt_are_warned_of_where_all_is_prompt(family, positions):
    task_type = ZOO[family].task_type
    with pytest.warns(UserWarning, match=rf"positions='{positions}' .* does not generate: .* prompt or all"):
        get_peft_model(ZOO[family].build(), reft(positions=positions, task_type=task_type))


@pytest.mark.parametrize(
    ("family", "positions"),
    [("bert", "f2+c2"), ("bert", "all"), ("llama", "c2"), ("t5", "c2"), ("bart_classifier", "c2")],
)
def test_other_positions_are_not_warned_of(family, positions):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="positions=")
        get_peft_model(ZOO[family].build(), reft(positions=positions, task_type=ZOO[family].task_type))


def test_adapters_by_row_in_training_mode_name_the_way_out():
    model = get_peft_model(tiny.llama(), reft()).train()
    with pytest.raises(ValueError, match=r"in training mode\. Call model\.eval\(\) first"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("spec", ["f99999999999", "l2000000000", "c" + "9" * 5000])
def test_an_absurd_number_of_positions_is_refused_in_a_sentence(spec):
    with pytest.raises(ValueError, match=r"counts further than 1,000,000,000.*'prompt' and 'completion'") as error:
        ReftConfig(positions=spec)
    assert len(str(error.value)) < 250


# The card


def test_the_card_says_how_to_load_the_adapter_before_anything_that_is_to_be_filled_in(saved):
    text = (saved / "README.md").read_text()
    assert text.index("## How to load this ReFT adapter") < text.index("## Model Details")
    assert text.index("import peft_reft") < text.index("[More Information Needed]")
    assert "python -m peft_reft.run PROGRAM" in text
    assert text.count("## How to load this ReFT adapter") == 1

"""Adapters of AdapterHub's `adapters`: converted ones reproduce its outputs (see fixtures/adapterhub/make.py)."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, LlamaForCausalLM

from peft_reft import ReftConfig
from peft_reft.convert import convert
from peft_reft.convert.__main__ import main

FIXTURES = Path(__file__).parent / "fixtures"
HUB = FIXTURES / "adapterhub"
LLAMA, BERT = FIXTURES / "tiny-llama", HUB / "tiny-bert"

KINDS = {
    "loreft": (LLAMA, {}),
    "noreft_tied": (LLAMA, {"intervention": "noreft"}),
    "direft_prefix": (LLAMA, {"intervention": "nodireft"}),
    "loreft_suffix_bert": (BERT, {"task_type": "SEQ_CLS"}),
}


def base_of(kind: str):
    return (BertForSequenceClassification if "bert" in kind else LlamaForCausalLM).from_pretrained(KINDS[kind][0])


def converted(kind: str, tmp: Path, source: Path | None = None, **options) -> Path:
    base, told = KINDS[kind]
    return convert(source or HUB / kind / "adapter", tmp / "out", base_model=base, **told | options)


def error(model, kind: str, case: str) -> float:
    expected = load_file(HUB / kind / "outputs.safetensors")
    mask = expected[f"{case}.attention_mask"]
    with torch.no_grad():
        got = model(input_ids=expected[f"{case}.input_ids"], attention_mask=mask).logits
    difference = (got - expected[f"{case}.logits"]).abs()
    return (difference if "bert" in kind else difference[mask.bool()]).max().item()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_library(tmp_path, kind):
    base = base_of(kind)
    plain = error(base, kind, "right_padded")
    model = PeftModel.from_pretrained(base, converted(kind, tmp_path))
    for case in ("plain", "right_padded", "left_padded"):
        assert error(model, kind, case) < 1e-5
    assert plain > 0.1


def test_a_prompt_mask_of_all_tokens_gives_the_edits_of_training_there(tmp_path):
    # The library does not look at labels: its last words are at the end of the completion.
    expected = load_file(HUB / "loreft" / "outputs.safetensors")
    ids, mask = expected["right_padded.input_ids"], expected["right_padded.attention_mask"]
    labels = ids.masked_fill((mask == 0) | (torch.arange(ids.shape[1]) < 3), -100)
    model = PeftModel.from_pretrained(base_of("loreft"), converted("loreft", tmp_path))
    with torch.no_grad():
        as_there = model(input_ids=ids, attention_mask=mask, labels=labels, prompt_mask=mask.bool()).logits
        as_here = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    real = mask.bool()
    assert (as_there - expected["right_padded.logits"])[real].abs().max() < 1e-5
    assert (as_here - expected["right_padded.logits"])[real].abs().max() > 0.1


def test_number_of_labels_comes_from_the_head(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BERT, base)
    config = json.loads((base / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (base / "config.json").write_text(json.dumps(config))
    folder = convert(HUB / "loreft_suffix_bert" / "adapter", tmp_path / "out", base_model=base, task_type="SEQ_CLS")
    model = PeftModel.from_pretrained(base_of("loreft_suffix_bert"), folder)
    assert error(model, "loreft_suffix_bert", "plain") < 1e-5


def test_options_are_taken_over(tmp_path):
    config = ReftConfig.from_pretrained(converted("noreft_tied", tmp_path))
    found = (config.intervention, config.positions, config.share_weights, config.act_fn, config.dropout, config.r)
    assert found == ("noreft", "f3+l2", True, "leaky_relu", 0.05, 3)
    assert (config.layers_to_transform, config.modules_to_save) == ([0, 1, 2, 3], ["lm_head"])


def test_without_its_head_the_edits_alone_are_converted(tmp_path):
    shutil.copytree(HUB / "noreft_tied" / "adapter", tmp_path / "source")
    os.remove(tmp_path / "source" / "pytorch_model_head.bin")
    folder = converted("noreft_tied", tmp_path, tmp_path / "source")
    assert all(".reft." in name for name in load_file(folder / "adapter_model.safetensors"))


def test_generations_from_an_edited_prefix_are_those_of_the_library(tmp_path):
    kind, expected = "direft_prefix", load_file(HUB / "direft_prefix" / "outputs.safetensors")
    model = PeftModel.from_pretrained(base_of(kind), converted(kind, tmp_path))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = expected["plain.input_ids"]
    assert torch.equal(model.generate(input_ids=prompt, **options), expected["generated"])
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=prompt, **options), expected["generated"])


def test_command_line_takes_the_base_model_from_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(FIXTURES)  # the folder names "tiny-llama"
    main([str(HUB / "loreft" / "adapter"), str(tmp_path / "out")])
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert error(model, "loreft", "plain") < 1e-5
    assert model.peft_config["default"].base_model_name_or_path == "tiny-llama"


def changed(tmp: Path, kind: str, weights: dict[str, torch.Tensor | None] | None = None, **config: object) -> Path:
    """A copy of a folder with other entries of its configuration, and other weights (None takes them out)."""
    source = shutil.copytree(HUB / kind / "adapter", tmp / "source")
    path = source / "adapter_config.json"
    full = json.loads(path.read_text())
    top = {key: config.pop(key) for key in list(config) if key in full}
    full["config"] |= config
    path.write_text(json.dumps(full | top))
    if weights is not None:
        state = torch.load(source / "pytorch_adapter.bin")
        state = {key: tensor for key, tensor in {**state, **weights}.items() if tensor is not None}
        torch.save(state, source / "pytorch_adapter.bin")
    return source


UNIT = "model.layers.2.reft_layer.refts.task.units.0."


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"intervention": None}, "adapter_config.json fits NoReFT and DiReFT alike.*--intervention"),
        ({}, {"intervention": "loreft"}, r"intervention='loreft', but .* fits noreft or nodireft"),
        ({"subtract_projection": True}, {}, "intervention='nodireft', but .* fits noreft"),
        ({}, {"positions": "f2"}, "positions='f2' is not needed: .*adapter_config.json stores it"),
        ({}, {"share_weights": True}, "share_weights=True is not needed"),
        ({}, {"act_fn": "relu"}, "act_fn='relu' is not needed"),
        ({}, {"dropout": 0.0}, "dropout=0.0 is not needed"),
        ({"architecture": "lora"}, {}, "'architecture' is 'lora'"),
        ({"config": None}, {}, "'architecture' is None"),
        ({"orthogonality": None}, {}, "adapter_config.json: 'orthogonality' is None"),
        ({"prefix_positions": 0}, {}, "both 0"),
        ({"suffix_positions": "2"}, {}, "'suffix_positions' is '2'"),
        ({"non_linearity": "nonsense"}, {}, "Unknown act_fn 'nonsense'"),
        ({"layers": [0, 1]}, {}, r"weights for the layers \[0, 1, 2, 3\], but adapter_config.json names \[0, 1\]"),
        ({"model_class": "OPTForCausalLM"}, {}, "made for OPTForCausalLM, but the base model is LlamaForCausalLM"),
        (
            {"weights": {f"{UNIT}learned_source.bias": None}},
            {},
            f"bin: '{re.escape(UNIT)}learned_source.bias' is missing",
        ),
        ({"weights": {f"{UNIT}learned_source.bias": torch.ones(2)}}, {}, r"learned_source.bias' is .* \[2\].*\[3\]"),
        ({"weights": {f"{UNIT}extra": torch.ones(2)}}, {}, f"nothing is known of '{re.escape(UNIT)}extra'"),
        ({"weights": {"model.layers.2.loras.task.lora_A": torch.ones(2)}}, {}, "nothing is known of .*another method"),
        ({"weights": {UNIT.replace("model", "vision") + "x": torch.ones(2)}}, {}, "'vision.layers', but the blocks of"),
    ],
)
def test_broken_and_contradicting_folders(tmp_path, changes, options, message):
    source = changed(tmp_path, "direft_prefix", **changes)
    with pytest.raises(ValueError, match=message):
        converted("direft_prefix", tmp_path, source, **options)
    assert not (tmp_path / "out").exists()


def test_a_stored_subtract_projection_tells_the_method(tmp_path):
    source = changed(tmp_path, "direft_prefix", subtract_projection=False)
    assert ReftConfig.from_pretrained(converted("direft_prefix", tmp_path, source, intervention=None)).intervention == (
        "nodireft"
    )


def test_missing_weights(tmp_path):
    source = changed(tmp_path, "direft_prefix")
    os.remove(source / "pytorch_adapter.bin")
    with pytest.raises(FileNotFoundError, match=r"neither adapter.safetensors nor pytorch_adapter.bin"):
        converted("direft_prefix", tmp_path, source)
    (source / "adapter.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"adapter.safetensors cannot be read"):
        converted("direft_prefix", tmp_path, source)


def test_heads_of_the_library_itself_are_refused(tmp_path):
    source = changed(tmp_path, "loreft", model_class="LlamaAdapterModel")
    save_file({"heads.task.1.weight": torch.ones(2, 64)}, source / "model_head.safetensors")
    with pytest.raises(ValueError, match=r"model_head.safetensors: the prediction head 'heads.task.1.weight'"):
        converted("loreft", tmp_path, source)
    os.remove(source / "model_head.safetensors")
    model = PeftModel.from_pretrained(base_of("loreft"), converted("loreft", tmp_path, source))
    assert error(model, "loreft", "plain") < 1e-5

"""The usual operations on an adapter in PEFT, compared with LoRA where both should behave alike."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import peft
import pytest
import tiny
import torch
from adapters import BOTH, IDS, generated, layers_of, logits, lora, reft, trainable
from huggingface_hub import ModelCard
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_reft import ReftConfig


def shift(model, by: float = 0.3) -> None:
    """Give every adapter parameter another value."""
    with torch.no_grad():
        for layer in layers_of(model):
            for parameter in layer.parameters():
                parameter.add_(by * torch.randn_like(parameter))


def two_adapters(first: dict | None = None, second: dict | None = None) -> PeftModel:
    """Adapters `default` and `other`, on different layers with different ranks and positions."""
    model = get_peft_model(tiny.llama(), reft(**{"layers_to_transform": [0, 1]} | (first or {})))
    model.add_adapter("other", reft(**{"r": 2, "positions": "all", "layers_to_transform": [1, 2]} | (second or {})))
    return model.eval()


# Wrapping a model


def bert(model_class, **overrides):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny.build(model_class, BertConfig(vocab_size=tiny.VOCAB, **sizes | overrides))


def llama_classifier():
    config = copy.deepcopy(tiny.llama().config)
    config.num_labels = 3
    return tiny.build(LlamaForSequenceClassification, config)


def t5():
    config = T5Config(
        vocab_size=tiny.VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tiny.build(T5ForConditionalGeneration, config)


TASKS = [
    ("CAUSAL_LM", tiny.llama, {"labels": IDS.clone().index_fill(1, torch.tensor([0, 1, 2]), -100)}, None),
    ("SEQ_CLS", llama_classifier, {"labels": torch.tensor([0, 2])}, "score"),
    (
        "SEQ_CLS",
        lambda: bert(BertForSequenceClassification, num_labels=3),
        {"labels": torch.tensor([0, 2])},
        "classifier",
    ),
    ("TOKEN_CLS", lambda: bert(BertForTokenClassification, num_labels=3), {"labels": IDS % 3}, "classifier"),
    (
        "QUESTION_ANS",
        lambda: bert(BertForQuestionAnswering),
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        "qa_outputs",
    ),
    ("FEATURE_EXTRACTION", lambda: bert(BertModel), {}, None),
    ("SEQ_2_SEQ_LM", t5, {"labels": IDS}, None),
    (None, tiny.llama, {}, None),
]
TASK_NAMES = ["causal", "llama-sequence", "sequence", "token", "question", "features", "seq2seq", "none"]


@pytest.mark.parametrize(("task", "build", "targets", "head"), TASKS, ids=TASK_NAMES)
def test_every_task_type_runs_trains_and_treats_its_head_as_lora_does(task, build, targets, head):
    base = build()
    mask = torch.ones_like(IDS)
    before = base(input_ids=IDS, attention_mask=mask, **targets)
    model = get_peft_model(base, reft(task_type=task)).eval()
    query = "q" if task == "SEQ_2_SEQ_LM" else "query" if "Bert" in type(base).__name__ else "q_proj"
    with_lora = get_peft_model(build(), lora(task_type=task, target_modules=[query]))
    assert type(model) is type(with_lora)

    after = model(input_ids=IDS, attention_mask=mask, **targets)
    assert not torch.equal(after[0], before[0])
    after[1 if task == "FEATURE_EXTRACTION" else 0].sum().backward()
    heads = {name for name in trainable(model) if "reft_" not in name}
    assert heads == {name for name in trainable(with_lora) if "lora_" not in name}
    assert bool(heads) == (head is not None)
    assert all(head in name for name in heads)
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached <= trainable(model)
    assert any("reft_" in name for name in reached)
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        assert generated(model).shape[0] == 2


@pytest.mark.parametrize(
    ("settings", "units", "layers"),
    [({}, 1, 3), ({"share_weights": False}, 2, 3), ({"layers_to_transform": [0, -1]}, 1, 2), ({"r": 1}, 1, 3)],
)
def test_the_trainable_parameters_are_counted_exactly(settings, units, layers, capsys):
    model = get_peft_model(tiny.llama(), reft(**settings))
    base = sum(parameter.numel() for parameter in tiny.llama().parameters())
    rank = settings.get("r", 4)
    expected = layers * units * (2 * rank * tiny.HIDDEN + rank)
    assert model.get_nb_trainable_parameters() == (expected, base + expected)
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,} || all params: {base + expected:,}" in capsys.readouterr().out
    vector = nn.utils.parameters_to_vector(p for p in model.parameters() if p.requires_grad)
    assert vector.numel() == expected


def test_only_the_adapter_is_trainable():
    model = get_peft_model(tiny.llama(), reft())
    assert trainable(model) == {
        name for name, _ in model.named_parameters() if ".reft.reft_intervention.default." in name
    }


def test_a_fresh_adapter_does_not_change_the_model():
    base = tiny.llama()
    before = logits(base)
    torch.testing.assert_close(logits(get_peft_model(base, reft(init_weights=True)).eval()), before, atol=1e-6, rtol=0)


@BOTH
def test_the_statuses_of_layers_and_model_are_told(config):
    model = get_peft_model(tiny.llama(), config())
    model.add_adapter("other", config(r=2))
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.available_adapters == ["default", "other"]
    assert status.num_adapter_layers == tiny.LAYERS
    assert status.requires_grad == {"default": True, "other": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    layers = model.get_layer_status()
    assert len(layers) == tiny.LAYERS
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_layer_statuses_name_the_edited_block():
    layers = get_peft_model(tiny.llama(), reft()).get_layer_status()
    assert [layer.name for layer in layers] == [f"model.model.layers.{i}.reft" for i in range(tiny.LAYERS)]
    assert {layer.module_type for layer in layers} == {"ReftLayer"}


@BOTH
def test_train_and_eval_reach_the_adapter(config):
    model = get_peft_model(tiny.llama(), config())
    for mode in (True, False):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}


def test_a_model_with_an_adapter_can_be_moved_to_another_dtype():
    model = get_peft_model(tiny.llama(), reft()).eval()
    expected = logits(model)
    actual = logits(model.to(torch.float64))
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.float(), expected, rtol=1e-4, atol=1e-4)
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}


def test_a_config_that_fits_no_layer_leaves_the_model_untouched():
    base = tiny.llama()
    before = traces(base)
    with pytest.raises(ValueError, match="there is no layer 7"):
        get_peft_model(base, reft(layers_to_transform=[0, 7]))
    assert traces(base) == before


# Saving and loading


def test_the_files_of_several_adapters_hold_the_parameters_of_one_each(tmp_path):
    check_files(tmp_path, ("default", "other"))


def test_the_file_is_safetensors_and_holds_the_parameters_and_nothing_else(tmp_path):
    check_files(tmp_path, ("default",))


def check_files(tmp_path: Path, names: tuple[str, ...]) -> None:
    model = get_peft_model(tiny.llama(), reft())
    for name in names[1:]:
        model.add_adapter(name, reft(layers_to_transform=[1]))
    model.save_pretrained(tmp_path)
    for name in names:
        file = (tmp_path if name == "default" else tmp_path / name) / "adapter_model.safetensors"
        stored = load_file(file)
        parameters = {key: p for key, p in model.named_parameters() if f".{name}." in key}
        assert {key.replace(f".{name}.", ".") for key in parameters} == set(stored)
        assert not any(name in key.split(".") for key in stored)
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert file.stat().st_size == header + sum(4 * p.numel() for p in parameters.values())


@BOTH
def test_an_adapter_comes_back_the_same(config, tmp_path):
    model = get_peft_model(tiny.llama(), config()).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not trainable(loaded)
    assert type(loaded) is type(model)


@BOTH
def test_a_loaded_adapter_can_be_trained_further(config, tmp_path):
    model = get_peft_model(tiny.llama(), config())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert trainable(loaded) == trainable(model)
    assert loaded.peft_config["default"].inference_mode is False


def test_the_config_survives_json(tmp_path):
    config = reft(layers_to_transform=[0, -1], share_weights=False, dropout=0.1, act_fn="gelu", init_weights="pyreft")
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "REFT"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ReftConfig)
    assert loaded.to_dict() == config.to_dict() | {"inference_mode": loaded.inference_mode}


def test_auto_classes_find_the_base_model(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    base = type(tiny.llama()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, reft()).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    without_task = get_peft_model(type(base).from_pretrained(tmp_path / "base"), reft(task_type=None)).eval()
    without_task.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(peft.AutoPeftModel.from_pretrained(tmp_path / "plain")), logits(without_task))


def test_a_new_process_needs_the_import_and_then_computes_the_same(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(type(tiny.llama()).from_pretrained(tmp_path / "base"), reft()).eval()
    model.save_pretrained(tmp_path / "adapter")
    torch.save(model, tmp_path / "whole.pt")
    torch.save({"logits": logits(model), "generated": generated(model)}, tmp_path / "expected.pt")
    script = f"""
        import sys, torch
        from peft import AutoPeftModelForCausalLM
        folder = {str(tmp_path)!r}
        try:
            AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter")
        except KeyError as error:
            assert error.args == ("REFT",), error
        else:
            raise AssertionError("loaded without peft_reft")
        assert "peft_reft" not in sys.modules
        import peft_reft
        expected = torch.load(folder + "/expected.pt")
        ids = torch.arange(3, 19).reshape(2, 8)
        whole = torch.load(folder + "/whole.pt", weights_only=False)
        handle = whole.get_base_model().model.layers[0].register_forward_hook(lambda *_: None)
        handle.remove()
        for model in (AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter"), whole):
            with torch.no_grad():
                torch.testing.assert_close(model(input_ids=ids).logits, expected["logits"])
            tokens = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
            assert torch.equal(tokens, expected["generated"])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_the_model_card_says_to_import_peft_reft(tmp_path):
    base = tiny.llama()
    base.name_or_path = base.config._name_or_path = "some-one/some-model"
    model = get_peft_model(base, reft())
    model.add_adapter("other", reft())
    for _ in range(2):
        model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        card = card_of(folder)
        assert card.content.count("import peft_reft") == 1
        assert card.data.library_name == "peft"
        assert card.data.base_model == "some-one/some-model"
        assert {"reft", "peft_reft"} <= set(card.data.tags)
    assert "base_model:adapter:some-one/some-model" in card_of(tmp_path).data.tags


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_the_code_in_the_model_card_loads_the_adapter(tmp_path, task_type):
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), reft(task_type=task_type))
    model.save_pretrained(tmp_path / "adapter")
    code = card_of(tmp_path / "adapter").content.partition("```python\n")[2].partition("```")[0]
    scope: dict = {}
    exec(code.replace("path/or/hub-id/of/this/adapter", str(tmp_path / "adapter")), scope)
    assert torch.equal(logits(scope["model"]), logits(model))


def test_an_existing_model_card_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\n# My adapter\n\nTrained on emojis.\n")
    get_peft_model(tiny.llama(), reft()).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.license == "mit"
    assert "Trained on emojis." in card.text
    assert "import peft_reft" in card.text


def test_a_model_card_without_a_header_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("# Notes\n")
    reft().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "# Notes" in text
    assert "import peft_reft" in text


@BOTH
@pytest.mark.parametrize("name", ["default", "other"])
def test_state_dicts_are_exchanged_without_the_adapter_name(config, name):
    source = get_peft_model(tiny.llama(), config()).eval()
    state = get_peft_model_state_dict(source)
    assert not any("default" in key for key in state)
    target = get_peft_model(tiny.llama(), config(), adapter_name=name).eval()
    result = set_peft_model_state_dict(target, state, adapter_name=name)
    assert not result.unexpected_keys
    assert torch.equal(logits(target), logits(source))


# Several adapters


def test_adapters_with_other_layers_ranks_and_positions_load_beside_each_other(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="renamed")
    assert torch.equal(logits(loaded), logits(model))
    model.set_adapter("other")
    loaded.set_adapter("renamed")
    assert torch.equal(logits(loaded), logits(model))
    assert [sorted(layer.reft_intervention) for layer in layers_of(loaded)] == [
        ["default"],
        ["default", "renamed"],
        ["renamed"],
    ]


def test_each_of_several_adapters_acts_as_it_does_alone():
    model = two_adapters()
    state = get_peft_model_state_dict(model, adapter_name="other")
    model.set_adapter("other")
    alone = get_peft_model(tiny.llama(), copy.deepcopy(model.peft_config["other"])).eval()
    set_peft_model_state_dict(alone, state)
    assert torch.equal(logits(model), logits(alone))


@BOTH
def test_only_the_active_adapter_is_trainable(config):
    model = get_peft_model(tiny.llama(), config())
    model.add_adapter("other", config())
    assert trainable(model)
    assert all(".default." in name for name in trainable(model))
    model.set_adapter("other")
    assert trainable(model)
    assert all(".other." in name for name in trainable(model))
    model.base_model.set_adapter("default", inference_mode=True)
    assert not trainable(model)
    model.set_requires_grad("other")
    assert trainable(model)
    assert all(".other." in name for name in trainable(model))
    model.set_requires_grad(["other"], requires_grad=False)
    assert not trainable(model)


@torch.no_grad()
def edit_by_hand(hidden: torch.Tensor, intervention) -> torch.Tensor:
    """The paper's equation 2 for every token."""
    rotation = torch.linalg.qr(intervention.projection[0].T)[0]
    source = intervention.weight[0] @ hidden.unsqueeze(-1) + intervention.bias[0].unsqueeze(-1)
    # QR may flip the sign of a row of R; the row of W that belongs to it then counts the other way round.
    signs = torch.sign((rotation * intervention.projection[0].T).sum(0))
    rotation = rotation * signs
    return hidden + (rotation @ (source - rotation.T @ hidden.unsqueeze(-1))).squeeze(-1)


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_two_active_adapters_edit_in_the_order_given(order):
    model = two_adapters({"positions": "all"})
    model.base_model.set_adapter(order)
    assert model.active_adapters == order
    by_hand = tiny.llama()
    for block, layer in zip(by_hand.model.layers, layers_of(model), strict=True):
        for name in order:
            if name in layer.reft_intervention:
                intervention = layer.reft_intervention[name]
                block.register_forward_hook(lambda _, __, out, edit=intervention: edit_by_hand(out, edit))
    torch.testing.assert_close(logits(model), logits(by_hand), atol=1e-4, rtol=1e-4)
    model.base_model.set_adapter(order[::-1])
    assert (logits(model) - logits(by_hand)).abs().max() > 1e-2


def test_two_active_adapters_train_together():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    model(input_ids=IDS).logits.sum().backward()
    assert {name.split(".")[-2] for name in trainable(model)} == {"default", "other"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@BOTH
def test_deleting_an_inactive_adapter_changes_nothing_else(config):
    model = get_peft_model(tiny.llama(), config()).eval()
    expected = logits(model)
    keys = set(model.state_dict())
    model.add_adapter("other", config(r=2))
    model.delete_adapter("other")
    assert set(model.state_dict()) == keys
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)


@BOTH
def test_deleting_the_active_adapter_activates_another(config):
    model = get_peft_model(tiny.llama(), config()).eval()
    model.add_adapter("other", config(r=2))
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert (model.active_adapters, model.active_adapter) == (["other"], "other")
    assert all(".other." in name for name in trainable(model))
    model.delete_adapter("other")
    assert torch.equal(logits(model.base_model), logits(tiny.llama()))


@pytest.mark.filterwarnings("ignore:Adapter .* was active")
def test_after_a_deletion_all_layers_agree_on_the_active_adapter():
    model = two_adapters({"layers_to_transform": 0}, {"layers_to_transform": 2})
    model.add_adapter("alpha", reft(layers_to_transform=1))
    model.delete_adapter("default")
    assert [layer.active_adapters for layer in layers_of(model)] == [["alpha"]] * 3
    assert model.active_adapters == ["alpha"]
    assert model.get_model_status().active_adapters == ["alpha"]
    model.delete_adapter("alpha")
    assert [layer.active_adapters for layer in layers_of(model)] == [["other"]] * 3
    model.delete_adapter("other")
    assert [layer.active_adapters for layer in layers_of(model)] == [[]] * 3
    assert torch.equal(logits(model.base_model), logits(tiny.llama()))


@BOTH
def test_deleting_one_of_two_active_adapters_keeps_the_other(config):
    model = get_peft_model(tiny.llama(), config()).eval()
    model.add_adapter("other", config(r=2))
    model.base_model.set_adapter(["default", "other"])
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]


@BOTH
def test_a_deleted_name_can_be_used_again(config):
    model = get_peft_model(tiny.llama(), config())
    model.add_adapter("other", config())
    model.delete_adapter("other")
    model.add_adapter("other", config(r=2))
    model.set_adapter("other")
    assert model.get_model_status().available_adapters == ["default", "other"]
    logits(model)


@BOTH
@pytest.mark.parametrize("name", ["reft", "lora", "base_model", "layers", "weight"])
def test_unusual_adapter_names_round_trip(config, name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT advises against a name that its prefix contains
        model = get_peft_model(tiny.llama(), config(), adapter_name=name).eval()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(loaded), logits(model))
    model.delete_adapter(name)
    assert torch.equal(logits(model.base_model), logits(tiny.llama()))


@BOTH
def test_adapter_names_with_a_dot_are_refused(config):
    with pytest.raises(KeyError, match=r"module name can.+contain"):
        get_peft_model(tiny.llama(), config(), adapter_name="a.b")


# Turning adapters off and taking them off


@BOTH
def test_a_disabled_adapter_gives_the_base_model_bit_for_bit(config):
    base = tiny.llama()
    expected, tokens = logits(base), generated(base)
    model = get_peft_model(base, config()).eval()
    changed = logits(model)
    assert not torch.equal(changed, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        assert torch.equal(generated(model), tokens)
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
        assert not trainable(model)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits(model), changed)
    assert trainable(model)


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def traces(model) -> dict:
    """Everything that an adapter could leave on a model, in a form that can be compared."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": [{name: list(getattr(module, name).items()) for name in HOOKS} for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "children": [list(module._modules) for module in model.modules()],
        "state": {name: (id(tensor), tensor.sum().item()) for name, tensor in model.named_parameters()},
        "keys": list(model.state_dict()),
        "generate": getattr(model, "generate", None),
        "forward": model.forward,
    }


def test_unload_leaves_no_trace():
    base = tiny.llama()
    base.model.layers[0].register_forward_hook(print_nothing)
    before = traces(base)
    expected, tokens = logits(base), generated(base)
    model = get_peft_model(base, reft())
    model.add_adapter("other", reft(r=2, positions="all"))
    shift(model)
    generated(model)
    assert traces(base) != before
    unloaded = model.unload()
    assert unloaded is base
    assert traces(base) == before
    assert torch.equal(logits(base), expected)
    assert torch.equal(generated(base), tokens)


def print_nothing(*_) -> None:
    """A user's hook."""


def test_an_unloaded_model_takes_a_new_adapter_without_warnings():
    base = tiny.llama()
    expected = logits(base)
    get_peft_model(base, reft()).unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base, reft(r=2, layers_to_transform=[0], init_weights=True)).eval()
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * tiny.HIDDEN + 2
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)
    assert list(model.peft_config) == ["default"]


def test_unload_restores_modules_to_save():
    base = llama_classifier()
    before = traces(base)
    model = get_peft_model(base, reft(task_type="SEQ_CLS"))
    after = traces(model.unload())
    for each in (before, after):
        each.pop("state")  # the head that stays is the trained copy, as with LoRA
    assert after == before


# Models in other shapes


@BOTH
def test_modules_to_save_are_trained_saved_and_switched(config, tmp_path):
    model = get_peft_model(tiny.llama(), config(modules_to_save=["lm_head"])).eval()
    expected_base = logits(tiny.llama())
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.5)
    assert "base_model.model.lm_head.modules_to_save.default.weight" in trainable(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected_base)
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    unloaded = loaded.unload()
    assert type(unloaded.lm_head) is nn.Linear
    model.add_adapter("other", config())
    model.set_adapter("other")
    assert "base_model.model.lm_head.modules_to_save.default.weight" not in trainable(model)


@BOTH
def test_tied_embeddings_stay_tied(config, tmp_path):
    base = tiny.llama(tie_word_embeddings=True)
    model = get_peft_model(base, config()).eval()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(tie_word_embeddings=True), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_is_injected_without_a_wrapper():
    wrapped = get_peft_model(tiny.llama(), reft()).eval()
    state = get_peft_model_state_dict(wrapped)
    base = tiny.llama()
    injected = inject_adapter_in_model(reft(), base).eval()
    assert injected is base
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    result = set_peft_model_state_dict(injected, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(injected), logits(wrapped))
    assert torch.equal(generated(injected), generated(wrapped))
    assert set(state) == set(get_peft_model_state_dict(injected))


def test_injection_takes_the_layers_from_a_state_dict():
    source = inject_adapter_in_model(reft(layers_to_transform=[0, 2]), tiny.llama()).eval()
    state = get_peft_model_state_dict(source)
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        target = inject_adapter_in_model(reft(), tiny.llama(), state_dict=state).eval()
    assert set(get_peft_model_state_dict(target)) == set(state)
    set_peft_model_state_dict(target, state)
    assert torch.equal(logits(target), logits(source))


def test_a_state_dict_with_layers_that_the_config_leaves_out_is_refused_before_anything_is_touched():
    state = get_peft_model_state_dict(inject_adapter_in_model(reft(), tiny.llama()))
    base = tiny.llama()
    before = traces(base)
    with pytest.raises(ValueError, match=r"model\.layers\.1"):
        inject_adapter_in_model(reft(layers_to_transform=[0]), base, state_dict=state)
    assert traces(base) == before


@BOTH
def test_low_cpu_mem_usage_creates_and_loads_on_meta(config, tmp_path):
    model = get_peft_model(tiny.llama(), config()).eval()
    model.save_pretrained(tmp_path)
    empty = get_peft_model(tiny.llama(), config(), low_cpu_mem_usage=True)
    assert {p.is_meta for name, p in empty.named_parameters() if name in trainable(empty)} == {True}
    set_peft_model_state_dict(empty, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.equal(logits(empty.eval()), logits(model))
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, adapter_name="again", low_cpu_mem_usage=True)
    for name in ("default", "again"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@DTYPES
@BOTH
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_of_half_precision_models_have_the_asked_dtype(config, dtype, autocast, tmp_path):
    expected = torch.float32 if autocast else dtype
    model = get_peft_model(tiny.llama().to(dtype), config(), autocast_adapter_dtype=autocast).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
    loaded.load_adapter(tmp_path, adapter_name="other", autocast_adapter_dtype=autocast)
    for each in (model, loaded):
        own = {p.dtype for name, p in each.named_parameters() if ".default." in name or ".other." in name}
        assert own == {expected}
        assert {p.dtype for name, p in tiny.llama().to(dtype).named_parameters()} == {dtype}
    assert logits(model).dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert generated(model).shape == (2, 13)


@DTYPES
def test_a_fresh_adapter_on_a_half_precision_model_does_not_change_it(dtype):
    base = tiny.llama().to(dtype)
    expected = logits(base)
    assert torch.equal(logits(get_peft_model(base, reft(init_weights=True)).eval()), expected)


def test_training_works_under_autocast():
    model = get_peft_model(tiny.llama(), reft())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=IDS, labels=TASKS[0][2]["labels"]).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters() if p.requires_grad)


def copies(model, how: str, folder: Path):
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "injected"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_the_whole_model_is_complete_and_independent(how, wrapped, tmp_path):
    settings = {"positions": "l1", "layers_to_transform": [0, 1]}
    base = tiny.llama()
    model = get_peft_model(base, reft(**settings)) if wrapped else inject_adapter_in_model(reft(**settings), base)
    model.eval()
    expected, tokens = logits(model), generated(model)
    twin = copies(model, how, tmp_path)
    assert torch.equal(logits(twin), expected)
    assert torch.equal(generated(twin), tokens)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    shift(twin)
    changed, changed_tokens = logits(twin), edited_tokens_in_generate(twin)
    assert not torch.equal(changed, expected)
    assert changed_tokens == [[(0, 7), (1, 7)], [], []]
    assert torch.equal(logits(model), expected)
    assert torch.equal(generated(model), tokens)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(twin), changed)


def edited_tokens_in_generate(model) -> list[list[tuple[int, int]]]:
    """The tokens that the first layer edits, in each pass of a generation of three tokens."""
    module = next(module for module in model.modules() if "reft" in module._modules)
    passes, before = [], {}

    def remember(module, args, output) -> None:
        before["output"] = output.clone()

    def compare(module, args, output) -> None:
        passes.append([tuple(place) for place in (output != before["output"]).any(-1).nonzero().tolist()])

    handles = [module.register_forward_hook(remember, prepend=True), module.register_forward_hook(compare)]
    model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for handle in handles:
        handle.remove()
    return passes


def test_hidden_states_show_the_edits():
    model = get_peft_model(tiny.llama(), reft(layers_to_transform=[0, 1])).eval()
    base = tiny.llama()
    edited = model(input_ids=IDS, output_hidden_states=True).hidden_states
    plain = base(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(edited) == len(plain) == tiny.LAYERS + 1
    assert torch.equal(edited[0], plain[0])
    touched = (edited[1] != plain[1]).any(-1)
    assert touched.tolist() == [[True, True, False, False, False, False, True, True]] * 2
    block = model.get_base_model().model.layers[0]
    torch.testing.assert_close(edited[1][:, :2], by_parts(block, plain)[:, :2])


def by_parts(block, plain) -> torch.Tensor:
    """The output of the first block, edited outside the model."""
    intervention = block.reft.reft_intervention["default"]
    return edit_by_hand(plain[1], intervention)


# Training


def test_gradients_flow_when_inputs_require_them():
    model = get_peft_model(tiny.llama(), reft())
    model.enable_input_require_grads()
    model(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def train(model, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=4e-3, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=TASKS[0][2]["labels"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def orthonormality_error(model) -> float:
    errors = []
    for layer in layers_of(model):
        for intervention in layer.reft_intervention.values():
            rows = intervention.subspace().double()
            errors.append((rows @ rows.mT - torch.eye(rows.shape[1])).abs().max().item())
    return max(errors)


def test_rows_stay_orthonormal_through_training_saving_and_more_training(tmp_path):
    model = get_peft_model(tiny.llama(), reft(init_weights=True))
    losses = train(model, 20)
    assert losses[-1] < losses[0]
    assert orthonormality_error(model) < 1e-6
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert orthonormality_error(resumed) < 1e-6
    more = train(resumed, 20)
    assert more[-1] < more[0]
    assert orthonormality_error(resumed) < 1e-6

"""Weights that do not fit the adapter or the model raise an error or a warning, where PEFT would drop them."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import tiny
import torch
import transformers
from adapters import IDS, logits, lora, reft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME


def saved(folder, model=None, **settings):
    """The folder of an adapter of a tiny Llama."""
    get_peft_model(model or tiny.llama(), reft(**settings)).save_pretrained(folder)
    return folder


def changed(folder, **fields):
    """The folder, with other fields in its configuration."""
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def load(base, folder, way: str):
    if way == "from_pretrained":
        return PeftModel.from_pretrained(base, folder)
    model = get_peft_model(base, reft(r=1), "first")
    model.load_adapter(folder, "second")
    return model


WAYS = pytest.mark.parametrize("way", ["from_pretrained", "load_adapter"])


@WAYS
@pytest.mark.parametrize("fields", [{}, {"layers_to_transform": [-1]}], ids=str)
def test_layers_that_the_model_lacks_are_said_by_name(fields, way, tmp_path):
    saved(tmp_path, **fields)
    with pytest.warns(UserWarning, match=r"include edits of 'model.layers.2', which it does not edit"):
        model = load(tiny.llama(num_hidden_layers=2), tmp_path, way)
    assert isinstance(model, PeftModel)


@WAYS
def test_weights_of_another_component_are_said(way, tmp_path):
    changed(saved(tmp_path), component="mlp_output")
    with pytest.warns(UserWarning, match=r"include edits of 'model.layers.0', 'model.layers.1'"):
        load(tiny.llama(), tmp_path, way)


@WAYS
@pytest.mark.parametrize("intervention", ["consreft", "lobireft"])
def test_an_intervention_without_the_weights_parameters_is_refused(intervention, way, tmp_path):
    changed(saved(tmp_path), intervention=intervention)
    with pytest.raises(ValueError, match=r"at 'model.layers.0' they hold 'weight', which the configured intervention"):
        load(tiny.llama(), tmp_path, way)


@WAYS
@pytest.mark.parametrize(
    "fields",
    [{"r": 3}, {"intervention": "red"}, {"positions": "f2+l2", "share_weights": False}],
    ids=["r", "intervention", "units"],
)
def test_weights_of_another_shape_are_refused_in_a_sentence(fields, way, tmp_path):
    changed(saved(tmp_path, positions="all"), **fields)
    with pytest.raises(ValueError, match=r"'model.layers.0.reft.*' has shape \(1, .* where this model needs") as raised:
        load(tiny.llama(), tmp_path, way)
    assert len(str(raised.value)) < 500


@WAYS
def test_another_hidden_size_is_refused_in_a_sentence(way, tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"trained for a base model of another hidden size"):
        load(tiny.llama(hidden_size=2 * tiny.HIDDEN), tmp_path, way)


@pytest.mark.parametrize("config", [reft, lora], ids=["reft", "lora"])
def test_transformers_own_load_adapter_reports_them(config, tmp_path):
    get_peft_model(tiny.llama(), config()).save_pretrained(tmp_path)
    info = tiny.llama(num_hidden_layers=2).load_adapter(str(tmp_path))
    if info is None:
        pytest.skip(f"Transformers {transformers.__version__} returns no report of what it loads")
    assert {re.sub(r".*layers\.(\d).*", r"\1", key) for key in info.unexpected_keys} == {"2"}


@pytest.mark.parametrize("config", [reft(), lora()], ids=["reft", "lora"])
def test_weights_that_fit_load_without_a_word(config, tmp_path):
    model = get_peft_model(tiny.llama(), config)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights of")
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
        # A whole checkpoint, in which other adapters stand beside those of the model.
        loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_weights_of_adapters_that_are_not_on_the_model_are_not_looked_at():
    two = get_peft_model(tiny.llama(), reft(), "one")
    two.add_adapter("two", reft(r=2, layers_to_transform=[1]))
    one = get_peft_model(tiny.llama(), reft(), "one")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights of")
        result = one.load_state_dict(two.state_dict(), strict=False)
    assert all(".two." in key for key in result.unexpected_keys)
    torch.testing.assert_close(logits(one), logits(two), rtol=0, atol=0)


def test_strict_loading_still_lists_what_is_strange():
    weights = get_peft_model_state_dict(get_peft_model(tiny.llama(), reft()))
    model = get_peft_model(tiny.llama(num_hidden_layers=2), reft())
    with pytest.warns(UserWarning, match="weights are left out"):
        result = set_peft_model_state_dict(model, weights)
    assert {re.sub(r".*layers\.(\d).*", r"\1", key) for key in result.unexpected_keys} == {"2"}


def test_the_check_comes_off_with_the_adapters():
    base = tiny.llama()
    before = logits(base)
    unloaded = get_peft_model(base, reft()).unload()
    weights = get_peft_model(tiny.llama(), reft()).get_base_model().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unloaded.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logits(unloaded, IDS), before, rtol=0, atol=0)

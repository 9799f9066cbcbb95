"""Adapters of pyreft: converted ones reproduce its outputs, and options without a counterpart are refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pyreft_layout
import pytest
import torch
from adapters import logits
from peft import AutoPeftModelForCausalLM, PeftModel
from reference import gram_schmidt
from safetensors.torch import load_file
from tiny import HIDDEN, ZOO, llama
from transformers import LlamaForCausalLM, RobertaForSequenceClassification

from peft_reft import ReftConfig
from peft_reft.convert import convert
from peft_reft.convert.__main__ import main

FIXTURES = Path(__file__).parent / "fixtures"
BASE = FIXTURES / "tiny-llama"
# The repository has a part of the cases; the variable names a folder with all.
PYREFT = Path(os.environ.get("PYREFT_FIXTURES", FIXTURES / "pyreft"))
KINDS = sorted(path.parent.name for path in PYREFT.glob("*/ckpt"))
FLOAT32 = [kind for kind in KINDS if "bf16" not in kind]
IDS = torch.arange(3, 15)[None]


def cases(kinds: list[str], pattern: str) -> list:
    found = [(kind, path.name.split(".")[1]) for kind in kinds for path in sorted((PYREFT / kind).glob(pattern))]
    assert found
    return [pytest.param(*case, id="-".join(case)) for case in found]


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Kind -> its converted folder."""
    tmp = tmp_path_factory.mktemp("converted")

    @cache
    def converted(kind: str) -> Path:
        shared = "_unshared" not in kind
        return convert(PYREFT / kind / "ckpt", tmp / kind, "f2+l2", shared, base_model=BASE)

    return converted


@pytest.fixture(scope="session")
def load(converted):
    def load(kind: str, dtype: torch.dtype = torch.float32, **options) -> PeftModel:
        base = LlamaForCausalLM.from_pretrained(BASE, dtype=dtype)
        return PeftModel.from_pretrained(base, converted(kind), **options)

    return load


@torch.no_grad()
def run(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that the fixtures store of a pass, by name: hidden.0 is the embedding's output."""
    names = ("input_ids", "attention_mask", "labels")
    output = model(**{name: inputs[name] for name in names if name in inputs}, output_hidden_states=True)
    *residual, normed = output.hidden_states
    results = {f"hidden.{i}": hidden for i, hidden in enumerate(residual)}
    results |= {"normed": normed, "logits": output.logits}
    return results | ({"loss": output.loss[None]} if "labels" in inputs else {})


def errors(model, kind: str, case: str) -> dict[str, float]:
    """Largest error of each tensor on real tokens, for the residual stream relative to its largest entry."""
    inputs = load_file(PYREFT / kind / f"inputs.{case}.safetensors")
    expected = load_file(PYREFT / kind / f"outputs.{case}.safetensors")
    found, real = {}, inputs["attention_mask"].bool()
    for name, tensor in run(model, inputs).items():
        mine, theirs = (tensor, expected[name]) if name == "loss" else (tensor[real], expected[name][real])
        scale = theirs.abs().max() if name.startswith("hidden") else 1
        found[name] = ((mine - theirs).abs().max() / scale).item()
    return found


@pytest.mark.parametrize(("kind", "case"), cases(FLOAT32, "outputs.*"))
def test_outputs_are_those_of_pyreft(load, kind, case):
    model = load(kind)
    # The base model alone, which has no edits to get wrong, is 1e-5 away in places: another CPU rounds otherwise. Its
    # residual stream has entries up to 20, so the relative bound is about the same.
    found = errors(model, kind, case)
    assert found.keys() >= {"hidden.1", "hidden.3", "normed", "logits"}
    assert max(found.values()) < 1e-5
    assert all(error < 2e-6 for name, error in found.items() if name.startswith("hidden"))
    with model.disable_adapter():
        assert errors(model, kind, case)["logits"] > 0.1


@pytest.mark.parametrize(("kind", "case"), cases([k for k in KINDS if "bf16" in k], "outputs.*"))
def test_outputs_of_a_bfloat16_base_are_those_of_pyreft_to_its_precision(load, kind, case):
    # pyreft computes W h + b in bfloat16, this package in float32: the edits differ by a rounding of bfloat16 (0.4%),
    # which the layers behind enlarge.
    model = load(kind, torch.bfloat16)
    found = errors(model, kind, case)
    assert max(error for name, error in found.items() if name.startswith("hidden")) < 0.015
    assert found["logits"] < 0.1
    assert found.get("loss", 0.0) < 0.01
    with model.disable_adapter():
        assert errors(model, kind, case)["logits"] > 0.4


@pytest.mark.parametrize(("kind", "case"), cases(FLOAT32, "grads.*"))
def test_gradients_are_those_of_pyreft(load, kind, case):
    model = load(kind, is_trainable=True)
    expected = load_file(PYREFT / kind / f"grads.{case}.safetensors")
    inputs = load_file(PYREFT / kind / f"inputs.{case}.safetensors")
    loss = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    loss.backward()
    assert abs(loss.item() - expected["loss"].item()) < 1e-5
    units = {name.split(".")[0] for name in expected if name.startswith("layer")}
    for unit in units:
        layer, number = int(unit.split("_")[1]), int(unit.split("#")[1])
        mine = model.get_submodule(f"base_model.model.model.layers.{layer}").reft.reft_intervention["default"]
        projection = mine.projection[number].detach().double().requires_grad_()
        # pyreft's gradient is that of R itself, ours that of the rows that R is made from.
        cotangent = expected[f"{unit}.effective_R"].T.double()
        (of_rows,) = torch.autograd.grad(gram_schmidt(projection), projection, cotangent)
        for got, want in (
            (mine.weight.grad, expected[f"{unit}.learned_source.weight"]),
            (mine.bias.grad, expected[f"{unit}.learned_source.bias"]),
            (mine.projection.grad, of_rows.float()),
        ):
            assert (got[number] - want).abs().max() < 1e-5 * max(1.0, want.abs().max())


@pytest.mark.parametrize("kind", [kind for kind in FLOAT32 if (PYREFT / kind / "generate.safetensors").exists()])
def test_greedy_generations_are_those_of_pyreft(load, kind):
    model, expected = load(kind), load_file(PYREFT / kind / "generate.safetensors")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    for case in ("single0", "single1", "single2"):
        ids = load_file(PYREFT / kind / f"inputs.{case}.safetensors")["input_ids"]
        assert torch.equal(model.generate(input_ids=ids, **options), expected[case])
    batch = "leftpad_sink_batch"
    mask = expected[f"{batch}.attention_mask"]
    got = model.generate(input_ids=expected[f"{batch}.input_ids"], attention_mask=mask, **options)
    assert torch.equal(got, expected[batch])
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=ids, **options), expected[case])


def test_the_folder_is_one_that_save_pretrained_writes(load, converted, tmp_path):
    model, folder = load("loreft_unshared"), converted("loreft_unshared")
    model.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "again").iterdir()
    )
    mine, again = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "again"))
    assert mine.keys() == again.keys()
    assert all(torch.equal(mine[name], again[name]) for name in mine)
    assert {tensor.dtype for tensor in mine.values()} == {torch.float32}
    assert (folder / "README.md").read_text() == (tmp_path / "again" / "README.md").read_text()
    assert (folder / "adapter_config.json").read_text() == (tmp_path / "again" / "adapter_config.json").read_text()
    auto = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(auto), logits(model))


# Checkpoints written here: the kinds that the fixtures lack.

METHODS = sorted(pyreft_layout.CLASSES)
LAYERS = (0, 2)


@pytest.fixture
def base(tmp_path) -> LlamaForCausalLM:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    return model


def draw(method: str, units: int = 1, component: str = "block_output", layers=LAYERS, **options):
    """Interventions by layer, and the state that pyreft would save for them, by place."""
    tensors, states = {}, {}
    for layer in layers:
        tensors[layer] = []
        for number in range(units):
            drawn, state = pyreft_layout.draw(method, HIDDEN, 4, seed=10 * layer + number, **options)
            tensors[layer].append(drawn)
            states[component, layer, number] = state
    return tensors, states


@torch.no_grad()
def by_loops(model, method, tensors, spec="f2+l3", module="model.layers.{}", ids=IDS, **options) -> torch.Tensor:
    with ExitStack() as stack:
        for layer, units in tensors.items():
            name = module.format(layer)
            stack.enter_context(pyreft_layout.editing(model, name, method, spec, units, **options))
        return model(input_ids=ids).logits


def apply(model, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(model, folder), IDS)


def assert_same(got: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 0.05


@pytest.mark.parametrize("config", [True, False], ids=["saved", "trainer"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(base, tmp_path, method, shared, config):
    tensors, states = draw(method, 1 if shared else 2)
    source = pyreft_layout.write(tmp_path / "checkpoint-7" / "intervenable_model", method, states, config)
    told = None if config or method in ("loreft", "direft") else method
    # Either the folder itself or the one it is in.
    source = source if shared else source.parent
    convert(source, tmp_path / "out", "f2+l3", shared, base_model=base, intervention=told)
    plain = logits(base, IDS)
    assert_same(apply(base, tmp_path / "out"), by_loops(llama(), method, tensors), plain)


@pytest.mark.parametrize("method", ["loreft", "noreft", "direft", "nodireft"])
def test_activation(base, tmp_path, method):
    tensors, states = draw(method, 2)
    source = pyreft_layout.write(tmp_path / "source", method, states)
    convert(source, tmp_path / "out", "f2+l3", base_model=base, act_fn="relu")
    assert_same(apply(base, tmp_path / "out"), by_loops(llama(), method, tensors, act=torch.relu), logits(llama(), IDS))


@pytest.mark.parametrize("method", ["noreft", "nodireft"])
def test_bias_of_the_projection(base, tmp_path, method):
    tensors, states = draw(method, add_bias=True)
    source = pyreft_layout.write(tmp_path / "source", method, states)
    convert(source, tmp_path / "out", "f2+l3", True, base_model=base)
    assert_same(apply(base, tmp_path / "out"), by_loops(llama(), method, tensors), logits(llama(), IDS))
    if method == "nodireft":  # does not use it, so an activation is no obstacle
        convert(source, tmp_path / "relu", "f2+l3", True, base_model=base, act_fn="relu")
    else:
        with pytest.raises(ValueError, match=r"block_output.*'proj_layer.bias'.*act_fn='relu'"):
            convert(source, tmp_path / "relu", "f2+l3", True, base_model=base, act_fn="relu")


@pytest.mark.parametrize("method", ["loreft", "direft", "lobireft"])
def test_rank_as_large_as_the_hidden_size(base, tmp_path, method):
    # torch parametrizes square matrices in another way than tall ones.
    drawn, state = pyreft_layout.draw(method, HIDDEN, HIDDEN)
    source = pyreft_layout.write(tmp_path / "source", method, {("block_output", 1, 0): state}, rank=HIDDEN)
    convert(source, tmp_path / "out", "f2+l3", True, base_model=base)
    assert_same(apply(base, tmp_path / "out"), by_loops(llama(), method, {1: [drawn]}), logits(llama(), IDS))


def test_first_words_are_number_0_however_the_positions_are_written(base, tmp_path):
    tensors, states = draw("direft", 2)
    source = pyreft_layout.write(tmp_path / "source", "direft", states)
    convert(source, tmp_path / "out", "l3+f2", base_model=base)
    assert_same(apply(base, tmp_path / "out"), by_loops(llama(), "direft", tensors), logits(llama(), IDS))


def test_one_word_is_the_same_shared_or_not(base, tmp_path):
    tensors, states = draw("loreft")
    source = pyreft_layout.write(tmp_path / "source", "loreft", states)
    expected = by_loops(llama(), "loreft", tensors, "l1")
    for shared in (True, False):
        convert(source, tmp_path / f"{shared}", "l1", shared, base_model=tmp_path / "base")
        assert_same(apply(llama(), tmp_path / f"{shared}"), expected, logits(llama(), IDS))


def test_bfloat16_sources_are_taken_over_exactly(base, tmp_path):
    _, states = draw("loreft")
    for state in states.values():
        state["weight"], state["bias"] = state["weight"].bfloat16(), state["bias"].bfloat16()
    source = pyreft_layout.write(tmp_path / "source", "loreft", states)
    convert(source, tmp_path / "out", "f2", True, base_model=base)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for (_, layer, _), state in states.items():
        prefix = f"base_model.model.model.layers.{layer}.reft.reft_intervention."
        assert torch.equal(saved[f"{prefix}weight"][0], state["weight"].float())
        assert torch.equal(saved[f"{prefix}bias"][0], state["bias"].float())
        torch.testing.assert_close(gram_schmidt(saved[f"{prefix}projection"][0]), state["rotate_layer"].T)


def test_dropout_and_names_are_kept(base, tmp_path):
    source = pyreft_layout.write(tmp_path / "source", "loreft", draw("loreft")[1])
    convert(source, tmp_path / "out", "f2+l3", True, base_model=tmp_path / "base", dropout=0.05)
    config = ReftConfig.from_pretrained(tmp_path / "out")
    assert (config.dropout, config.r, config.task_type) == (0.05, 4, "CAUSAL_LM")
    assert config.base_model_name_or_path == str(tmp_path / "base")


def test_a_model_that_is_passed_stays_as_it_is(base, tmp_path):
    source = pyreft_layout.write(tmp_path / "source", "loreft", draw("loreft")[1])
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    names = [name for name, _ in base.named_modules()]
    convert(source, tmp_path / "out", "f2+l3", True, base_model=base)
    assert [name for name, _ in base.named_modules()] == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("method", ["loreft", "direft", "consreft", "lobireft"])
def test_rows_that_are_not_orthonormal_keep_their_outputs(base, tmp_path, method):
    tensors, states = draw(method)
    for (_, layer, _), state in states.items():
        matrix = torch.eye(4) + 0.1 * torch.randn(4, 4)
        tensors[layer][0]["R"] = tensors[layer][0]["R"] @ matrix
        if method == "loreft":
            state["rotate_layer"] = tensors[layer][0]["R"]
        else:
            # Q times a matrix: what a base that is not orthogonal amounts to.
            chart = "rotate_layer.parametrizations.weight."
            rotation = tensors[layer][0]["R"] @ torch.linalg.inv(matrix)
            state[f"{chart}0.base"] = tensors[layer][0]["R"] @ rotation.T @ state[f"{chart}0.base"]
    source = pyreft_layout.write(tmp_path / "source", method, states)
    with pytest.warns(UserWarning, match=r"rows of R are not orthonormal.*in place of"):
        convert(source, tmp_path / "out", "f2+l3", True, base_model=base)
    assert_same(apply(base, tmp_path / "out"), by_loops(llama(), method, tensors), logits(llama(), IDS))


def test_weight_decay_that_set_r_to_zero_leaves_the_base_model(base, tmp_path):
    _, states = draw("direft")
    for state in states.values():
        state["rotate_layer.parametrizations.weight.original"] *= 0.999
    source = pyreft_layout.write(tmp_path / "source", "direft", states)
    with pytest.warns(UserWarning, match="weight decay"):
        convert(source, tmp_path / "out", "f2+l3", True, base_model=base)
    assert torch.equal(apply(base, tmp_path / "out"), logits(llama(), IDS))


COMPONENTS = {
    "block_output": ("model.layers.{}", False),
    "block_input": ("model.layers.{}", True),
    "attention_output": ("model.layers.{}.self_attn", False),
    "mlp_output": ("model.layers.{}.mlp", False),
}


@pytest.mark.parametrize("config", [True, False], ids=["saved", "trainer"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_components_of_pyvene(base, tmp_path, component, config):
    tensors, states = draw("loreft", 2, component)
    module, before = COMPONENTS[component]
    source = pyreft_layout.write(tmp_path / "source", "loreft", states, config)
    convert(source, tmp_path / "out", "f2+l3", base_model=base)
    expected = by_loops(llama(), "loreft", tensors, module=module, before=before)
    assert_same(apply(base, tmp_path / "out"), expected, logits(llama(), IDS))


def test_parts_of_a_block_of_another_model_are_refused(tmp_path):
    source = pyreft_layout.write(tmp_path / "source", "loreft", draw("loreft", component="attention_output")[1])
    options = {"positions": "f2", "base_model": ZOO["opt"].build()}
    refused(source, "'attention_output' of a 'opt' model.*only been verified for .*'llama'", **options)


def test_several_components(base, tmp_path):
    tensors, states = zip(*(draw("loreft", component=component) for component in COMPONENTS), strict=True)
    every = {place: state for each in states for place, state in each.items()}
    source = pyreft_layout.write(tmp_path / "source", "loreft", every)
    convert(source, tmp_path / "out", "f2+l3", True, base_model=base)
    model = llama()
    with torch.no_grad(), ExitStack() as stack:
        for (module, before), layers in zip(COMPONENTS.values(), tensors, strict=True):
            for layer, units in layers.items():
                name = module.format(layer)
                edit = pyreft_layout.editing(model, name, "loreft", "f2+l3", units, before=before)
                stack.enter_context(edit)
        expected = model(input_ids=IDS).logits
    assert_same(apply(base, tmp_path / "out"), expected, logits(llama(), IDS))


@pytest.mark.parametrize("config", [True, False], ids=["saved", "trainer"])
@pytest.mark.parametrize(
    ("component", "module"),
    [
        ("model.layers[{}].output", "model.layers.{}"),
        ("base_model.model.model.layers[{}].output", "model.layers.{}"),
        ("model.layers[{}].mlp.up_proj.output", "model.layers.{}.mlp.up_proj"),
        ("model.layers.{}.self_attn.o_proj.output", "model.layers.{}.self_attn.o_proj"),
    ],
)
def test_components_with_dots(base, tmp_path, component, module, config):
    width = base.get_submodule(module.format(0)).out_features if "proj" in module else HIDDEN
    tensors, states = {}, {}
    for layer in LAYERS:
        drawn, state = pyreft_layout.draw("loreft", width, 4, seed=layer)
        tensors[layer], states[component.format(layer), layer, 0] = [drawn], state
    source = pyreft_layout.write(tmp_path / "source", "loreft", states, config)
    convert(source, tmp_path / "out", "f2+l3", True, base_model=base)
    expected = by_loops(llama(), "loreft", tensors, module=module)
    assert_same(apply(base, tmp_path / "out"), expected, logits(llama(), IDS))


# Weights of the base model.


def roberta(labels: int = 5) -> RobertaForSequenceClassification:
    config = ZOO["roberta"].build().config
    torch.manual_seed(3)
    config.num_labels = labels
    return RobertaForSequenceClassification(config).eval()


def test_a_trained_classifier_comes_along(tmp_path):
    tensors, states = draw("loreft", 1, "roberta.encoder.layer[{}].output")
    states = {(component.format(layer), layer, number): s for (component, layer, number), s in states.items()}
    source = pyreft_layout.write(tmp_path / "source", "loreft", states)
    trained, fresh = roberta(), roberta()
    with torch.no_grad():
        for parameter in trained.classifier.parameters():
            parameter.normal_()
    weights = {f"classifier.{name}": parameter for name, parameter in trained.classifier.named_parameters()}
    torch.save(weights, source / "pytorch_model.bin")
    fresh.config.num_labels = 2
    fresh.config.save_pretrained(tmp_path / "base")
    fresh.config.num_labels = 5
    with pytest.raises(ValueError, match=r"'classifier.out_proj.bias' \[5\].*base model has \[2\].*num_labels"):
        convert(source, tmp_path / "out", "f2", True, base_model=tmp_path / "base", task_type="SEQ_CLS")
    options = {"base_model": tmp_path / "base", "task_type": "SEQ_CLS", "num_labels": 5}
    convert(source, tmp_path / "out", "f2", True, **options)
    expected = by_loops(trained, "loreft", tensors, "f2", "roberta.encoder.layer.{}")
    plain = logits(fresh, IDS)
    assert_same(apply(fresh, tmp_path / "out"), expected, plain)

    os.remove(source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"'classifier'.*no weights for it.*task_type=None"):
        convert(source, tmp_path / "headless", "f2", True, **options)
    convert(source, tmp_path / "headless", "f2", True, base_model=roberta(), task_type=None)
    expected = by_loops(roberta(), "loreft", tensors, "f2", "roberta.encoder.layer.{}")
    assert_same(apply(roberta(), tmp_path / "headless"), expected, plain)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, HIDDEN)}, "lora_A.*no such parameter"),
        ({"model.norm.weight": torch.ones(3)}, r"'model.norm.weight' \[3\].*\[32\]"),
        ({"scale": torch.ones(3)}, "'scale'.*no such parameter"),
        ({"a": 1}, "pytorch_model.bin: 'a' is a int instead of a tensor"),
    ],
)
def test_weights_without_a_place_are_refused(base, tmp_path, weights, message):
    source = pyreft_layout.write(tmp_path / "source", "loreft", draw("loreft")[1])
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", "f2", True, base_model=base)
    assert not (tmp_path / "out").exists()


# Broken and foreign folders.


@pytest.fixture
def source(tmp_path) -> Path:
    return pyreft_layout.write(tmp_path / "source", "direft", draw("direft", 2)[1])


FILE = "intkey_layer_2_comp_block_output_unit_pos_nunit_1#1.bin"


def change(source: Path, file: str = FILE, **changes: object) -> None:
    """Give entries of a file other values, None to take them out."""
    if file.endswith(".json"):
        path, read = source / file, json.loads((source / file).read_text())
    else:
        path, read = source / file, torch.load(source / file)
    for name, value in changes.items():
        name = name.replace("__", ".")
        read.pop(name) if value is None else read.update({name: value})
    path.write_text(json.dumps(read)) if file.endswith(".json") else torch.save(read, path)


def refused(source: Path, message: str, error: type[Exception] = ValueError, **options) -> None:
    target = source.parent / "refused"
    with pytest.raises(error, match=message):
        convert(source, target, **{"positions": "f2+l3", "base_model": source.parent / "base"} | options)
    assert not target.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share_weights": True}, r"2 intervention\(s\) on 'block_output' of layer 0.*share_weights=True need 1"),
        ({"positions": "f2"}, r"2 intervention\(s\).*positions='f2'.*need 1"),
        ({"positions": "f2+c1+l3"}, "need 3"),
        ({"positions": None}, "positions"),
        ({"positions": "x2"}, "Unknown word 'x2'"),
        ({"base_model": None}, "--base-model"),
        ({"intervention": "loreft"}, "intervention='loreft', but .*config.json has the method direft"),
        ({"act_fn": "nonsense"}, "Unknown act_fn 'nonsense'"),
        ({"dropout": 1.5}, "dropout"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type='SEQ_2_SEQ_LM'"),
    ],
)
def test_arguments_that_contradict_the_folder(base, source, options, message):
    refused(source, message, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learned_source__weight": None}, f"{FILE}: 'learned_source.weight' is missing"),
        ({"rotate_layer__parametrizations__weight__0__base": None}, f"{FILE}: .*0.base' is missing"),
        ({"learned_source__bias": torch.ones(5)}, rf"{FILE}: 'learned_source.bias' is torch.float32 \[5\].*\[4\]"),
        ({"learned_source__bias": torch.ones(4).long()}, rf"{FILE}: 'learned_source.bias' is torch.int64"),
        ({"learned_source__bias": torch.full((4,), torch.nan)}, f"{FILE}: 'learned_source.bias'.*not finite"),
        ({"learned_source__weight": [1.0]}, f"{FILE}: 'learned_source.weight' is a list instead of a tensor"),
        ({"extra": torch.ones(1)}, f"{FILE}: nothing is known of 'extra'"),
    ],
)
def test_broken_weights(base, source, changes, message):
    change(source, **changes)
    refused(source, message)


def test_other_ranks_and_widths(base, source):
    torch.save(pyreft_layout.draw("direft", HIDDEN, 3)[1], source / FILE)
    refused(source, f"different ranks, 3 .*{FILE}.* and 4")
    shutil.rmtree(source)
    _, state = pyreft_layout.draw("loreft", HIDDEN // 2, 4)
    pyreft_layout.write(source, "loreft", {("block_output", 1, 0): state})
    refused(source, "block_output.* edits 16 features, but 'model.layers.1' .* has 32", positions="f2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"]},
            f"{FILE[:8]}.*'rotate_layer' is",
        ),
        (
            {"intervention_types": ["<class 'mine.NoreftIntervention'>"]},
            "config.json: 'intervention_types' holds .*mine",
        ),
        ({"intervention_types": ["<class 'pyreft.interventions.Other'>"]}, "config.json: 'intervention_types' holds"),
        ({"intervention_types": None}, "config.json: 'intervention_types' is None"),
        ({"representations": []}, r"config.json: 'representations' is \[\]"),
        ({"representations": [7]}, "config.json: 'representations' holds 7"),
        ({"representations": [[0, "block_output", "h.pos", 1]]}, "config.json: .*unit 'h.pos'"),
        ({"representations": [[0, "block_output", "pos", 2]]}, "config.json: .*'pos' x 2"),
        ({"representations": [[0, "head_query_output", "pos", 1]]}, "config.json: component 'head_query_output'"),
        ({"representations": [["a", "block_output", "pos", 1]]}, "config.json: layer 'a'"),
        ({"representations": [[0, "model.layers[0].mlp.input", "pos", 1]]}, "only the input of a block"),
        ({"representations": [[0, "model.blocks[0].output", "pos", 1]]}, "no input or output of a module"),
        ({"representations": [[0, "block_output", "pos", 1]]}, "config.json does not list .*bin"),
        ({"representations": [[n, "block_output", "pos", 1] for n in (0, 2, 0, 2, 1)]}, "layer_1.*is missing"),
    ],
)
def test_broken_configurations(base, source, changes, message):
    change(source, "config.json", **changes)
    refused(source, message, FileNotFoundError if "is missing" in message else ValueError)


def test_mixed_methods(base, source):
    names = [f"<class 'pyreft.interventions.{name}Intervention'>" for name in ("Direft", "Loreft", "Direft", "Direft")]
    change(source, "config.json", intervention_types=names)
    refused(source, r"mixes \['direft', 'loreft'\]")
    os.remove(source / "config.json")
    torch.save(pyreft_layout.draw("loreft", HIDDEN, 4)[1], source / FILE)
    refused(source, "keys of no method, or of different ones")


def test_components_on_different_layers(base, tmp_path):
    _, states = draw("loreft", layers=(0,))
    _, others = draw("loreft", component="mlp_output", layers=(2,))
    source = pyreft_layout.write(tmp_path / "source", "loreft", states | others)
    refused(source, "'block_output' of layer 0, 'mlp_output' of layer 2", positions="f2")


def test_a_component_beside_a_module(base, tmp_path):
    _, states = draw("loreft", layers=(0,))
    _, others = draw("loreft", component="model.layers[2].mlp.down_proj.output", layers=(2,))
    source = pyreft_layout.write(tmp_path / "source", "loreft", states | others)
    refused(source, "'block_output' of layer 0, 'model.layers.2.mlp.down_proj' of layer None", positions="f2")


def test_a_layer_that_the_model_does_not_have(base, tmp_path):
    source = pyreft_layout.write(tmp_path / "source", "loreft", draw("loreft", layers=(0, 7))[1])
    refused(source, "there is no layer 7", positions="f2")


@pytest.mark.parametrize(
    ("method", "other"), [("consreft", "lobireft"), ("lobireft", "consreft"), ("noreft", "nodireft")]
)
def test_a_trainer_folder_that_does_not_tell_the_method(base, tmp_path, method, other):
    source = pyreft_layout.write(tmp_path / "source", method, draw(method)[1], config=False)
    refused(source, "config.json.* alike.*--intervention", positions="f2")
    refused(source, "intervention='loreft', but the keys", positions="f2", intervention="loreft")
    tensors, _ = draw(method)
    for name in (method, other):
        convert(source, tmp_path / name, "f2", base_model=base, intervention=name)
        expected = by_loops(llama(), name, tensors, "f2")
        assert_same(apply(llama(), tmp_path / name), expected, logits(llama(), IDS))


def test_a_trainer_folder_with_names_of_another_model(base, tmp_path):
    _, states = draw("loreft", component="roberta.encoder.layer[0].output", layers=(0,))
    source = pyreft_layout.write(tmp_path / "source", "loreft", states, config=False)
    refused(source, r"intkey_comp_roberta.*one module of LlamaForCausalLM, but fits none", positions="f2")


def test_encoder_decoder_models_are_refused(tmp_path):
    source = pyreft_layout.write(tmp_path / "source", "loreft", draw("loreft")[1])
    model = ZOO["t5"].build()
    refused(source, "encoder.block.*decoder.block", positions="f2", base_model=model, task_type=None)


class Danger:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["REFT_TEST_TRACE"]),))


@pytest.mark.parametrize("name", [FILE, "pytorch_model.bin"])
def test_pickles_that_run_code_are_refused_and_not_run(base, source, tmp_path, monkeypatch, name):
    trace = tmp_path / "trace"
    monkeypatch.setenv("REFT_TEST_TRACE", str(trace))
    torch.save({"bias": Danger()}, source / name)
    refused(source, rf"{name} is refused: its pickle names __builtin__.getattr.*could run code")
    assert not trace.exists()
    torch.load(source / name, weights_only=False)
    assert trace.exists()


def test_broken_files(base, source):
    (source / FILE).write_bytes((source / FILE).read_bytes()[:500])
    refused(source, f"{FILE} .*broken")
    (source / FILE).write_bytes(b"")
    refused(source, f"{FILE} .*broken")
    os.remove(source / FILE)
    refused(source, f"{FILE} is missing", FileNotFoundError)
    torch.save([torch.ones(1)], source / FILE)
    refused(source, f"{FILE} holds a list instead of a dictionary")
    (source / "config.json").write_text("{")
    refused(source, "config.json is not JSON")


def test_folders_of_something_else(base, source, tmp_path, converted):
    refused(tmp_path / "nothing", "nothing is not a folder", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no adapter of pyreft.*it has nothing")
    refused(tmp_path / "base", "no adapter of pyreft.*it has config.json, .*model.safetensors")
    shutil.copytree(converted("loreft_shared"), tmp_path / "peft")
    refused(tmp_path / "peft", "no adapter of pyreft.*it has README.md, adapter_config.json")


def test_nothing_is_overwritten(base, source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    convert(source, target, "f2+l3", base_model=base)
    for place in (target, source / "config.json"):
        with pytest.raises(FileExistsError, match=place.name):
            convert(source, place, "f2+l3", base_model=base)


# The command line.


def test_command_line(tmp_path):
    kind = "loreft_shared"
    arguments = [
        PYREFT / kind / "ckpt",
        tmp_path / "out",
        "--positions",
        "f2+l2",
        "--share-weights",
        "--base-model",
        BASE,
    ]
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "peft_reft.convert", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"Saved {tmp_path / 'out'}\n"), result.stderr
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(BASE), tmp_path / "out")
    assert max(errors(model, kind, "single0").values()) < 1e-5


def test_command_line_options_reach_the_conversion(base, tmp_path, capsys):
    source = pyreft_layout.write(tmp_path / "source", "noreft", draw("noreft", 2)[1], config=False)
    options = [
        "--positions",
        "f2+l3",
        "--act-fn",
        "relu",
        "--dropout",
        "0.1",
        "--intervention",
        "noreft",
        "--task-type",
        "CAUSAL_LM",
    ]
    main([str(source), str(tmp_path / "out"), *options, "--base-model", str(tmp_path / "base")])
    config = ReftConfig.from_pretrained(tmp_path / "out")
    found = (config.positions, config.share_weights, config.act_fn, config.dropout, config.intervention)
    assert found == ("f2+l3", False, "relu", 0.1, "noreft")
    with pytest.raises(SystemExit) as stop:
        main([str(source), str(tmp_path / "out"), *options, "--base-model", str(tmp_path / "base")])
    assert stop.value.code == 1
    assert "is not an empty folder" in capsys.readouterr().err

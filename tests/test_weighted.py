"""`add_weighted_adapter`: the new adapter's edit is the weighted sum of the others', in loops."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from adapters import IDS, layers_of, logits, lora, reft, trainable
from peft import PeftModel, get_peft_model
from reference import gram_schmidt

from peft_reft.interventions import Scope

LOW_RANK = ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")
TWO = {"positions": "f1+l2", "share_weights": False}


def with_adapters(*settings: dict, base=None) -> PeftModel:
    """Adapters a, b, c ... with these settings, in float64."""
    model = get_peft_model(tiny.llama() if base is None else base, reft(**settings[0]), "a")
    for name, more in zip("bcdefg", settings[1:], strict=False):
        model.add_adapter(name, reft(**more))
    return model.double().eval()


def edit_by_loops(layer, name: str, h: torch.Tensor, unit: int) -> torch.Tensor:
    """The edit of one representation [d] by one adapter, from the equations of its method."""
    own = layer.reft_intervention[name]
    kind = type(own).__name__.removesuffix("Intervention").lower()
    if kind == "red":
        return (own.scale[unit] - 1) * h + own.bias[unit]
    projection, bias = own.projection[unit], own.bias[unit]
    rows = projection if kind in ("noreft", "nodireft") else gram_schmidt(projection)
    coordinates = layer.reft_settings[name].coordinates
    total = torch.zeros_like(h)
    for i in range(len(rows)):
        target = bias[i]
        if kind in ("loreft", "noreft", "direft", "nodireft"):
            target = target + own.weight[unit, i] @ h
        if kind in ("loreft", "noreft", "consreft"):
            target = target - rows[i] @ h
        if coordinates is None or coordinates[i]:
            total = total + target * rows[i]
    return total


@torch.no_grad()
def assert_sum(model, names, weights, new: str = "sum") -> None:
    """At every layer, for every unit: the edit of the new adapter is the weighted sum of the others'."""
    for layer in layers_of(model):
        own = layer.reft_intervention[new]
        units = len(own.bias)
        hidden = torch.randn(3, layer.out_features, dtype=torch.float64)
        for unit in range(units):
            gate = torch.eye(units, dtype=torch.float64)[unit].expand(3, -1)
            got = own(hidden, Scope(gate, strength=layer.reft_settings[new].strength))
            for h, edit in zip(hidden, got, strict=True):
                expected = sum(
                    weight * layer.reft_settings[name].strength * edit_by_loops(layer, name, h, unit)
                    for name, weight in zip(names, weights, strict=True)
                )
                torch.testing.assert_close(edit, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("second", LOW_RANK)
@pytest.mark.parametrize("first", ["loreft", "nodireft"])
@pytest.mark.filterwarnings("ignore:The subspaces of adapters")
def test_the_edit_is_the_weighted_sum(first, second):
    model = with_adapters(TWO | {"intervention": first}, TWO | {"intervention": second, "r": 2})
    model.set_strength("b", 0.4)
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum")
    assert model.peft_config["sum"].r == 6
    assert_sum(model, "ab", [0.5, -2.0])


@pytest.mark.filterwarnings("ignore:The subspaces of adapters")
def test_subspaces_that_are_switched_off_do_not_count():
    model = with_adapters({"subspaces": {"x": 1, "y": 3}}, {})
    model.set_subspaces("a", "y")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert model.peft_config["sum"].subspaces is None
    assert_sum(model, "ab", [1.0, 1.0])


def test_red():
    model = with_adapters(*[TWO | {"intervention": "red"}] * 3)
    model.set_strength("c", -0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(["a", "b", "c"], [1.0, 0.5, 2.0], "sum")
    assert model.peft_config["sum"].intervention == "red"
    assert_sum(model, "abc", [1.0, 0.5, 2.0])


def orthogonal(overlap: float = 0.0) -> PeftModel:
    """Two adapters on coordinates 0-3 and 4-7 of the hidden representation, except for the cosine `overlap`."""
    model = with_adapters({}, {})
    axes = torch.eye(tiny.HIDDEN)
    mine, theirs = axes[:4], axes[4:8].clone()
    theirs[0] = overlap * axes[0] + (1 - overlap**2) ** 0.5 * axes[4]
    for name, directions in (("a", mine), ("b", theirs)):
        model.set_directions(name, dict.fromkeys(range(tiny.LAYERS), directions))
        for layer in layers_of(model):
            torch.nn.init.normal_(layer.reft_intervention[name].weight)
            torch.nn.init.normal_(layer.reft_intervention[name].bias)
    return model


@torch.no_grad()
def test_orthogonal_subspaces_do_not_warn_and_each_gets_its_coordinates():
    """Each adapter's coordinates are what the adapter alone sets them to."""
    model = orthogonal()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert_sum(model, "ab", [1.0, 1.0])
    for layer in layers_of(model):
        hidden = torch.randn(5, tiny.HIDDEN, dtype=torch.float64)
        together, a, b = (hidden + layer.reft_intervention[name](hidden) for name in ("sum", "a", "b"))
        torch.testing.assert_close(together[:, :4], a[:, :4], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(together[:, 4:8], b[:, 4:8], rtol=1e-6, atol=1e-6)
        assert torch.equal(together[:, 8:], hidden[:, 8:])


@pytest.mark.parametrize("overlap", [0.25, 0.8])
def test_overlapping_subspaces_warn_with_the_cosine(overlap):
    with pytest.warns(UserWarning, match=rf"'a' and 'b' are not orthogonal: at 'model\.layers\.\d'.* {overlap:.3f}"):
        orthogonal(overlap).add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")


def test_one_adapter_with_weight_one_is_a_copy():
    model = with_adapters({"positions": "l2"})
    want = logits(model)
    model.add_weighted_adapter(["a"], [1.0], "copy")
    assert torch.equal(logits(model), want)
    model.set_adapter("copy")
    torch.testing.assert_close(logits(model), want, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The subspaces of adapters")
def test_inactive_and_frozen_at_first_as_with_lora():
    states = []
    for config, more in ((reft, {}), (lora, {"combination_type": "cat"})):
        model = get_peft_model(tiny.llama(), config(), "first")
        model.add_adapter("second", config())
        model.eval()
        before, names = logits(model), trainable(model)
        model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum", **more)
        assert torch.equal(logits(model), before)
        assert trainable(model) == names
        own = [p for n, p in model.named_parameters() if ".sum" in n]
        states.append((list(model.active_adapters), {p.requires_grad for p in own}))
        assert own
    assert states[0] == states[1] == (["first"], {False})


@pytest.mark.filterwarnings("ignore:The subspaces of adapters")
def test_saves_loads_and_trains(tmp_path):
    model = with_adapters({}, {}).float()
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "sum").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), logits(tiny.llama()))
    model.train()
    model(input_ids=IDS, labels=IDS.index_fill(1, torch.tensor([0, 1, 2]), -100)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if ".sum" in n)


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ([{}, {}], (["a", "b"], [1.0], "sum"), "One weight for each"),
        ([{}, {}], ([], [], "sum"), "One weight for each"),
        ([{}, {}], (["a", "b"], [1.0, 1.0], "b"), "There is an adapter 'b' already"),
        ([{}, {}], (["a", "nobody"], [1.0, 1.0], "sum"), "no ReFT adapter 'nobody'"),
        ([{}, {"positions": "l1"}], (["a", "b"], [1.0, 1.0], "sum"), "edit different tokens"),
        ([{}, {"share_weights": False}], (["a", "b"], [1.0, 1.0], "sum"), "edit different tokens"),
        ([{}, {"layers_to_transform": [0]}], (["a", "b"], [1.0, 1.0], "sum"), "different layers or modules"),
        ([{}, {"component": "mlp_output"}], (["a", "b"], [1.0, 1.0], "sum"), "different layers or modules"),
        ([{}, {"act_fn": "relu"}], (["a", "b"], [1.0, 1.0], "sum"), "'b' has act_fn='relu'"),
        ([{}, {"intervention": "red"}], (["a", "b"], [1.0, 1.0], "sum"), "'loreft' and 'red' have no common form"),
        ([{"r": 20}, {"r": 20}], (["a", "b"], [1.0, 1.0], "sum"), "r=40"),
    ],
)
def test_refused(settings, call, message):
    model = with_adapters(*settings)
    before = logits(model)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*call)
    assert sorted(model.peft_config) == ["a", "b"]
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), before)

"""Runs the worked example of CONTRIBUTING.md, unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from adapters import IDS, generated, logits, reft
from peft import PeftModel, get_peft_model
from reference import gram_schmidt

from peft_reft.interventions import INTERVENTIONS, Scope


@pytest.fixture
def example():
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"## Add an intervention.*?```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "CONTRIBUTING.md", "exec"), {"__name__": "contributing"})
    yield INTERVENTIONS["subspace_red"]
    del INTERVENTIONS["subspace_red"]


def test_its_values_and_gradients_equal_the_equation(example):
    intervention = example(24, 4, units=2, init_weights=False).double()
    hidden = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    units = [0, 1, 1, 0, 1]
    got = intervention(hidden, Scope(gate=torch.eye(2, dtype=torch.float64)[units]))
    expected = []
    for h, unit in zip(hidden, units, strict=True):
        rows = gram_schmidt(intervention.projection[unit])
        expected.append(rows.T @ (intervention.gain[unit] * (rows @ h) + intervention.bias[unit]))
    expected = torch.stack(expected)
    torch.testing.assert_close(got, expected)
    leaves = [hidden, *intervention.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_it_is_a_method_like_the_others(example, tmp_path):
    fresh = get_peft_model(tiny.llama(), reft(intervention="subspace_red", init_weights=True)).eval()
    base = logits(tiny.llama())
    assert torch.equal(logits(fresh), base)

    settings = {"intervention": "subspace_red", "positions": "all", "component": "mlp_output"}
    model = get_peft_model(tiny.llama(), reft(**settings)).eval()
    expected, tokens = logits(model), generated(model)
    assert not torch.allclose(expected, base, atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    mixed = loaded(input_ids=IDS, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], expected[0])
    torch.testing.assert_close(mixed[1], base[1])
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(generated(loaded), tokens)

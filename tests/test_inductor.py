"""Compiled by inductor, the default of `torch.compile`: the same edits as without compilation. Minutes; slow.

The ordinary suite compiles with backend="eager", which tests what the graphs hold; here the kernels run, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tiny
import torch
from adapters import reft
from peft import get_peft_model
from torch import nn
from transformers import CompileConfig

pytestmark = pytest.mark.slow

SPECS = ["f2+l2", "all", "completion"]
IDS = torch.arange(5, 23).reshape(2, 9)
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
PROMPTS = MASK.bool() & (torch.arange(9) < 6)
LABELS = torch.where(MASK.bool() & ~PROMPTS, IDS, -100)
# Kernels add up in another order; the model's numbers are around 1.
NOISE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(spec: str) -> nn.Module:
    return get_peft_model(tiny.llama(), reft(positions=spec)).base_model.model


def compiled(model: nn.Module) -> tuple[nn.Module, Callable]:
    """A copy of the model, and the copy compiled into one graph for all lengths."""
    twin = copy.deepcopy(model)
    return twin, torch.compile(twin, fullgraph=True, dynamic=True)


@pytest.mark.parametrize("spec", SPECS)
def test_forwards_of_any_length(spec):
    model = adapted(spec)
    _, call = compiled(model)
    for length in (9, 8, 7):
        inputs = {"input_ids": IDS[:, :length], "attention_mask": MASK[:, :length], "prompt_mask": PROMPTS[:, :length]}
        with torch.no_grad():
            expected, got = (each(**inputs, use_cache=False).logits for each in (model, call))
        real = MASK[:, :length].bool()
        torch.testing.assert_close(got[real], expected[real], **NOISE)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients(spec):
    model = adapted(spec).train()
    twin, call = compiled(model)
    for each in (model, call):
        each(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(twin.get_parameter(name).grad, gradient, **NOISE)


@pytest.mark.parametrize("spec", [*SPECS, "c2"])
def test_generate_with_a_static_cache(spec):
    model = adapted(spec)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True
    got = model.generate(**inputs, cache_implementation="static", compile_config=config)
    assert torch.equal(got, model.generate(**inputs))

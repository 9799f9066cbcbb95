"""Blocks that a model calls as `layer.forward(...)`, past their hooks: SqueezeBert's, features before tokens."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import tiny
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from adapters import layers_of
from peft import get_peft_model
from reference import edited
from torch import nn
from transformers import SqueezeBertConfig

from peft_reft import ReftConfig

IDS = torch.arange(3, 15).reshape(2, 6)
INPUTS, OUTPUTS, BOTH = ("block_input",), ("block_output",), ("block_output", "block_input")
COMPONENTS = pytest.mark.parametrize("components", [OUTPUTS, INPUTS, BOTH, BOTH[::-1]], ids=" ".join)


def squeezebert() -> nn.Module:
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 64, "embedding_size": 32}
    config = SqueezeBertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    return tiny.build(transformers.SqueezeBertModel, config)


def config(components: tuple[str, ...] = OUTPUTS, **settings) -> ReftConfig:
    settings = {"r": 2, "positions": "f1+l2", "init_weights": False} | settings
    return ReftConfig(component=list(components), **settings)


def adapted(base: nn.Module, components: tuple[str, ...] = OUTPUTS, **settings) -> nn.Module:
    return get_peft_model(base, config(components, **settings)).eval()


def output(model: nn.Module, **more) -> torch.Tensor:
    return model(IDS, **more).last_hidden_state


def by_hand(base: nn.Module, adapters: list[dict]) -> nn.Module:
    """A copy of `base` whose blocks edit token by token, with the parameters of adapters `(block, side) -> params`."""
    model = copy.deepcopy(base)
    for index, block in enumerate(model.encoder.layers):
        block.forward = _edited_forward(block.forward, index, adapters)
    return model


def _edited_forward(forward, index: int, adapters: list[dict]):
    def edit(hidden, side):
        for params in (adapter[index, side] for adapter in adapters if (index, side) in adapter):
            hidden = hidden.clone()
            for row, token in itertools.product(range(len(hidden)), (0, 4, 5)):
                hidden[row, :, token] = edited("loreft", hidden[row, :, token].clone(), params)
        return hidden

    def called(hidden, *others):
        found = forward(edit(hidden, "input"), *others)
        return found | {"feature_map": edit(found["feature_map"], "output")}

    return called


def params_of(model: nn.Module, adapter: str = "default") -> dict:
    """(Block, side) -> copies of an adapter's parameters there, of its one unit."""
    return {
        (layer.index, layer.side): {
            name: p[0].detach().clone().requires_grad_()
            for name, p in layer.reft_intervention[adapter].named_parameters()
        }
        for layer in layers_of(model)
    }


def assert_is_base(model: nn.Module, base: nn.Module) -> None:
    """`model` has nothing that `base`, which never had an adapter, lacks, and returns the same bits."""
    for module, other in zip(model.modules(), base.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert model.state_dict().keys() == base.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(output(model), output(base))


@COMPONENTS
def test_values_and_gradients_are_those_of_the_equation(components):
    base = squeezebert()
    model = adapted(base, components)
    params = params_of(model)
    expected = output(by_hand(squeezebert(), [params]))
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(expected)
    (output(model) * weights).sum().backward()
    (expected * weights).sum().backward()
    for layer in layers_of(model):
        for name, parameter in layer.reft_intervention["default"].named_parameters():
            wanted = params[layer.index, layer.side][name].grad
            assert wanted.any()
            torch.testing.assert_close(parameter.grad[0], wanted, rtol=1e-3, atol=1e-5)


@COMPONENTS
def test_unload_leaves_the_base_model(components):
    base = squeezebert()
    model = adapted(base, components)
    assert not torch.equal(output(model), output(squeezebert()))
    assert_is_base(model.unload(), squeezebert())


@torch.no_grad()
@COMPONENTS
def test_several_adapters_edit_in_turn_and_are_deleted_one_by_one(components):
    base = squeezebert()
    model = adapted(base, components)
    model.add_adapter("second", config(components))
    first, second = params_of(model), params_of(model, "second")
    for active, expected in {
        ("default",): [first],
        ("second",): [second],
        ("default", "second"): [first, second],
        ("second", "default"): [second, first],
    }.items():
        model.base_model.set_adapter(list(active))
        torch.testing.assert_close(output(model), output(by_hand(squeezebert(), expected)), rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("default")
    torch.testing.assert_close(output(model), output(by_hand(squeezebert(), [second])), rtol=1e-4, atol=1e-5)
    assert_is_base(model.unload(), squeezebert())


@torch.no_grad()
@COMPONENTS
def test_rows_of_a_batch_choose_their_adapters(components):
    model = adapted(squeezebert(), components)
    model.add_adapter("second", config(components))
    mixed = output(model, adapter_names=["second", "__base__"])
    expected = output(by_hand(squeezebert(), [params_of(model, "second")]))
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], output(squeezebert())[1])


@torch.no_grad()
@COMPONENTS
def test_a_disabled_adapter_does_nothing(components):
    model = adapted(squeezebert(), components)
    before = output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), output(squeezebert()))
    assert torch.equal(output(model), before)


@torch.no_grad()
@COMPONENTS
def test_a_copy_edits_on_its_own(components):
    model = adapted(squeezebert(), components)
    before = output(model)
    other = copy.deepcopy(model)
    assert torch.equal(output(other), before)
    for layer in layers_of(other):
        layer.reft_intervention["default"].bias.add_(1)
    assert not torch.equal(output(other), before)
    assert torch.equal(output(model), before)
    assert_is_base(other.unload(), squeezebert())
    assert torch.equal(output(model), before)
    assert_is_base(model.unload(), squeezebert())


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("travelled", [_pickled, _saved])
@COMPONENTS
def test_pickles_edit_as_the_model_did(components, travelled):
    model = adapted(squeezebert(), components)
    other = travelled(model)
    assert torch.equal(output(other), output(model))
    assert_is_base(other.unload(), squeezebert())
    assert not torch.equal(output(model), output(squeezebert()))


@torch.no_grad()
def test_what_no_weight_expresses_is_not_merged_and_stays():
    model = adapted(squeezebert(), BOTH, positions="all")
    before = output(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged exactly"):
            merge()
        assert torch.equal(output(model), before)
    assert_is_base(model.unload(), squeezebert())


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@COMPONENTS
def test_an_exception_in_a_block_leaves_the_next_pass_as_it_was(components, error):
    model = adapted(squeezebert(), components)
    before = output(model)

    def fail(module, args):
        raise error("stop")

    handle = model.get_base_model().encoder.layers[1].intermediate.register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        output(model)
    handle.remove()
    assert torch.equal(output(model), before)
    # Other sizes: nothing of the pass that was left is taken for this one's.
    shorter = model(IDS[:1, :4]).last_hidden_state
    assert torch.equal(shorter, model(IDS[:1, :4]).last_hidden_state)
    assert_is_base(model.unload(), squeezebert())


@torch.no_grad()
@pytest.mark.parametrize("wrapped", ["before", "after"])
def test_another_wrapper_around_a_block_stays_when_the_adapter_goes(wrapped):
    base, calls = squeezebert(), []

    def wrap():
        block = base.encoder.layers[0]
        inner = block.forward
        block.forward = lambda *args: calls.append(1) or inner(*args)

    if wrapped == "before":
        wrap()
    model = adapted(base, BOTH)
    if wrapped == "after":
        wrap()
    before = output(model)
    torch.testing.assert_close(before, output(by_hand(squeezebert(), [params_of(model)])), rtol=1e-4, atol=1e-5)
    back = model.unload()
    calls.clear()
    assert torch.equal(output(back), output(squeezebert()))
    assert calls == [1]
    # A new adapter edits once, whatever the old one left in the wrapper.
    again = adapted(base, BOTH)
    torch.testing.assert_close(output(again), output(by_hand(squeezebert(), [params_of(again)])), rtol=1e-4, atol=1e-5)
    assert torch.equal(output(again.unload()), output(squeezebert()))


def _hook(base: nn.Module) -> None:
    for block in base.encoder.layers:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def _unhook(base: nn.Module) -> None:
    for block in base.encoder.layers:
        remove_hook_from_module(block)


@torch.no_grad()
@pytest.mark.parametrize("hooked", ["before", "after"])
@pytest.mark.parametrize("unhooked", ["before", "after"])
def test_hooks_of_accelerate_come_and_go(hooked, unhooked):
    base = squeezebert()
    if hooked == "before":
        _hook(base)
    model = adapted(base, BOTH)
    expected = output(by_hand(squeezebert(), [params_of(model)]))
    if hooked == "after":
        _hook(base)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    if unhooked == "before":
        _unhook(base)
        torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    model.unload()
    assert torch.equal(output(base), output(squeezebert()))
    if unhooked == "after":
        _unhook(base)
        assert torch.equal(output(base), output(squeezebert()))
    assert not any(type(value).__module__.startswith("peft_reft") for m in base.modules() for value in vars(m).values())

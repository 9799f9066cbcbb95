"""Gradients of the steps with their own backward passes, and the tensors that an edit of all tokens keeps for it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny import llama

from peft_reft import ReftConfig
from peft_reft.autograd import add_low_rank
from peft_reft.edits import gather_rows

LINKS = {
    "identity": (None, 3),
    "gate": (lambda inner: inner * torch.linspace(0, 2, 5, dtype=inner.dtype)[:, None], 3),
    "activation": (lambda inner: torch.tanh(inner[..., :3]) - inner[..., 3:], 6),
}


def tensors(k: int, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = {"hidden": (2, 5, 7), "left": (3, 7), "right": (k, 7), "shift": (k,)}
    return {name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}


@pytest.mark.parametrize("keep_output", [True, False], ids=["result kept", "input kept"])
@pytest.mark.parametrize("right", [True, False], ids=["product", "constant"])
@pytest.mark.parametrize("elementwise", LINKS)
def test_gradients_equal_finite_differences(elementwise, right, keep_output):
    elementwise, k = LINKS[elementwise]
    given = tensors(k)
    if not right:
        given["right"] = None

    def call(*args):
        return add_low_rank(*args, elementwise, keep_output)

    assert torch.autograd.gradcheck(call, tuple(given.values()))


@pytest.mark.parametrize("keep_output", [True, False], ids=["result kept", "input kept"])
@pytest.mark.parametrize("frozen", ["hidden", "left", "right", "shift"])
def test_nothing_is_done_for_what_is_frozen(frozen, keep_output):
    given = tensors(3)
    given[frozen].requires_grad_(False)
    formula = given["hidden"] + (given["hidden"] @ given["right"].T + given["shift"]) @ given["left"]
    wanted = [t for t in given.values() if t.requires_grad]
    expected = torch.autograd.grad(formula.square().sum(), wanted)
    got = torch.autograd.grad(add_low_rank(*given.values(), None, keep_output).square().sum(), wanted)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("keep_output", [True, False], ids=["result kept", "input kept"])
def test_gradients_of_bfloat16_representations_are_computed_in_float32(keep_output):
    given = tensors(3, torch.float32)
    hidden = given.pop("hidden").detach().bfloat16().requires_grad_()
    # An edit no larger than what it edits, as the result that is kept has been rounded.
    given["left"] = (given["left"] / 10).detach().requires_grad_()
    result = add_low_rank(hidden, *given.values(), None, keep_output)
    assert result.dtype == torch.bfloat16
    precise = hidden.detach().float().requires_grad_()
    exact = precise + (precise @ given["right"].T + given["shift"]) @ given["left"]
    assert torch.equal(result, hidden + (exact - precise).bfloat16())
    cotangent = torch.randn_like(exact).bfloat16()
    expected = torch.autograd.grad(exact, [precise, *given.values()], cotangent.float())
    got = torch.autograd.grad(result, [hidden, *given.values()], cotangent)
    # A gradient in bfloat16 has been rounded, too.
    tolerances = (2**-8, 1e-6, 2**-8 if keep_output else 1e-6, 1e-6)
    for mine, theirs, tolerance in zip(got, expected, tolerances, strict=True):
        assert (mine.float() - theirs).norm() <= tolerance * theirs.norm()


def test_picked_rows_share_one_gradient():
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 1])

    def call(rows):
        whole, picked = gather_rows(rows * 2, index)
        return whole.index_add(0, index, picked.sin())

    assert torch.autograd.gradcheck(call, hidden)
    expected = (2 * hidden).index_add(0, index, (2 * hidden)[index].sin())
    assert torch.equal(call(hidden), expected)


def kept_bytes(model, shape) -> int:
    """Bytes of distinct tensors as large as hidden representations that a forward pass keeps for backward."""
    kept = {}

    def note(tensor):
        if tensor.numel() >= shape[0] * shape[1] * model.config.hidden_size:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % model.config.vocab_size
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), use_cache=False)
        loss = output.logits.logsumexp(-1).sum()
    result = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    loss.backward()
    return result


@pytest.mark.parametrize("intervention", ["loreft", "direft", "lobireft", "consreft"])
def test_an_edit_of_all_tokens_keeps_no_representation_for_the_backward_pass(intervention):
    shape = (2, 24)
    base = llama().requires_grad_(False).train()
    floor = kept_bytes(base, shape)
    one = 4 * shape[0] * shape[1] * base.config.hidden_size
    assert floor > base.config.num_hidden_layers * one
    config = ReftConfig(r=2, positions="all", intervention=intervention, init_weights=False)
    assert kept_bytes(get_peft_model(base, config).train(), shape) == floor


def test_a_hook_may_change_an_edited_output_in_place():
    model = get_peft_model(llama(), ReftConfig(r=2, positions="all", init_weights=False)).train()
    ids = torch.arange(12).reshape(1, 12)
    shift = torch.randn(model.config.hidden_size)
    blocks = model.get_base_model().model.layers

    def gradients(change):
        handles = [block.register_forward_hook(change) for block in blocks]
        model.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.logsumexp(-1).sum().backward()
        for handle in handles:
            handle.remove()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    in_place = gradients(lambda module, args, output: output.add_(shift))
    torch.testing.assert_close(in_place, gradients(lambda module, args, output: output + shift))

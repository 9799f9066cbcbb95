"""The whole model against equation 2 in loops, to the precision of the dtype."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from reference import edited_tokens, gradients
from routes import ROLES, make_pair, pad, probe, sequences
from tiny import LAYERS, ZOO, llama

from peft_reft import ReftConfig


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"])
@pytest.mark.parametrize("shared", [True, False])
def test_logits_and_parameter_gradients_equal_equation_2(shared, dtype, tolerance):
    # GPT-2 computes in its own dtype throughout; Llama normalizes in float32.
    sites = ("transformer.h.0", "transformer.h.2")
    pair = make_pair("f2+l3", shared, base=ZOO["gpt2"].build(), sites=sites, dtype=dtype)
    ids = sequences()
    batch = pad(ROLES, ids)
    logits = pair.peft(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits
    objective = expected_objective = 0.0
    for row, (role, tokens) in enumerate(zip(ROLES, ids, strict=True)):
        expected = pair.reference.logits(tokens, role)
        got = logits[row, batch.where[row]]
        assert relative_error(got, expected) < tolerance
        weights = probe(len(tokens), row, dtype)
        objective = objective + (got * weights).sum()
        expected_objective = expected_objective + (expected * weights).sum()
    objective.backward()
    for key, expected in gradients(pair.reference, expected_objective).items():
        assert relative_error(pair.gradients()[key], expected) < tolerance, key


@pytest.mark.parametrize("positions", ["f7+l7", "prompt", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
def test_a_fresh_adapter_leaves_the_logits_unchanged(dtype, positions):
    model = llama().to(dtype)
    ids = torch.tensor(sequences(("pppppppp",)))
    before = model(input_ids=ids).logits
    after = get_peft_model(model, ReftConfig(positions=positions, share_weights=False))(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("spec", ["f2+l3", "l1", "prompt", "completion", "c2", "all"])
def test_a_random_adapter_changes_the_specified_tokens_of_its_first_layer_and_nothing_before(spec, layer):
    config = ReftConfig(r=2, positions=spec, layers_to_transform=[layer], init_weights=False)
    model = get_peft_model(llama(), config)
    roles = "pppppppcccc"
    ids = torch.tensor(sequences((roles,)))
    labels = ids.masked_fill(torch.tensor([[role == "p" for role in roles]]), -100)

    def hidden_states():
        seen = []
        hooks = [
            block.register_forward_hook(lambda module, args, output: seen.append(output))
            for block in model.get_base_model().model.layers
        ]
        model(input_ids=ids, labels=labels)
        for hook in hooks:
            hook.remove()
        return seen

    edited = hidden_states()
    with model.disable_adapter():
        base = hidden_states()
    for earlier in range(layer):
        assert torch.equal(edited[earlier], base[earlier])
    changed = (edited[layer] != base[layer]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == sorted(edited_tokens(spec, roles))

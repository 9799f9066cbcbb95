"""The maths against the paper's equation in loops: values, gradients, orthonormality, initialization."""

from __future__ import annotations

import pytest
import torch
from reference import edited, gram_schmidt

from peft_reft.autograd import orthonormal_rows
from peft_reft.interventions import INTERVENTIONS, Intervention, LoreftIntervention, Scope

FEATURES, RANK = 24, 4


def make(
    units: int = 1, dtype: torch.dtype = torch.float64, method: str = "loreft", rank: int = RANK, **options
) -> Intervention:
    return INTERVENTIONS[method](FEATURES, rank, units=units, **{"init_weights": False, **options}).to(dtype)


def by_loops(
    intervention: Intervention, hidden: torch.Tensor, units: list[int | None], method: str = "loreft", act=None
) -> torch.Tensor:
    rows = []
    for h, unit in zip(hidden, units, strict=True):
        if unit is not None:
            params = {name: parameter[unit].to(h.dtype) for name, parameter in intervention.named_parameters()}
            h = edited(method, h, params, *([act] if act else []))
        rows.append(h)
    return torch.stack(rows)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def assert_equal_to_loops(method, units, dtype, tolerance, act_fn=None, parameters: torch.dtype | None = None):
    """Values, and gradients of the representations and of every parameter (kept in `parameters`, or in `dtype`)."""
    intervention = make(units, parameters or dtype, method, act_fn=act_fn)
    hidden = torch.randn(7, FEATURES, dtype=dtype, requires_grad=True)
    chosen = [None if i == 3 else i % units for i in range(7)]
    gate = torch.tensor([[float(unit == u) for u in range(units)] for unit in chosen], dtype=dtype)
    got = hidden + intervention(hidden, Scope(gate))
    expected = by_loops(intervention, hidden, chosen, method, ACTIVATIONS[act_fn])
    assert relative_error(got, expected) < tolerance

    probe = torch.randn_like(got)
    leaves = [hidden, *intervention.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((got * probe).sum(), leaves),
        torch.autograd.grad((expected * probe).sum(), leaves),
        strict=True,
    ):
        assert relative_error(mine, theirs) < tolerance


ACTIVATIONS = {None: None, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh, "linear": None}
PRECISIONS = {"f32": (torch.float32, 1e-5), "f64": (torch.float64, 1e-10)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("method", INTERVENTIONS)
def test_values_and_gradients_equal_the_equation(method, units, precision):
    dtype, tolerance = PRECISIONS[precision]
    assert_equal_to_loops(method, units, dtype, tolerance)


@pytest.mark.parametrize("act_fn", ["relu", "gelu", "tanh", "linear"])
@pytest.mark.parametrize("method", ["loreft", "noreft", "direft", "nodireft"])
def test_values_and_gradients_with_an_activation_on_the_learned_projection(method, act_fn):
    assert_equal_to_loops(method, 2, torch.float64, 1e-10, act_fn)


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_bfloat16_parameters_are_used_in_the_precision_of_the_edit(method):
    # Gradients of the parameters are rounded to bfloat16 on both sides.
    assert_equal_to_loops(method, 2, torch.float32, 8e-3, parameters=torch.bfloat16)
    intervention = make(2, torch.bfloat16, method)
    hidden = torch.randn(5, FEATURES)
    gate = torch.eye(2)[[0, 1, 0, 1, 1]]
    expected = by_loops(intervention, hidden, [0, 1, 0, 1, 1], method)
    assert relative_error(hidden + intervention(hidden, Scope(gate)), expected) < 1e-5


@pytest.mark.parametrize("method", INTERVENTIONS)
@pytest.mark.parametrize("strength", [0.5, -2.0])
def test_the_strength_scales_the_edit(method, strength):
    intervention = make(method=method)
    hidden = torch.randn(5, FEATURES, dtype=torch.float64)
    expected = strength * (by_loops(intervention, hidden, [0] * 5, method) - hidden)
    torch.testing.assert_close(intervention(hidden, Scope(strength=strength)), expected)


@pytest.mark.parametrize("act_fn", [None, "relu"])
@pytest.mark.parametrize("method", ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft"])
def test_switched_off_coordinates_are_not_edited(method, act_fn):
    if act_fn and not INTERVENTIONS[method].takes_act_fn:
        act_fn = None
    intervention = make(2, method=method, act_fn=act_fn)
    hidden = torch.randn(4, FEATURES, dtype=torch.float64)
    units = [0, 1, 1, 0]
    gate = torch.eye(2, dtype=torch.float64)[units]
    on = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    whole = by_loops(intervention, hidden, units, method, ACTIVATIONS[act_fn]) - hidden
    # The coordinates of the whole edit along each direction, those that are on put together again.
    for h, unit, got, edit in zip(hidden, units, intervention(hidden, Scope(gate, on)), whole, strict=True):
        projection = intervention.projection[unit]
        rows = projection if method.startswith("no") else gram_schmidt(projection)
        coordinates = torch.linalg.lstsq(rows.T, edit).solution
        torch.testing.assert_close(got, (coordinates * on) @ rows, msg=lambda m, h=h: f"{m}\n{h}")


def test_each_row_has_coordinates_of_its_own():
    intervention = make()
    hidden = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    on = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    got = intervention(hidden, Scope(coordinates=on[:, None]))
    for row in range(2):
        torch.testing.assert_close(got[row], intervention(hidden[row], Scope(coordinates=on[row])))


def test_rows_that_no_representation_uses_are_not_trained():
    intervention = make()
    hidden = torch.randn(5, FEATURES, dtype=torch.float64)
    on = torch.tensor([0.0, 0, 1, 1], dtype=torch.float64)
    intervention(hidden, Scope(coordinates=on)).square().sum().backward()
    for parameter in intervention.parameters():
        assert not parameter.grad[:, :2].any()
        assert parameter.grad[:, 2:].any()


def test_without_a_gate_the_only_unit_edits_everything():
    intervention = make()
    hidden = torch.randn(2, 5, FEATURES, dtype=torch.float64)
    expected = by_loops(intervention, hidden.flatten(0, 1), [0] * 10).view_as(hidden)
    torch.testing.assert_close(hidden + intervention(hidden), expected)


def test_gradcheck():
    intervention = make(2)
    hidden = torch.randn(3, FEATURES, dtype=torch.float64, requires_grad=True)
    gate = torch.eye(2, dtype=torch.float64)[[0, 1, 1]]
    parameters = list(intervention.parameters())

    def edit(hidden, *_):
        return intervention(hidden, Scope(gate))

    assert torch.autograd.gradcheck(edit, (hidden, *parameters))


@pytest.mark.parametrize("method", sorted(set(INTERVENTIONS) - {"consreft"}))
def test_a_fresh_intervention_is_the_identity_exactly(method):
    intervention = INTERVENTIONS[method](FEATURES, RANK, units=2)
    hidden = 100 * torch.randn(9, FEATURES)
    assert torch.equal(hidden + intervention(hidden, Scope(gate=torch.ones(9, 2))), hidden)


def test_a_fresh_constant_takes_the_subspace_out():
    intervention = INTERVENTIONS["consreft"](FEATURES, RANK)
    hidden = torch.randn(9, FEATURES)
    new = hidden + intervention(hidden)
    rows = gram_schmidt(intervention.projection[0])
    torch.testing.assert_close(new @ rows.T, torch.zeros(9, RANK), atol=1e-5, rtol=0)
    torch.testing.assert_close(new, hidden - hidden @ rows.T @ rows, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_a_fresh_intervention_can_learn(method):
    intervention = INTERVENTIONS[method](FEATURES, RANK)
    (torch.randn(9, FEATURES) + intervention(torch.randn(9, FEATURES))).square().sum().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in intervention.parameters())


def test_pyreft_initialization_draws_w_and_b_as_nn_linear_does():
    torch.manual_seed(0)
    intervention = LoreftIntervention(400, 8, units=5, init_weights="pyreft")
    linear = torch.nn.Linear(400, 4000)
    for mine, theirs in ((intervention.weight, linear.weight), (intervention.bias, linear.bias)):
        assert mine.abs().max() <= theirs.abs().max() * 1.01
        assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.15)
    rows = intervention.subspace()
    hidden = torch.randn(512, 400)
    jump = (
        intervention(hidden, Scope(gate=torch.eye(5)[torch.arange(512) % 5])).norm(dim=-1) / hidden.norm(dim=-1)
    ).mean()
    # Replacing r of d dimensions by something small moves h by about sqrt(r / d).
    assert jump.item() == pytest.approx((8 / 400) ** 0.5, rel=0.25)
    assert rows.shape == (5, 8, 400)


def test_dropout_drops_entries_of_the_edited_representation():
    intervention = make(dropout=0.5).train()
    hidden = torch.randn(1000, FEATURES, dtype=torch.float64)
    new = hidden + intervention(hidden)
    undropped = hidden + intervention.eval()(hidden)
    kept = new.abs() > 1e-9
    assert kept.double().mean().item() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(new[kept], 2 * undropped[kept])


def test_dropout_leaves_tokens_alone_that_no_unit_edits():
    intervention = make(dropout=0.5).train()
    hidden = torch.randn(6, FEATURES, dtype=torch.float64)
    gate = torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64)[:, None]
    edit = intervention(hidden, Scope(gate))
    assert not edit[gate[:, 0] == 0].any()
    assert edit[gate[:, 0] == 1].any()


# Orthonormality


def orthonormality(rows: torch.Tensor) -> float:
    rows = rows.double()
    return (rows @ rows.mT - torch.eye(rows.shape[-2], dtype=torch.float64)).abs().max().item()


STARTS = {
    "random": lambda rows: rows,
    "tiny": lambda rows: 1e-12 * rows,
    "huge": lambda rows: 1e12 * rows,
    "rows of very different size": lambda rows: rows * torch.logspace(-6, 6, rows.shape[-2])[:, None],
    "rows nearly parallel": lambda rows: rows[..., :1, :] + 1e-3 * rows,
}


@pytest.mark.parametrize("start", STARTS)
def test_rows_are_orthonormal_and_span_the_same_space(start):
    rows = STARTS[start](torch.randn(2, 8, 512))
    made = orthonormal_rows(rows)
    assert orthonormality(made) < 1e-6
    for unit in range(2):
        expected = gram_schmidt(rows[unit].double())
        torch.testing.assert_close(made[unit].double(), gram_schmidt(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rows_stay_orthonormal_in_training(weight_decay):
    intervention = LoreftIntervention(64, 4)
    optimizer = torch.optim.AdamW(intervention.parameters(), lr=4e-3, weight_decay=weight_decay)
    hidden, target = torch.randn(128, 64), torch.randn(128, 64)
    losses = []
    for _ in range(300):
        loss = (hidden + intervention(hidden) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert orthonormality(intervention.subspace()) < 1e-6
    # The subspace of the best constant edit explains part of the target, so there is something to learn.
    assert losses[-1] < 0.97 * losses[0]


def test_low_precision_parameters_still_give_orthonormal_rows():
    intervention = make(dtype=torch.bfloat16)
    assert orthonormality(intervention.subspace()) < 1e-6


# What is kept while parameters do not change


def counted(monkeypatch) -> list[int]:
    calls = []
    original = orthonormal_rows
    monkeypatch.setattr("peft_reft.interventions.orthonormal_rows", lambda m: calls.append(1) or original(m))
    return calls


@torch.no_grad()
def test_the_rows_are_computed_once_for_as_long_as_they_are_kept(monkeypatch):
    intervention = make().eval()
    calls = counted(monkeypatch)
    first, second = {}, {}
    for expected, kept in ((1, first), (1, first), (2, second), (3, None), (4, None)):
        intervention(torch.randn(2, FEATURES, dtype=torch.float64), kept=kept)
        assert len(calls) == expected


@torch.no_grad()
def test_a_changed_parameter_is_noticed_where_nothing_is_kept():
    intervention = make().eval()
    intervention.subspace(torch.float64)
    intervention.projection.data.copy_(torch.randn_like(intervention.projection))
    expected = gram_schmidt(intervention.projection[0])
    torch.testing.assert_close(intervention.subspace(torch.float64)[0], expected)


def test_gradients_flow_past_what_is_kept():
    intervention, kept = make(), {}
    with torch.no_grad():
        intervention(torch.randn(2, FEATURES, dtype=torch.float64), kept=kept)
    intervention(torch.randn(2, FEATURES, dtype=torch.float64), kept=kept).sum().backward()
    assert intervention.projection.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("frozen", [True, False])
def test_writes_behind_the_back_of_autograd_are_seen(frozen):
    intervention = make().eval().requires_grad_(not frozen)
    hidden = torch.randn(2, FEATURES, dtype=torch.float64)
    intervention(hidden)
    for parameter in intervention.parameters():
        # As TRL keeps its reference model in step with the trained one.
        parameter.data.mul_(0.5).add_(torch.randn_like(parameter))
        torch.testing.assert_close(hidden + intervention(hidden), by_loops(intervention, hidden, [0, 0]))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_no_representations_at_all(strength):
    hidden = torch.randn(0, FEATURES, dtype=torch.float64)
    assert make().apply_to(hidden, Scope(strength=strength)).shape == hidden.shape


def test_a_backward_pass_under_autocast_is_as_precise_as_without():
    intervention = make().float()
    hidden = torch.randn(5, FEATURES)
    expected = torch.autograd.grad(intervention.apply_to(hidden).square().sum(), list(intervention.parameters()))
    total = intervention.apply_to(hidden).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(total, list(intervention.parameters()))
    assert all(map(torch.equal, got, expected))


def test_a_step_turns_the_subspace_as_far_as_in_pyreft():
    rank, features, rate = 4, 64, 1e-3
    intervention = INTERVENTIONS["loreft"](features, rank)
    theirs = torch.nn.Linear(rank, features, bias=False)
    with torch.no_grad():
        theirs.weight.copy_(intervention.subspace()[0].T)
    # As pyreft does.
    theirs = torch.nn.utils.parametrizations.orthogonal(theirs)
    start, cotangent = theirs.weight.detach().clone(), torch.randn(features, rank)

    def turned(rows, parameters) -> torch.Tensor:
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        (rows() * cotangent).sum().backward()
        optimizer.step()
        return (rows().detach() - start).norm()

    mine = turned(lambda: intervention.subspace()[0].T, [intervention.projection])
    torch.testing.assert_close(mine, turned(lambda: theirs.weight, theirs.parameters()), rtol=0.05, atol=0)


def test_an_intervention_keeps_nothing_itself():
    intervention = make().eval()
    before = intervention.__dict__.keys() | intervention.state_dict().keys()
    with torch.no_grad():
        intervention(torch.randn(2, FEATURES, dtype=torch.float64), kept={})
    assert intervention.__dict__.keys() | intervention.state_dict().keys() == before


def test_inference_mode_parameters_work():
    with torch.inference_mode():
        intervention = make().eval()
        hidden = torch.randn(2, FEATURES, dtype=torch.float64)
        torch.testing.assert_close(hidden + intervention(hidden), by_loops(intervention, hidden, [0, 0]))

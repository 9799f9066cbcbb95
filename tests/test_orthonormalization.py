"""Orthonormal rows against numpy's QR in float64: a whole training run, and rows that are almost dependent."""

import numpy as np
import pytest
import torch

from peft_reft.autograd import orthonormal_rows
from peft_reft.interventions import LoreftIntervention


def gram_schmidt(rows: np.ndarray) -> np.ndarray:
    """By Householder reflections, with the signs that Gram-Schmidt gives."""
    columns, triangle = np.linalg.qr(rows.T)
    return (columns * np.sign(np.diag(triangle))).T


def error(rows: torch.Tensor) -> float:
    made = rows.detach().double().numpy()[0]
    return np.abs(made @ made.T - np.eye(len(made))).max()


def nearly_parallel(condition: float) -> torch.Tensor:
    """Rows whose condition number is about that: the length of their sum over that of their differences."""
    noise, common = torch.randn(1, 8, 512), torch.randn(512)
    rows = common + noise * 8**0.5 / condition
    assert condition / 2 < np.linalg.cond(rows.double().numpy()[0]) < 2 * condition
    return rows


BAD_STARTS = {
    "condition 1e2": lambda: nearly_parallel(1e2),
    "condition 1e4": lambda: nearly_parallel(1e4),
    "lengths from 1e-12 to 1e12": lambda: torch.randn(1, 8, 512) * torch.logspace(-12, 12, 8)[:, None],
    "one row of length 1e-30": lambda: torch.randn(1, 8, 512) * torch.tensor([1.0] * 5 + [1e-30, 1, 1])[:, None],
    "all rows of length 1e-30": lambda: 1e-30 * torch.randn(1, 8, 512),
}


@pytest.mark.parametrize("start", BAD_STARTS)
def test_bad_starts_give_orthonormal_rows_and_the_right_gradient(start):
    torch.manual_seed(0)
    rows = BAD_STARTS[start]().requires_grad_()
    made = orthonormal_rows(rows)
    assert error(made) < 1e-6
    x = rows.detach().double().numpy()[0]
    np.testing.assert_allclose(made.detach().numpy()[0], gram_schmidt(x), atol=1e-6)

    weights = torch.randn_like(rows)
    (gradient,) = torch.autograd.grad((made * weights).sum(), rows)
    gradient = gradient.double().numpy()[0]
    weights = weights.double().numpy()[0]
    for number, own in enumerate(gradient):
        # A row is moved by a part of what is left of it after the rows before it.
        left_over = np.abs(np.linalg.qr(x[: number + 1].T)[1][-1, -1])
        direction = own / np.linalg.norm(own) + np.random.default_rng(number).normal(size=512) / 512**0.5
        step = np.zeros_like(x)
        step[number] = 1e-5 * left_over * direction
        up, down = ((weights * gram_schmidt(x + sign * step)).sum() for sign in (1, -1))
        assert (up - down) / 2 == pytest.approx((gradient * step).sum(), rel=1e-3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_rows_stay_orthonormal_for_1000_steps_of_the_papers_learning_rate(weight_decay):
    torch.manual_seed(0)
    intervention = LoreftIntervention(512, 8)
    before = intervention.subspace().detach().clone()
    optimizer = torch.optim.AdamW(intervention.parameters(), lr=4e-3, weight_decay=weight_decay)
    hidden, target = torch.randn(2, 64, 512)
    errors = []
    for step in range(1000):
        loss = (hidden + intervention(hidden) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            errors.append(error(intervention.subspace()))
    assert max(errors) < 1e-6
    # They moved far: the new rows keep less than half of their length in the old subspace.
    assert (intervention.subspace() @ before.mT).norm() < 0.5 * 8**0.5


# Rows that are nearly, or exactly, dependent. Without looking at pivots is how it is done on a GPU and in a graph.


@pytest.fixture(params=["looking at pivots", "without looking"])
def way(request, monkeypatch):
    if request.param == "without looking":
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)


def draw(rank: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, features, dtype=torch.float64), torch.randn(features, dtype=torch.float64)


DEPENDENT = {
    "all zero": lambda rows, common: 0 * rows,
    "the first zero": lambda rows, common: torch.cat([0 * rows[:1], rows[1:]]),
    "the last zero": lambda rows, common: torch.cat([rows[:-1], 0 * rows[:1]]),
    "all equal": lambda rows, common: common.expand_as(rows),
    "all of one direction": lambda rows, common: torch.outer(10.0 ** rows[:, 0], common),
    "all ones": lambda rows, common: torch.ones_like(rows),
    "basis vectors, half of them zero": lambda rows, common: (
        torch.eye(rows.shape[1])[: len(rows)].double().flip(0) * (torch.arange(len(rows)) % 2)[:, None]
    ),
    "the last the sum of the others": lambda rows, common: torch.cat([rows[:-1], rows[:-1].sum(0, keepdim=True)]),
    "sums of half of them": lambda rows, common: (
        torch.randint(-1, 2, (len(rows), len(rows) // 2 + 1)).double() @ rows[: len(rows) // 2 + 1]
    ),
    "equal but for some entries": lambda rows, common: torch.where(torch.rand_like(rows) < 0.1, rows, common),
    **{
        f"{epsilon} apart": lambda rows, common, epsilon=epsilon: common + epsilon * rows
        for epsilon in (1e-3, 1e-4, 1e-5, 1e-6, 3e-7, 1e-7, 1e-8, 1e-10, 1e-15)
    },
}
SHAPES = [(1, 4), (2, 2), (2, 64), (4, 4), (8, 576), (32, 64), (8, 4096)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DEPENDENT)
def test_dependent_rows_give_orthonormal_ones_and_finite_gradients(kind, dtype):
    for rank, features in SHAPES:
        torch.manual_seed(rank)
        rows = DEPENDENT[kind](*draw(rank, features)).to(dtype)[None].requires_grad_()
        # Parameters in bfloat16 are orthonormalized in the precision of the edit.
        made = orthonormal_rows(rows if dtype != torch.bfloat16 else rows.float())
        assert error(made) < 1e-6, (rank, features)
        (gradient,) = torch.autograd.grad((made * torch.randn_like(made)).sum(), rows)
        assert gradient.isfinite().all(), (rank, features)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("epsilon", [1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("shape", [(2, 64), (8, 576), (8, 4096)])
def test_rows_apart_by_a_millionth_keep_their_directions(epsilon, shape):
    torch.manual_seed(0)
    rows, common = draw(*shape)
    x = common + epsilon * rows
    made = orthonormal_rows(x[None])[0]
    expected = gram_schmidt(x.numpy())
    # A part of 1e-16 of the rows is rounding, and that much more of what is left of them.
    np.testing.assert_allclose(made.numpy(), expected, atol=1e-13 / epsilon)


@pytest.mark.usefixtures("way")
def test_a_row_without_a_direction_is_completed_and_the_others_stay():
    torch.manual_seed(0)
    rows, _ = draw(4, 64)
    x = torch.stack([rows[0], rows[1], rows[0] - rows[1], 0 * rows[0]])[None].requires_grad_()
    made = orthonormal_rows(x)
    np.testing.assert_allclose(made[0, :2].detach().numpy(), gram_schmidt(rows[:2].numpy()), atol=1e-12)
    (gradient,) = torch.autograd.grad((made * torch.randn_like(made)).sum(), x)
    assert not gradient[0, 2:].any()
    assert gradient[0, :2].any(-1).all()
    # Whatever the rows span is still spanned.
    outside = x - x @ made.mT @ made
    assert outside.abs().max() < 1e-6


@pytest.mark.usefixtures("way")
def test_one_dependent_matrix_does_not_touch_the_others_of_a_batch():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 64)
    alone = orthonormal_rows(x[[0, 2]])
    x[1, 3] = x[1, 0]
    torch.testing.assert_close(orthonormal_rows(x)[[0, 2]], alone, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("accident", ["equal", "zero", "nearly equal"])
def test_training_goes_on_from_rows_that_become_dependent(accident, optimizer):
    torch.manual_seed(0)
    intervention = LoreftIntervention(64, 4)
    steps = optimizer(intervention.parameters(), lr=1e-3)
    hidden, target = torch.randn(2, 32, 64)
    losses = []
    for step in range(40):
        if step == 10:
            with torch.no_grad():
                row = {"equal": 1.0, "zero": 0.0, "nearly equal": 1 + 1e-6}[accident] * intervention.projection[0, 0]
                intervention.projection[0, 2] = row
        loss = (hidden + intervention(hidden) - target).square().mean()
        steps.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(intervention.parameters(), 1.0)
        steps.step()
        losses.append(loss.item())
        assert error(intervention.subspace()) < 1e-6
        assert all(parameter.isfinite().all() for parameter in intervention.parameters())
    assert losses[-1] < losses[11]

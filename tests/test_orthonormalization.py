"""Orthonormal rows against numpy's QR in float64: a whole training run, and rows that are almost dependent."""

import numpy as np
import pytest
import torch

from peft_reft.interventions import LoreftIntervention, orthonormal_rows


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

"""Differentiable steps with their own backward passes, which keep fewer tensors or take fewer operations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# [..., k] -> [..., k'], elementwise or a choice of columns
Elementwise = Callable[[torch.Tensor], torch.Tensor]

# One Cholesky pass gives rows that are orthonormal to float32's precision if each row keeps this fraction of its length
# after the projection onto the rows before it is removed.
_CLEAR = 3e-4


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context in which operations keep the dtypes of their arguments."""
    # Entering the context takes longer than checking whether it is needed.
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def add_low_rank(
    hidden: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor | None,
    shift: torch.Tensor,
    elementwise: Elementwise | None,
    keep_output: bool,
) -> torch.Tensor:
    """`hidden + elementwise(hidden @ right.T + shift) @ left`.

    The gradients need the hidden representations before or after the edit. If the next operation keeps the result for
    its own gradients anyway, like the norm at the start of a block, keeping the result costs no memory.

    Args:
        hidden: `[..., d]`, any floating point dtype.
        left: `[k', d]`, in the dtype to compute in.
        right: `[k, d]`, or None for zero.
        shift: `[k]`.
        elementwise: None for the identity.
        keep_output: whether to keep the result for the backward pass, rather than `hidden`.

    Returns:
        `[..., d]`, dtype of `hidden`.
    """
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, left, right, shift)
    )
    # A trace cannot record what the step uses besides its tensor arguments.
    if wants_grad and not torch.jit.is_tracing():
        return _AddLowRank.apply(hidden, left, right, shift, elementwise, keep_output)
    return _add_low_rank(hidden, left, right, shift, elementwise)[0]


def _add_low_rank(
    hidden: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor | None,
    shift: torch.Tensor,
    elementwise: Elementwise | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result; `hidden @ right.T + shift` `[n, k]`; and `elementwise` of that, `[n, k']`; for the `n` rows."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    precise = rows.to(left.dtype)
    inner = shift.expand(len(rows), -1) if right is None else torch.addmm(shift, precise, right.mT)
    target = inner if elementwise is None else _applied(elementwise, inner, hidden)
    edited = torch.addmm(rows, target, left) if precise is rows else rows + (target @ left).to(rows.dtype)
    return torch.ops.aten._unsafe_view(edited, hidden.shape), inner, target


def _applied(elementwise: Elementwise, inner: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return elementwise(inner.view(*hidden.shape[:-1], inner.shape[-1])).flatten(0, -2)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor | None,
        shift: torch.Tensor,
        elementwise: Elementwise | None,
        keep_output: bool,
    ) -> torch.Tensor:
        edited, inner, target = _add_low_rank(hidden, left, right, shift, elementwise)
        ctx.elementwise, ctx.keep_output = elementwise, keep_output
        _, wants_left, wants_right, *_ = ctx.needs_input_grad
        kept = (edited if keep_output else hidden) if wants_right else None
        needs_target = wants_left or (wants_right and keep_output)
        ctx.save_for_backward(
            kept, left, right, None if elementwise is None else inner, target if needs_target else None
        )
        return edited

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, left, right, inner, target = ctx.saved_tensors
        wants_hidden, wants_left, wants_right, wants_shift, *_ = ctx.needs_input_grad
        with no_autocast(grad.device.type):
            rows = grad.reshape(-1, grad.shape[-1]).to(left.dtype)
            grad_left = target.mT @ rows if wants_left else None
            grad_inner = rows @ left.mT
            if ctx.elementwise is not None:
                grad_inner = _grad_applied(ctx.elementwise, inner, grad, grad_inner)
            grad_right = None
            if wants_right:
                grad_right = grad_inner.mT @ kept.reshape(-1, kept.shape[-1]).to(left.dtype)
                if ctx.keep_output:
                    # The kept tensor is the sum of `hidden` and the edit.
                    grad_right = torch.addmm(grad_right, grad_inner.mT @ target, left, alpha=-1)
            grad_hidden = grad
            if right is not None and wants_hidden:
                same = rows.dtype == grad.dtype
                sum_ = torch.addmm(rows, grad_inner, right) if same else rows.addmm_(grad_inner, right)
                grad_hidden = sum_.view(grad.shape).to(grad.dtype)
            grad_shift = grad_inner.sum(0) if wants_shift else None
        return grad_hidden if wants_hidden else None, grad_left, grad_right, grad_shift, None, None


def _grad_applied(
    elementwise: Elementwise, inner: torch.Tensor, grad: torch.Tensor, grad_target: torch.Tensor
) -> torch.Tensor:
    with torch.enable_grad():
        inner = inner.detach().requires_grad_()
        (grad_inner,) = torch.autograd.grad(_applied(elementwise, inner, grad), inner, grad_target)
    return grad_inner


def orthonormal_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt on the rows of each matrix, first row first, by a Cholesky factor of their Gram matrix.

    A row has no direction of its own if it is zero, or if about 1e-7 of its length or less remains after the projection
    onto the rows before it is removed. It becomes an arbitrary row orthogonal to the others, and its gradient is zero.

    Args:
        matrix: floating point, finite, `[..., r, d]` with `r <= d`.

    Returns:
        `[..., r, d]`, orthonormal rows whose span contains the span of `matrix`, same dtype as `matrix`.
    """
    if torch.jit.is_tracing():
        return _gram_schmidt_twice(matrix.double())[0].to(matrix.dtype)
    return _GramSchmidt.apply(matrix)[0]


class _GramSchmidt(torch.autograd.Function):
    """`X` -> the orthonormal rows `R` and the lower triangle `L` with `X = L R`, which are kept for the backward pass.

    With `G` the gradient of `R`, and `S` the symmetric matrix that has the lower triangle of `G R^T`, the gradient of
    `X` is `L^-T (G - S R)`: 7 operations where automatic differentiation takes 28.
    """

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The Gram matrix squares the condition number, which float64 absorbs. MPS lacks float64, but shares the CPU's
        # memory.
        there = "cpu" if matrix.device.type == "mps" else matrix.device
        wide = matrix.to(there).double()
        rows, triangle = (made.to(matrix.dtype).to(matrix.device) for made in _gram_schmidt(wide))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, triangle)
        return rows, triangle

    @staticmethod
    def backward(ctx: Any, rows_grad: torch.Tensor | None, triangle_grad: torch.Tensor | None) -> torch.Tensor:
        rows, triangle = ctx.saved_tensors
        if rows_grad is None:
            rows_grad = torch.zeros_like(rows)
        with no_autocast(rows.device.type):
            product = rows_grad @ rows.mT
            if triangle_grad is not None:  # in a second derivative
                product = product - triangle.mT @ triangle_grad
            symmetric = product.tril() + product.tril(-1).mT
            return torch.linalg.solve_triangular(triangle.mT, rows_grad - symmetric @ rows, upper=True)


def _gram_schmidt(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The orthonormal rows and the triangle of a float64 matrix; inf on its diagonal for rows that are arbitrary."""
    # Reading a pivot is free on a CPU. On a GPU it would synchronize, and a graph cannot branch on it.
    if matrix.device.type == "cpu" and not torch.compiler.is_compiling():
        gram = matrix @ matrix.mT
        # Rows of very different lengths are harmless: Cholesky's errors are relative to each row. If it fails, it
        # leaves a pivot that is not positive.
        triangle, _ = torch.linalg.cholesky_ex(gram)
        if (_diagonal(triangle) > _CLEAR * _diagonal(gram).sqrt()).all():
            return torch.linalg.solve_triangular(triangle, matrix, upper=False), triangle
    return _gram_schmidt_twice(matrix)


def _gram_schmidt_twice(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_gram_schmidt` for any rows: shifted CholeskyQR2 (Fukaya et al. 2020); rows without a direction become fixed."""
    rank, features = matrix.shape[-2:]
    gram = matrix @ matrix.mT
    # Larger than the rounding error of a pivot, so that Cholesky succeeds; the constant is for rows of zeros.
    shift = 4 * (rank + features**0.5) * torch.finfo(matrix.dtype).eps
    _diagonal(gram).mul_(1 + shift).add_(1e-150)
    first, _ = torch.linalg.cholesky_ex(gram)
    rows = torch.linalg.solve_triangular(first, matrix, upper=False)
    # The shift makes a row shorter than one: the second pass corrects a little of that.
    lost = torch.linalg.vector_norm(rows, dim=-1) < 0.85
    # Cosines of squares, shifted by one from row to row: as independent as random rows, but deterministic.
    wave = torch.arange(rank + features, dtype=matrix.dtype, device=matrix.device).square().cos()
    rows = torch.where(lost.unsqueeze(-1), wave.unfold(0, features, 1)[:rank], rows)
    second, _ = torch.linalg.cholesky_ex(rows @ rows.mT)
    triangle = first @ second
    _diagonal(triangle).masked_fill_(lost, torch.inf)
    return torch.linalg.solve_triangular(second, rows, upper=False), triangle


def _diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def random_orthonormal_rows(units: int, rank: int, features: int) -> torch.Tensor:
    """`[units, rank, features]` float32, rows uniformly distributed over orthonormal frames (Haar measure)."""
    return orthonormal_rows(torch.randn(units, rank, features, dtype=torch.float64)).float()

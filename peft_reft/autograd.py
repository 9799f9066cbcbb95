"""Differentiable steps that keep less for the backward pass than their parts would, or need fewer passes over it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# [..., k] -> [..., k'], elementwise or a choice of columns
Elementwise = Callable[[torch.Tensor], torch.Tensor]


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context in which operations keep the dtypes of their arguments."""
    # Entering the context takes longer than asking whether there is a need to.
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def gather_rows(hidden: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden` itself and its rows `hidden[index]`, for adding something to these rows.

    The gradient of both together is one copy of that of the first with something added to some rows. As two uses of
    `hidden` they would cost a tensor of zeros and a sum, each of its whole size.

    Args:
        hidden: `[n, d]`.
        index: int64 `[k]`, all different.
    """
    if not (hidden.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return hidden, hidden.index_select(0, index)
    return _GatherRows.apply(hidden, index)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(index)
        return hidden.view_as(hidden), hidden.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, whole: torch.Tensor, picked: torch.Tensor) -> tuple[torch.Tensor, None]:
        return whole.index_add(0, *ctx.saved_tensors, picked), None


def add_low_rank(
    hidden: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor | None,
    shift: torch.Tensor,
    elementwise: Elementwise | None,
    keep_output: bool,
) -> torch.Tensor:
    """`hidden + elementwise(hidden @ right.T + shift) @ left`.

    The gradients need a copy of the hidden representations. When what comes next keeps the result for its own
    gradients anyway, as the norm at the start of a block does, then keeping that one costs nothing.

    Args:
        hidden: `[..., d]`, any floating point dtype.
        left: `[k', d]`, in the dtype to compute in.
        right: `[k, d]`, or None for zero.
        shift: `[k]`.
        elementwise: None for the identity.
        keep_output: keep the result for the backward pass, else `hidden`.

    Returns:
        `[..., d]`, dtype of `hidden`.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, left, right, shift)):
        return _AddLowRank.apply(hidden, left, right, shift, elementwise, keep_output)
    return _add_low_rank(hidden, left, right, shift, elementwise)[0]


def _add_low_rank(
    hidden: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor | None,
    shift: torch.Tensor,
    elementwise: Elementwise | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, `hidden @ right.T + shift`, and what `elementwise` makes of that; as rows `[n, k]` and `[n, k']`."""
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
                    # What was kept is the sum of `hidden` and the edit.
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

"""Layouts of hidden representations in a module's input or output other than `[batch, tokens, features]`.

A layout rearranges the tokens to the usual axes, passes them to a function that edits them, and rearranges the result
back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# [batch, tokens, features] or [rows, features] -> the same shape; the same tensor object if nothing is edited
EditTokens = Callable[[torch.Tensor], torch.Tensor]
# The usual order of axes: batch, tokens (any other letter), streams, features.
_PLACES = {"b": 0, "s": 2, "d": 3}


class Layout(Protocol):
    """A layout of hidden representations. `maps_tokens` says whether each token of the pass has a known place in it."""

    maps_tokens: bool

    def edit(self, hidden: torch.Tensor, shape: tuple[int, int], edit: EditTokens) -> torch.Tensor:
        """`hidden` with its tokens edited, `hidden` itself if nothing is edited.

        Args:
            hidden: the module's input or output.
            shape: `(batch, tokens)` of the pass, `(0, 0)` if unknown.
            edit: edits tokens in the usual layout.
        """


@dataclass(frozen=True)
class Axes:
    """The axes are in another order, or a token has several vectors.

    `order` names them: `b` batch, `d` features, `s` the residual streams of a token, any other letter tokens (places
    of a grid count row by row). A token with several streams is represented by their concatenation.
    """

    order: str
    maps_tokens: bool = True

    def edit(self, hidden: torch.Tensor, shape: tuple[int, int], edit: EditTokens) -> torch.Tensor:
        if hidden.dim() != len(self.order):
            return edit(hidden)
        usual = sorted(range(hidden.dim()), key=lambda axis: _PLACES.get(self.order[axis], 1))
        moved = hidden.permute(usual)
        tokens = moved.flatten(-2) if "s" in self.order else moved
        tokens = tokens.flatten(1, -2)
        edited = edit(tokens)
        if edited is tokens:
            return hidden
        return edited.reshape(moved.shape).permute(sorted(range(hidden.dim()), key=usual.__getitem__))


@dataclass(frozen=True)
class Among:
    """The model adds its own tokens, `before` of them before those of its input and any number after them.

    Its own tokens are not edited.
    """

    before: int = 0
    maps_tokens: bool = True

    def edit(self, hidden: torch.Tensor, shape: tuple[int, int], edit: EditTokens) -> torch.Tensor:
        begin, end = self.before, self.before + shape[1]
        if shape[1] == 0 or hidden.dim() != 3 or hidden.shape[1] < max(end, shape[1] + 1):
            return edit(hidden)
        tokens = hidden[:, begin:end]
        edited = edit(tokens)
        return hidden if edited is tokens else torch.cat([hidden[:, :begin], edited, hidden[:, end:]], dim=1)


@dataclass(frozen=True)
class Repeated:
    """All tokens repeated several times along the token axis; each repetition gets the same edits."""

    maps_tokens: bool = True

    def edit(self, hidden: torch.Tensor, shape: tuple[int, int], edit: EditTokens) -> torch.Tensor:
        if shape[1] == 0 or hidden.dim() != 3 or hidden.shape[1] % shape[1]:
            return edit(hidden)
        parts = hidden.split(shape[1], dim=1)
        edited = [edit(part) for part in parts]
        untouched = all(before is after for before, after in zip(parts, edited, strict=True))
        return hidden if untouched else torch.cat(edited, dim=1)


@dataclass(frozen=True)
class Elsewhere:
    """Vectors that do not represent single tokens of the input: all of them are edited, or none."""

    maps_tokens: bool = False

    def edit(self, hidden: torch.Tensor, shape: tuple[int, int], edit: EditTokens) -> torch.Tensor:
        rows = hidden.flatten(0, -2)
        edited = edit(rows)
        return hidden if edited is rows else edited.view(hidden.shape)


def first_tensor(output: Any) -> Any:
    """The hidden representations in a module's input or output: the first value in it, or the value itself."""
    while isinstance(output, (Mapping, tuple, list)):
        output = next(iter(output.values() if isinstance(output, Mapping) else output), None)
    return output


def hidden_of(output: Any, complaint: str) -> torch.Tensor:
    """Like `first_tensor`, but checked.

    Raises:
        TypeError: the value is not a floating point tensor of at least two axes; the message begins with `complaint`.
    """
    hidden = first_tensor(output)
    if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point() or hidden.dim() < 2:
        raise TypeError(
            f"{complaint} (or the first value of it) must be a floating point tensor [batch, tokens, features] or "
            f"[rows, features], got {_describe(hidden)}."
        )
    return hidden


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """`output` with its first value, or itself if it is a tensor, replaced by `hidden`."""
    if isinstance(output, torch.Tensor):
        return hidden
    if isinstance(output, Mapping):
        first = next(iter(output))
        return type(output)({**output, first: with_hidden(output[first], hidden)})
    first = with_hidden(output[0], hidden)
    if hasattr(output, "_replace"):  # namedtuple
        return output._replace(**{output._fields[0]: first})
    return type(output)((first, *output[1:]))

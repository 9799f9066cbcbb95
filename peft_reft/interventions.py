"""The maths of representation finetuning: one class per method, tensors in, tensors out.

Shapes: `d` hidden size, `r` rank, `u` units (one per position word when weights are not shared, else 1).
Parameters carry the leading axis of units, so that one matrix product serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from peft_reft.autograd import Elementwise, add_low_rank, orthonormal_rows, random_orthonormal_rows

# Only the directions of the rows matter, but an optimizer step rotates shorter rows further. At this length a step
# rotates them as far as in pyreft, for which the paper's learning rates were chosen.
ROW_LENGTH = 0.5

InitWeights = bool | Literal["pyreft"]


class Scope(NamedTuple):
    """The part of each representation to edit, and the factor of the edit.

    Attributes:
        gate: `[..., u]`, which unit edits each representation (one-hot; all zero for none). None: the only unit edits
            all.
        coordinates: broadcastable to `[..., r]`, 1 for the coordinates of the subspace that are edited and 0 for the
            others. None: all.
        strength: factor of the edit.
    """

    gate: torch.Tensor | None = None
    coordinates: torch.Tensor | None = None
    strength: float = 1.0


EVERYTHING = Scope()


class Intervention(nn.Module):
    """A learned edit of hidden representations. A method is a subclass with parameters, `reset_parameters` and `edit`.

    Args:
        features: `d`, the size of the hidden representation.
        rank: `r`, the dimension of the edited subspace.
        units: number of independent interventions held in one module.
        act_fn: name of an activation in `transformers.activations.ACT2FN`, or None.
        dropout: probability of zeroing an entry of the edited representation in training (not of the edit alone).
        init_weights: True starts as the identity where the method can; `"pyreft"` as pyreft does; False random (for
            tests).
        bias: whether there is a `b`.

    Attributes:
        low_rank: whether the edit lies in a subspace of dimension `r`, rather than in all of the representation.
        takes_act_fn: whether the method has a learned projection that an activation can follow.
        needs_bias: whether the edit is zero without a `b`.
        affine: whether the edit is an affine map of the hidden representation (outside of training).
        bias: `b`, a parameter `[u, ...]`, or None.
    """

    low_rank: ClassVar[bool]
    takes_act_fn: ClassVar[bool] = False
    needs_bias: ClassVar[bool] = False
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        rank: int,
        units: int = 1,
        act_fn: str | None = None,
        dropout: float = 0.0,
        init_weights: InitWeights = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.units = units
        self.act_name = None if act_fn == "linear" else act_fn
        self.act_fn = None if self.act_name is None else ACT2FN[self.act_name]
        self.affine = self.act_fn is None
        # Only if it does something: every traversal of the model's modules would visit it.
        self.dropout = nn.Dropout(dropout) if dropout else None
        self._create_parameters(features, rank, units)
        if not bias:
            self.bias = None
        if not next(self.parameters()).is_meta:
            with torch.no_grad():
                self.reset_parameters(init_weights)

    def _create_parameters(self, features: int, rank: int, units: int) -> None:
        raise NotImplementedError

    def reset_parameters(self, init_weights: InitWeights) -> None:
        """Initialize the parameters; `bias` may be None."""
        raise NotImplementedError

    def edit(
        self, hidden: torch.Tensor, scope: Scope = EVERYTHING, kept: dict[tuple, Any] | None = None
    ) -> torch.Tensor:
        """The edit before dropout and strength, `[..., d]` in the dtype of `hidden`; arguments as for `forward`."""
        raise NotImplementedError

    def forward(
        self, hidden: torch.Tensor, scope: Scope = EVERYTHING, kept: dict[tuple, Any] | None = None
    ) -> torch.Tensor:
        """The edit, to be added to the representations.

        Args:
            hidden: `[..., d]`, any floating point dtype; the edit is computed in `compute_dtype(hidden.dtype)`.
            scope: the part to edit, and the factor of the edit.
            kept: cache of products of the parameters, for as long as these do not change, such as one `generate` call;
                None for no cache.

        Returns:
            `[..., d]`, dtype of `hidden`.
        """
        precise = hidden.to(compute_dtype(hidden.dtype))
        edit = self.edit(precise, scope, kept)
        if scope.strength != 1.0:
            edit = scope.strength * edit
        if self._drops(scope):
            edit = self.dropout(precise + edit) - precise
            if scope.gate is not None:
                edit = edit * scope.gate.sum(-1, keepdim=True)
        return edit.to(hidden.dtype)

    def apply_to(
        self,
        hidden: torch.Tensor,
        scope: Scope = EVERYTHING,
        kept: dict[tuple, Any] | None = None,
        keep_output: bool = False,
    ) -> torch.Tensor:
        """The representations with the edit added.

        Args:
            hidden, scope, kept: see `forward`.
            keep_output: whether the next operation keeps the result for its own backward pass, so that keeping it here
                costs no memory. A wrong value costs memory, but does not change the result.

        Returns:
            `[..., d]`, dtype of `hidden`.
        """
        return hidden + self(hidden, scope, kept)

    def _drops(self, scope: Scope) -> bool:
        return self.training and self.dropout is not None and self.dropout.p > 0 and scope.strength != 0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that edits of representations in `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Factors(NamedTuple):
    """A low-rank edit in its normal form `left^T (act(right h + bias) - removed h)`.

    `left`, `right` and `removed` are `[..., r, d]`, `bias` is `[..., r]`. `right` is None for zero, `removed` is None
    for zero or if `right` includes it, as in affine edits.
    """

    left: torch.Tensor
    right: torch.Tensor | None
    bias: torch.Tensor
    removed: torch.Tensor | None


class _Products(NamedTuple):
    """Factors with all units side by side, and with `removed`, if there is one, below `right`.

    `left` is `[u * r, d]`, `right` `[u * r, d]` or `[2 * u * r, d]` or None, `shift` `[u * r]` or `[2 * u * r]`.
    """

    left: torch.Tensor
    right: torch.Tensor | None
    shift: torch.Tensor

    @classmethod
    def of(cls, factors: Factors) -> _Products:
        left, shift = factors.left.flatten(0, 1), factors.bias.flatten()
        right = None if factors.right is None else factors.right.flatten(0, 1)
        if factors.removed is not None:
            right = torch.cat([right, factors.removed.flatten(0, 1)])
            shift = torch.cat([shift, torch.zeros_like(shift)])
        return cls(left, right, shift)


class LowRankIntervention(Intervention):
    r"""Base class of methods that edit a subspace:

    $$ \Phi(h) = h + L^\top (W h + b - L h) $$

    with `L` `[r, d]`, `W` `[r, d]` and `b` `[r]`, of which a method has all or some. If `L` has orthonormal rows, it is
    computed from the plain parameter `projection` by orthonormalizing its rows, so weight decay and low precision
    storage cannot break the orthonormality. `act_fn` is applied to `W h + b`.

    Attributes:
        orthonormal: whether the rows of `L` are orthonormal (the papers then call it `R`, otherwise `P`).
        learned: whether there is a `W`.
        replaces: whether the coordinates `L h` are subtracted.
    """

    low_rank = True
    orthonormal: ClassVar[bool]
    learned: ClassVar[bool]
    replaces: ClassVar[bool]

    def _create_parameters(self, features: int, rank: int, units: int) -> None:
        self.projection = nn.Parameter(torch.empty(units, rank, features))
        if self.learned:
            self.weight = nn.Parameter(torch.empty(units, rank, features))
        self.bias = nn.Parameter(torch.empty(units, rank))

    def reset_parameters(self, init_weights: InitWeights) -> None:
        units, rank, features = self.projection.shape
        self.projection.copy_(random_orthonormal_rows(units, rank, features))
        if self.orthonormal:
            self.projection.mul_(ROW_LENGTH)
        bound = features**-0.5
        if init_weights == "pyreft" and not self.orthonormal:
            nn.init.uniform_(self.projection, -bound, bound)
        if init_weights is True:
            self.reset_edit()
        elif init_weights == "pyreft" and self.learned:
            nn.init.uniform_(self.weight, -bound, bound)
            self._draw_bias(nn.init.uniform_, -bound, bound)
        elif init_weights == "pyreft":
            self._draw_bias(nn.init.uniform_)
        else:
            if self.learned:
                nn.init.normal_(self.weight, std=bound)
            self._draw_bias(nn.init.normal_)

    def _draw_bias(self, draw: Callable[..., Any], *arguments: float) -> None:
        if self.bias is not None:
            draw(self.bias, *arguments)

    @torch.no_grad()
    def reset_edit(self) -> None:
        """Set `W` and `b` so that the edit is zero, if the method can express that; `L` does not change."""
        self._draw_bias(nn.init.zeros_)
        if self.learned:
            self.weight.copy_(self.subspace(self.weight.dtype) if self.replaces else torch.zeros_like(self.weight))

    def subspace(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`L`, `[u, r, d]` in `dtype`."""
        return self.rows_of(self.projection.to(dtype))

    @classmethod
    def rows_of(cls, projection: torch.Tensor) -> torch.Tensor:
        """`L` `[..., r, d]` from the parameter `projection` `[..., r, d]`."""
        return orthonormal_rows(projection) if cls.orthonormal else projection

    @classmethod
    def normal_form(cls, parameters: Mapping[str, torch.Tensor], affine: bool) -> Factors:
        """`factors_of`, with a `bias` of zeros if `parameters` has none."""
        zeros = parameters["projection"].new_zeros(parameters["projection"].shape[:-1])
        return cls.factors_of({"bias": zeros} | dict(parameters), affine)

    @classmethod
    def factors_of(cls, parameters: Mapping[str, torch.Tensor], affine: bool) -> Factors:
        """The normal form from parameters by name, `[..., r, d]` and `[..., r]`; `affine`: there is no activation."""
        left, bias = cls.rows_of(parameters["projection"]), parameters["bias"]
        weight = parameters["weight"] if cls.learned else None
        if not affine:
            return Factors(left, weight, bias, left if cls.replaces else None)
        if weight is None:
            return Factors(left, -left if cls.replaces else None, bias, None)
        # One difference instead of two products: exactly zero for a fresh adapter, and cheaper.
        return Factors(left, weight - left if cls.replaces else weight, bias, None)

    def factors(self, dtype: torch.dtype = torch.float32, coordinates: torch.Tensor | None = None) -> Factors:
        """The normal form in `dtype`, `[u, r, d]`; with `coordinates`, gradients reach only the rows that they use."""
        parameters = {name: parameter.to(dtype) for name, parameter in self.named_parameters()}
        if coordinates is not None and torch.is_grad_enabled():
            # Rows that no representation uses get no gradient, although later rows are orthogonalized against them.
            projection = parameters["projection"]
            used = (coordinates != 0).reshape(-1, projection.shape[1]).any(0)[:, None]
            parameters["projection"] = torch.where(used, projection, projection.detach())
        return self.normal_form(parameters, self.affine)

    def edit(
        self, hidden: torch.Tensor, scope: Scope = EVERYTHING, kept: dict[tuple, Any] | None = None
    ) -> torch.Tensor:
        left, right, shift = self._products(hidden.dtype, scope.coordinates, kept)
        target = shift if right is None else hidden @ right.mT + shift
        elementwise = self._elementwise(scope._replace(strength=1.0))
        if elementwise is not None:
            target = elementwise(target)
        # Without a product, `target` is one row for all representations.
        return target.expand(*hidden.shape[:-1], -1) @ left

    def apply_to(
        self,
        hidden: torch.Tensor,
        scope: Scope = EVERYTHING,
        kept: dict[tuple, Any] | None = None,
        keep_output: bool = False,
    ) -> torch.Tensor:
        # Accelerate loads offloaded parameters when a module is called.
        if torch.compiler.is_compiling() or self._drops(scope) or hasattr(self, "_hf_hook"):
            return super().apply_to(hidden, scope, kept, keep_output)
        left, right, shift = self._products(compute_dtype(hidden.dtype), scope.coordinates, kept)
        return add_low_rank(hidden, left, right, shift, self._elementwise(scope), keep_output)

    def _products(
        self, dtype: torch.dtype, coordinates: torch.Tensor | None, kept: dict[tuple, Any] | None
    ) -> _Products:
        """The factors in the form that multiplies representations; cached in `kept` if no gradients are needed.

        Without `kept` they are computed every time, because no counter tracks every write to the parameters.
        """
        if kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _Products.of(self.factors(dtype, coordinates))
        key = (self, dtype, self.projection.device)
        if key not in kept:
            kept[key] = _Products.of(self.factors(dtype))
        return kept[key]

    def _elementwise(self, scope: Scope) -> Elementwise | None:
        """The function between the two products, None for the identity."""
        gate, coordinates, strength = scope
        if self.act_fn is None and gate is None and coordinates is None and strength == 1.0:
            return None
        units, rank, _ = self.projection.shape

        def apply(target: torch.Tensor) -> torch.Tensor:
            if self.act_fn is not None:
                size = units * rank
                target = self.act_fn(target[..., :size]) - target[..., size:] if self.replaces else self.act_fn(target)
            if gate is not None:
                target = target * gate.repeat_interleave(rank, dim=-1)
            if coordinates is not None:
                target = target * coordinates.repeat(*(1,) * (coordinates.dim() - 1), units)
            return target if strength == 1.0 else strength * target

        return apply


class LoreftIntervention(LowRankIntervention):
    r"""LoReFT (Wu et al. 2024, arXiv 2404.03592, equation 2): $R^\top (W h + b - R h)$ is added to `h`.

    A new one is the identity (`W = R`, `b = 0`; not with `act_fn`). pyreft initializes `W` and `b` as `nn.Linear` does.
    """

    orthonormal, learned, replaces, takes_act_fn = True, True, True, True


class NoreftIntervention(LowRankIntervention):
    r"""NoReFT (ibid., appendix): LoReFT without the constraint, $P^\top (W h + b - P h)$ is added to `h`."""

    orthonormal, learned, replaces, takes_act_fn = False, True, True, True


class DireftIntervention(LowRankIntervention):
    r"""DiReFT as in pyreft: $R^\top (W h + b)$ is added to `h`, with `W = 0` and `b = 0` at first.

    The paper's equation 3 does not require orthonormal rows: that is `nodireft`.
    """

    orthonormal, learned, replaces, takes_act_fn = True, True, False, True


class NodireftIntervention(LowRankIntervention):
    r"""DiReFT without the constraint (ibid., equation 3): $P^\top (W h + b)$ is added to `h`, a LoRA on `h` itself."""

    orthonormal, learned, replaces, takes_act_fn = False, True, False, True


class ConsreftIntervention(LowRankIntervention):
    r"""ConsReFT, in pyreft: $R^\top (b - R h)$ is added to `h`, which sets its coordinates in the subspace to `b`.

    It is never the identity: with `b = 0` it removes the subspace from `h` (directional ablation).
    """

    orthonormal, learned, replaces = True, False, True


class LobireftIntervention(LowRankIntervention):
    r"""LobiReFT, in pyreft: $R^\top b$ is added to `h`, a constant: a steering vector."""

    orthonormal, learned, replaces, needs_bias = True, False, False, True


class RedIntervention(Intervention):
    r"""RED (Wu et al. 2024, arXiv 2402.15179): $g \odot h + b$ in place of `h`, with `g = 1` and `b = 0` at first.

    It edits each coordinate separately and has no rank.
    """

    low_rank = False

    def _create_parameters(self, features: int, rank: int, units: int) -> None:
        self.scale = nn.Parameter(torch.empty(units, features))
        self.bias = nn.Parameter(torch.empty(units, features))

    def reset_parameters(self, init_weights: InitWeights) -> None:
        nn.init.ones_(self.scale)
        if init_weights is False:
            self.scale.add_(torch.randn_like(self.scale))
        if self.bias is not None:
            (nn.init.normal_ if init_weights is False else nn.init.zeros_)(self.bias)

    @property
    def shift(self) -> torch.Tensor:
        """`b`, `[u, d]`; zeros if there is none."""
        return torch.zeros_like(self.scale) if self.bias is None else self.bias

    def edit(
        self, hidden: torch.Tensor, scope: Scope = EVERYTHING, kept: dict[tuple, Any] | None = None
    ) -> torch.Tensor:
        factor, shift = self.scale.to(hidden.dtype) - 1, self.shift.to(hidden.dtype)
        if scope.gate is None:
            return factor[0] * hidden + shift[0]
        return (scope.gate @ factor) * hidden + scope.gate @ shift


INTERVENTIONS: dict[str, type[Intervention]] = {
    "loreft": LoreftIntervention,
    "noreft": NoreftIntervention,
    "direft": DireftIntervention,
    "nodireft": NodireftIntervention,
    "consreft": ConsreftIntervention,
    "lobireft": LobireftIntervention,
    "red": RedIntervention,
}


def register_intervention(name: str, cls: type[Intervention]) -> None:
    """Make a method available as `ReftConfig(intervention=name)`.

    Args:
        name: its name in configs, an identifier in lower case.
        cls: a subclass of `Intervention`; one of `LowRankIntervention` works in mixed batches and merges too.

    Raises:
        TypeError: `cls` is no subclass of `Intervention`, or does not say whether it is `low_rank`.
        ValueError: `name` is no identifier in lower case, or is taken.
    """
    if not (isinstance(cls, type) and issubclass(cls, Intervention) and hasattr(cls, "low_rank")):
        raise TypeError(f"cls must be a subclass of Intervention with a class attribute low_rank, got {cls!r}.")
    if not (isinstance(name, str) and name.isidentifier() and name == name.lower()):
        raise ValueError(f"name must be an identifier in lower case, got {name!r}.")
    if INTERVENTIONS.setdefault(name, cls) is not cls:
        raise ValueError(f"name={name!r} is taken by {INTERVENTIONS[name].__qualname__}; choose another one.")

"""The maths of representation finetuning: one class per method, tensors in, tensors out.

Shapes: `d` hidden size, `r` rank, `u` units (one per position word when weights are not shared, else 1).
Parameters carry the leading axis of units, so that one matrix product serves them all.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers.activations import ACT2FN

InitWeights = bool | Literal["pyreft"]


def orthonormal_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt on the rows of each matrix, first row first, by a Cholesky factor of their Gram matrix.

    Args:
        matrix: floating point, `[..., r, d]` with `r <= d` and linearly independent rows.

    Returns:
        `[..., r, d]`, orthonormal rows with the same span, same dtype as `matrix`.
    """
    # The Gram matrix squares the condition number, which double precision absorbs. MPS has no float64: there a second
    # pass does the same work (CholeskyQR2, Yamamoto et al. 2015).
    if matrix.device.type == "mps":
        return _cholesky_rows(_cholesky_rows(matrix))
    return _cholesky_rows(matrix.double()).to(matrix.dtype)


def _cholesky_rows(matrix: torch.Tensor) -> torch.Tensor:
    # Scaling every row to length one first keeps rows of very different size well conditioned.
    matrix = matrix / torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    factor, _ = torch.linalg.cholesky_ex(matrix @ matrix.mT)
    return torch.linalg.solve_triangular(factor, matrix, upper=False)


def random_orthonormal_rows(units: int, rank: int, features: int) -> torch.Tensor:
    """`[units, rank, features]` float32, rows uniformly distributed over orthonormal frames (Haar measure)."""
    return orthonormal_rows(torch.randn(units, rank, features, dtype=torch.float64)).float()


class LoreftIntervention(nn.Module):
    r"""LoReFT (Wu et al. 2024, arXiv 2404.03592, equation 2).

    $$ \Phi(h) = h + R^\top (W h + b - R h) $$

    with `R` `[r, d]` (orthonormal rows), `W` `[r, d]` and `b` `[r]`, and an optional activation on `W h + b`. `R` is
    the row-orthonormalized `projection`, a plain parameter: weight decay and low precision storage cannot take the
    orthonormality away.

    Args:
        features: `d`, the size of the hidden representation.
        rank: `r`, the dimension of the edited subspace.
        units: number of independent interventions held in one module.
        act_fn: name of an activation in `transformers.activations.ACT2FN`, or None.
        dropout: probability of zeroing an entry of the edited representation in training (not of the edit alone).
        init_weights: True starts as the identity (`W = R`, `b = 0`); `"pyreft"` as pyreft does (`W` and `b` as
            `nn.Linear` draws them); False random (for tests). With `act_fn`, `W = R` is not the identity.
    """

    def __init__(
        self,
        features: int,
        rank: int,
        units: int = 1,
        act_fn: str | None = None,
        dropout: float = 0.0,
        init_weights: InitWeights = True,
    ) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(units, rank, features))
        self.weight = nn.Parameter(torch.empty(units, rank, features))
        self.bias = nn.Parameter(torch.empty(units, rank))
        self.act_fn = None if act_fn is None else ACT2FN[act_fn]
        self.dropout = nn.Dropout(dropout)
        self._rows_cache: tuple[Any, torch.Tensor] | None = None
        self.reset_parameters(init_weights)

    @torch.no_grad()
    def reset_parameters(self, init_weights: InitWeights) -> None:
        """Draw new parameters; does nothing on the meta device."""
        if self.projection.is_meta:
            return
        units, rank, features = self.projection.shape
        self.projection.copy_(random_orthonormal_rows(units, rank, features))
        if init_weights is True:
            self.weight.copy_(orthonormal_rows(self.projection))
            self.bias.zero_()
        elif init_weights == "pyreft":
            bound = features**-0.5
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)
        else:
            nn.init.normal_(self.weight, std=features**-0.5)
            nn.init.normal_(self.bias)

    def orthonormal_projection(self, dtype: torch.dtype = torch.float32, session: object = None) -> torch.Tensor:
        """`R`, `[u, r, d]` in `dtype`; rows orthonormal. Computed once for each `session`, every time without one."""
        if session is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return orthonormal_rows(self.projection.to(dtype))
        key = (session, dtype, self.projection.device)
        if self._rows_cache is None or self._rows_cache[0] != key:
            self._rows_cache = (key, orthonormal_rows(self.projection.to(dtype)))
        return self._rows_cache[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows_cache": None}

    def forward(self, hidden: torch.Tensor, gate: torch.Tensor | None = None, session: object = None) -> torch.Tensor:
        """The edit to add to `hidden`.

        Args:
            hidden: `[..., d]`, float32 or float64; the edit is computed in this dtype.
            gate: `[..., u]`, which unit edits each representation (one-hot; all zero for none). None: the only unit
                edits all.
            session: something that lasts while the parameters do not change, such as one `generate` call.

        Returns:
            `[..., d]`, same dtype as `hidden`.
        """
        rows = self.orthonormal_projection(hidden.dtype, session)
        weight, bias = self.weight.to(hidden.dtype), self.bias.to(hidden.dtype).flatten()
        if self.act_fn is None:
            # W - R first: exactly zero for a fresh adapter, and one product instead of two.
            target = hidden @ (weight - rows).flatten(0, 1).mT + bias
        else:
            target = self.act_fn(hidden @ weight.flatten(0, 1).mT + bias) - hidden @ rows.flatten(0, 1).mT
        if gate is not None:
            target = target * gate.repeat_interleave(rows.shape[1], dim=-1)
        edit = target @ rows.flatten(0, 1)
        if self.training and self.dropout.p > 0:
            edit = self.dropout(hidden + edit) - hidden
            if gate is not None:
                edit = edit * gate.sum(-1, keepdim=True)
        return edit


INTERVENTIONS: dict[str, type[LoreftIntervention]] = {"loreft": LoreftIntervention}

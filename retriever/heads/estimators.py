"""Gradient estimators of the codeword choice.

The choice of the nearest codeword has no derivative. Each estimator returns the chosen codewords as value and
differs in what its gradient reaches.

Shapes: N vectors, M codebooks, K codewords, S sub-dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "ESTIMATORS",
    "Estimate",
    "Estimator",
    "EstimatorName",
    "codeword_estimator",
    "identity_estimator",
    "select",
    "softmax_estimator",
]

EstimatorName = Literal["identity", "codeword", "softmax"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Chosen codewords with their gradient path, (N, M, S), and log-probability of the choice, (N,), or None."""

    codewords: Float[Tensor, "N M S"]
    log_assignment: Float[Tensor, " N"] | None = None


class Estimator(Protocol):
    """Signature of an estimator."""

    def __call__(
        self,
        z: Float[Tensor, "N M S"],
        codebooks: Float[Tensor, "M K S"],
        scores: Float[Tensor, "N M K"] | None,
        codes: Int[Tensor, "N M"],
    ) -> Estimate:
        """Return the codewords `codes` with a gradient path to `z`, `codebooks` or both.

        Args:
            z: Sub-vectors.
            codebooks: Codewords.
            scores: Selection scores divided by the temperature; by default -(squared L2 distance). Only the
                softmax looks at them; the others take None.
            codes: Chosen codewords: argmax of `scores` over K, unless the assignment is frozen or balanced.
        """
        ...


def select(codebooks: Float[Tensor, "M K S"], codes: Int[Tensor, "N M"]) -> Float[Tensor, "N M S"]:
    """Return the codewords that codes name."""
    first = torch.arange(codebooks.shape[0], device=codes.device) * codebooks.shape[1]
    return F.embedding(
        codes + first, codebooks.flatten(0, 1)
    )  # its backward is twice as fast as that of indexing


def identity_estimator(
    z: Float[Tensor, "N M S"],
    codebooks: Float[Tensor, "M K S"],
    scores: Float[Tensor, "N M K"] | None,
    codes: Int[Tensor, "N M"],
) -> Estimate:
    """Pass the gradient to the vectors unchanged and none to the codebooks (Poeem, arXiv:2105.03933)."""
    return Estimate(z + (select(codebooks, codes) - z).detach())


def codeword_estimator(
    z: Float[Tensor, "N M S"],
    codebooks: Float[Tensor, "M K S"],
    scores: Float[Tensor, "N M K"] | None,
    codes: Int[Tensor, "N M"],
) -> Estimate:
    """Pass the gradient unchanged both to the vectors and to the chosen codewords (RepCONC, arXiv:2110.05789)."""
    return Estimate(select(codebooks, codes) + (z - z.detach()))


def softmax_estimator(
    z: Float[Tensor, "N M S"],
    codebooks: Float[Tensor, "M K S"],
    scores: Float[Tensor, "N M K"] | None,
    codes: Int[Tensor, "N M"],
) -> Estimate:
    """Straight-through softmax over the selection scores (MoPQ, arXiv:2104.07858, eq. 3-5).

    The chosen codeword gets the direct gradient; all K codewords and the vector get that of the softmax. With
    temperature 1 the vector's share is 2 Cov_p(C) g, which vanishes when the choice is clear.
    """
    assert scores is not None, "Codebooks scores for this estimator"
    log_p = scores.log_softmax(-1)  # (N, M, K)
    p = log_p.exp()
    hard = F.one_hot(codes, codebooks.shape[1]).to(p.dtype)
    weights = (hard - p).detach() + p
    chosen = log_p.gather(-1, codes.unsqueeze(-1)).squeeze(-1)  # (N, M)
    return Estimate(torch.einsum("nmk,mks->nms", weights, codebooks), chosen.sum(-1))


ESTIMATORS: dict[str, Estimator] = {
    "identity": identity_estimator,
    "codeword": codeword_estimator,
    "softmax": softmax_estimator,
}

"""MCL, the matching-oriented contrastive loss of MoPQ (Xiao et al., EMNLP 2021, arXiv:2104.07858).

Shapes: B queries, N documents, n documents of this device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from retriever.errors import InputError
from retriever.heads import HeadConfig
from training.losses.base import LossConfig, RetrievalLoss, ScoredBatch, check_temperature
from training.losses.contrastive import cross_entropy

__all__ = ["MCL", "MCLConfig"]


@dataclass(frozen=True, kw_only=True)
class MCLConfig(LossConfig):
    """Settings of `MCL`. The defaults are the released code's form but for the temperature (released: 1).

    The paper's form is dense_weight 0, assignment_weight 1, reconstruction_weight 0.

    Attributes:
        temperature: Divides the scores of both cross-entropies.
        dense_weight: Weight of the cross-entropy on uncompressed scores; in the release, not in the paper.
        assignment_weight: Weight of -log P(codes of the positive); in the paper, not in the release. Needs a
            head with the estimator "softmax".
        reconstruction_weight: Weight of the mean squared error between vectors and reconstructions.
    """

    name: ClassVar[str] = "mcl"

    temperature: float = 0.05
    dense_weight: float = 1.0
    assignment_weight: float = 0.0
    reconstruction_weight: float = 1e-8

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        for name in ("dense_weight", "assignment_weight", "reconstruction_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be zero or more, got {getattr(self, name)}.")

    def check(self, head: HeadConfig) -> None:
        """Raise InputError if `assignment_weight` is set and the head has no selection probability."""
        if self.assignment_weight and not head.selects_softly:
            raise InputError(
                f"assignment_weight={self.assignment_weight} needs a head with selection probabilities. "
                "Use the head pq or rq with estimator softmax, or assignment_weight 0."
            )

    def build(self) -> MCL:
        """Return the loss."""
        return MCL(self)


class MCL(RetrievalLoss):
    """Cross-entropy on the scores that the index will give, so that codes are learned for ranking.

    L = CE(q . x_hat) + dense_weight CE(q . x) + assignment_weight (-log P(codes)) + reconstruction_weight MSE(x, x_hat)
    """

    def __init__(self, config: MCLConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: ScoredBatch) -> dict[str, Tensor]:
        """Return the parts compressed, dense, assignment and reconstruction, as far as their weight is not 0."""
        config = self.config
        parts = {
            "compressed": cross_entropy(batch.compressed, batch.labels, batch.ignore, config.temperature)
        }
        if config.dense_weight:
            dense = cross_entropy(batch.dense, batch.labels, batch.ignore, config.temperature)
            parts["dense"] = config.dense_weight * dense
        if config.assignment_weight and batch.log_assignment is not None:  # None before the head's warm start
            parts["assignment"] = -config.assignment_weight * batch.log_assignment[batch.positives].mean()
        if config.reconstruction_weight:
            error = F.mse_loss(batch.reconstruction, batch.originals)
            parts["reconstruction"] = config.reconstruction_weight * error
        return parts

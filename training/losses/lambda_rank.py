"""LambdaRank-style pairwise loss of JPQ (Zhan et al., CIKM 2021, arXiv:2108.00644).

Shapes: B queries, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from retriever.errors import InputError
from training.losses.base import LossConfig, RetrievalLoss, ScoredBatch, check_temperature

__all__ = ["LambdaRank", "LambdaRankConfig"]


@dataclass(frozen=True, kw_only=True)
class LambdaRankConfig(LossConfig):
    """Settings of `LambdaRank`.

    Attributes:
        temperature: Divides the scores; JPQ's inner products of unnormalized vectors need none (1).
        depth: Only negatives ranked so high count: 200 for passages, 10 for documents (JPQ).
    """

    name: ClassVar[str] = "lambda_rank"

    temperature: float = 0.05
    depth: int = 200

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.depth < 1:
            raise InputError(f"depth must be at least 1, got {self.depth}.")

    def build(self) -> LambdaRank:
        """Return the loss."""
        return LambdaRank(self)


class LambdaRank(RetrievalLoss):
    """|1 / r(-) - 1 / r(+)| log(1 + exp(s(-) - s(+))), summed over the highest-ranked negatives of the query.

    r is the rank among the candidates of the batch by compressed score: the change of the reciprocal rank if the
    two changed places. With the index's best documents as live negatives it is the rank in the whole corpus.
    """

    def __init__(self, config: LambdaRankConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: ScoredBatch) -> dict[str, Tensor]:
        """Return {"lambda_rank": mean over the queries}."""
        labels = batch.labels[:, None]
        scores = batch.compressed / self.config.temperature
        ranks = _ranks(scores.detach().masked_fill(batch.ignore, float("-inf")))
        counted = (ranks <= self.config.depth) & ~batch.ignore.scatter(1, labels, True)
        inverse = 1 / ranks.to(scores.dtype)
        weights = (inverse - inverse.gather(1, labels)).abs() * counted
        terms = weights * F.softplus(scores - scores.gather(1, labels))
        return {"lambda_rank": terms.sum(1).mean()}


def _ranks(scores: Tensor) -> Tensor:
    """Return the rank of every score in its row, 1 for the highest, (B, N)."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)

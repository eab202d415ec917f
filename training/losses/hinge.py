"""Pairwise hinge loss on compressed scores, the retrieval loss of Poeem (Zhang et al., SIGIR 2021, arXiv:2105.03933).

Shapes: B queries, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from retriever.errors import InputError
from training.losses.base import LossConfig, RetrievalLoss, ScoredBatch

__all__ = ["Hinge", "HingeConfig"]

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class HingeConfig(LossConfig):
    """Settings of `Hinge`.

    Attributes:
        margin: delta, in units of the score; Poeem's is not published.
        reduction: Over a query's negatives: "mean", or "sum" as Poeem is reported to use. Queries are averaged.
    """

    name: ClassVar[str] = "hinge"

    margin: float = 0.1
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if not 0 <= self.margin < float("inf"):
            raise InputError(f"margin must be zero or more, got {self.margin}.")
        if self.reduction not in get_args(Reduction):
            raise InputError(
                f"reduction must be one of {', '.join(get_args(Reduction))}, got {self.reduction!r}."
            )

    def build(self) -> Hinge:
        """Return the loss."""
        return Hinge(self)


class Hinge(RetrievalLoss):
    """max(0, margin - s(q, positive) + s(q, negative)) over all negatives of the batch."""

    def __init__(self, config: HingeConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: ScoredBatch) -> dict[str, Tensor]:
        """Return {"hinge": mean over the queries}."""
        positive = batch.compressed.gather(1, batch.labels[:, None])
        left_out = batch.ignore.scatter(1, batch.labels[:, None], True)
        terms = (self.config.margin - positive + batch.compressed).relu().masked_fill(left_out, 0)
        total = terms.sum(1)
        if self.config.reduction == "mean":
            total = total / (~left_out).sum(1).clamp(min=1)
        return {"hinge": total.mean()}

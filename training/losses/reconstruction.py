"""Reconstruction loss: the mean squared error of compression, without labels.

Shapes: n documents of this device, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from retriever.errors import InputError
from training.losses.base import LossConfig, RetrievalLoss, ScoredBatch

__all__ = ["Reconstruction", "ReconstructionConfig"]


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(LossConfig):
    """Settings of `Reconstruction`.

    Attributes:
        weight: Weight of the mean of ||x - x_hat||^2; 0 leaves a head that has losses of its own to them.
    """

    name: ClassVar[str] = "reconstruction"

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise InputError(f"weight must be zero or more, got {self.weight}.")

    def build(self) -> Reconstruction:
        """Return the loss."""
        return Reconstruction(self)


class Reconstruction(RetrievalLoss):
    """weight ||x - x_hat||^2, the mean over the documents: what codecs that know no queries are trained by."""

    def __init__(self, config: ReconstructionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: ScoredBatch) -> dict[str, Tensor]:
        """Return {"reconstruction": the weighted mean squared error of a vector}."""
        error = (batch.originals - batch.reconstruction).square().sum(1).mean()
        return {"reconstruction": self.config.weight * error}

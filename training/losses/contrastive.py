"""Dense contrastive loss: softmax cross-entropy over the documents of the batch (van den Oord et al., 2018).

Shapes: B queries, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn import functional as F

from training.losses.base import LossConfig, RetrievalLoss, ScoredBatch, check_temperature

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["Contrastive", "ContrastiveConfig", "cross_entropy"]


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(LossConfig):
    """Settings of `Contrastive`.

    Attributes:
        temperature: Divides the scores; 0.05 is a scale of 20.
    """

    name: ClassVar[str] = "contrastive"

    temperature: float = 0.05

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def build(self) -> Contrastive:
        """Return the loss."""
        return Contrastive(self)


class Contrastive(RetrievalLoss):
    """-log softmax of the positive's uncompressed score; the head, if any, learns only from its own losses.

    Known as InfoNCE, in-batch negatives, or multiple negatives ranking loss.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: ScoredBatch) -> dict[str, Tensor]:
        """Return {"dense": mean cross-entropy over the queries}."""
        return {"dense": cross_entropy(batch.dense, batch.labels, batch.ignore, self.config.temperature)}


def cross_entropy(
    scores: Float[Tensor, "B N"], labels: Int[Tensor, " B"], ignore: Bool[Tensor, "B N"], temperature: float
) -> Tensor:
    """Return the mean over queries of -log softmax(scores / temperature)[label], ignored documents left out."""
    return F.cross_entropy((scores / temperature).masked_fill(ignore, float("-inf")), labels)

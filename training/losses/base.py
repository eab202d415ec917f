"""What every retrieval loss takes and gives.

Shapes: B queries, N documents (of all devices), D dimensions, E dimensions in the head's space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from retriever.errors import InputError
from retriever.heads import HeadConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["DocumentPairs", "LossConfig", "RetrievalLoss", "ScoredBatch", "check_temperature"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentPairs:
    """Documents beside all that are scored, in the towers' space and in the head's own.

    Attributes:
        documents: Uncompressed vectors, those of `ScoredBatch.documents`, (n, D).
        mapped: The same in the head's space, (n, E).
        other_documents: Uncompressed vectors of all documents that are scored, (N, D).
        other_mapped: The same in the head's space, (N, E).
        same: Whether both are one document, (n, N).
    """

    documents: Float[Tensor, "n D"]
    mapped: Float[Tensor, "n E"]
    other_documents: Float[Tensor, "N D"]
    other_mapped: Float[Tensor, "N E"]
    same: Bool[Tensor, "n N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """Scores of a batch, and what some losses need beside them.

    Attributes:
        dense: Scores of queries with uncompressed documents, (B, N).
        compressed: Scores of queries with reconstructed documents, (B, N): those of the index.
        labels: Column of each query's positive, (B,).
        ignore: Documents that must not count as negatives of a query: others relevant to it, and repeated ones, (B, N).
        repeated: Documents that stand in an earlier column too, (B, N).
        documents: Uncompressed vectors of the documents of `positives`, (n, D): this device's, n <= N.
        reconstruction: The same after compression, (n, E).
        positives: Rows of `documents` that are positives, (B,).
        log_assignment: log-probability of the codes of `documents`, (n,), or None.
        coarse: Scores of queries with the centroids of the documents' inverted lists, (B, N), or None.
        teacher: Scores of the frozen teacher, (B, N), or given ones, nan where there is none; or None.
        pairs: Documents beside each other in both spaces, where the head has one of its own; else None.
    """

    dense: Float[Tensor, "B N"]
    compressed: Float[Tensor, "B N"]
    labels: Int[Tensor, " B"]
    ignore: Bool[Tensor, "B N"]
    repeated: Bool[Tensor, "B N"]
    documents: Float[Tensor, "n D"]
    reconstruction: Float[Tensor, "n E"]
    positives: Int[Tensor, " B"]
    log_assignment: Float[Tensor, " n"] | None = None
    coarse: Float[Tensor, "B N"] | None = None
    teacher: Float[Tensor, "B N"] | None = None
    pairs: DocumentPairs | None = None

    @property
    def originals(self) -> Float[Tensor, "n E"]:
        """What `reconstruction` stands for: the mapped documents, or the documents where the head does not map."""
        return self.documents if self.pairs is None else self.pairs.mapped


class RetrievalLoss(nn.Module, ABC):
    """A loss on scores. It never owns the model, and holds no trainable state; its buffers are checkpointed."""

    def by_queries(self, *, lists: bool) -> bool:
        """Whether the loss of a batch is the mean of the losses of blocks of its queries, weighted by their number.

        Args:
            lists: The batch has `coarse` scores.
        """
        return True

    @abstractmethod
    def forward(self, batch: ScoredBatch) -> dict[str, Tensor]:
        """Return the weighted parts by name; their sum is the loss.

        Each is a mean over the queries that are scored, or looks at all of this device's documents and not at the
        queries, so that `by_queries` holds.
        """

    def start(self, sample: Float[Tensor, "n D"], seed: int) -> None:
        """Measure what the loss needs to know of the vectors, at the head's start.

        Args:
            sample: Current vectors of the warm start's documents, the same on every device.
            seed: For everything random.
        """


@dataclass(frozen=True, kw_only=True)
class LossConfig(ABC):
    """Base of the losses' configurations; choose one by `class_path`."""

    name: ClassVar[str] = ""

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss reads `ScoredBatch.teacher`, made by a frozen copy of the towers."""
        return False

    @property
    def needs_scores(self) -> bool:
        """Whether the loss reads `ScoredBatch.teacher`, given with the data."""
        return False

    @property
    def needs_head(self) -> bool:
        """Whether the loss teaches nothing before the head's start."""
        return False

    @abstractmethod
    def build(self) -> RetrievalLoss:
        """Return the loss."""

    def check(self, head: HeadConfig) -> None:  # noqa: B027
        """Raise InputError if the loss needs what the head does not give."""


def check_temperature(temperature: float) -> None:
    """Raise InputError unless a temperature is positive and finite."""
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature must be positive, got {temperature}. Cosine scores want about 0.05.")

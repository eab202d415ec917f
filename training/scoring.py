"""Vectors of a batch -> scores of its queries with the documents of all devices.

Shapes: B queries and n documents of this device, W devices, N documents scored, D dimensions. Compressed scores are
those of the head's space, in which queries are mapped.

Which documents a query is scored with, and where the gradient goes (MoPQ, arXiv:2104.07858, section 3.3):

  in_batch   those of its own device.
  detached   those of all devices, but other devices' documents get no gradient: MoPQ's non-differentiable baseline.
  rows       those of all devices, with gradients to all: equal to one device with the whole batch. The default.
  full       every device scores all queries with all documents, its own with gradients: MoPQ's published form, W times
             the work for the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from retriever import Embeddings, TokenBatch
from retriever.data import other_relevant
from retriever.distributed import all_gather, gather_detached, gather_padded, world_size
from retriever.scores import Metric, score_matrix
from training.losses import DocumentPairs, ScoredBatch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["CrossDevice", "JoinedBatch", "join_batch", "repeated_documents", "score_batch"]

CrossDevice = Literal["in_batch", "detached", "rows", "full"]

JOIN = {"in_batch": lambda x: x, "detached": gather_detached, "rows": all_gather, "full": gather_detached}


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedBatch:
    """What has come together on this device: queries to be scored, and all documents that they are scored with.

    Scores of any rows can be made from it, so that a large batch need not hold all of them at once.

    Attributes:
        metric: Score contract.
        queries: Queries to be scored, (B, D).
        mapped_queries: The same in the head's space, (B, E).
        candidates: Documents that they are scored with, (N, D).
        candidate_reconstruction: The same after compression, (N, E).
        candidate_coarse: Centroids of their inverted lists, (N, E), or None.
        keys: Keys of the candidates, (N,).
        relevant: Keys of the documents known to be relevant to each query, zero-padded, (B, R).
        labels: Row of each query's positive among the candidates, (B,).
        documents: Uncompressed vectors of the documents of `positives`, (n, D): this device's, n <= N.
        reconstruction: The same after compression, (n, E).
        positives: Rows of `documents` that are positives, (B,).
        log_assignment: log-probability of the codes of `documents`, (n,), or None.
        teacher_queries: Vectors of the frozen teacher, (B, D), or None.
        teacher_candidates: The same for the candidates, (N, D), or None.
        document_keys: Keys of `documents`, (n,).
        mapped: `documents` in the head's own space, (n, E); None where that is the towers'.
        candidate_mapped: The same for the candidates, (N, E), or None.
        given: A teacher's scores of each query's positive and the H candidates after it, nan where it gave none,
            (B, 1 + H); or None.
    """

    metric: Metric
    queries: Float[Tensor, "B D"]
    mapped_queries: Float[Tensor, "B E"]
    candidates: Float[Tensor, "N D"]
    candidate_reconstruction: Float[Tensor, "N E"]
    candidate_coarse: Float[Tensor, "N E"] | None
    keys: Int[Tensor, " N"]
    relevant: Int[Tensor, "B R"]
    labels: Int[Tensor, " B"]
    documents: Float[Tensor, "n D"]
    reconstruction: Float[Tensor, "n E"]
    positives: Int[Tensor, " B"]
    log_assignment: Float[Tensor, " n"] | None
    teacher_queries: Float[Tensor, "B D"] | None
    teacher_candidates: Float[Tensor, "N D"] | None
    document_keys: Int[Tensor, " n"]
    mapped: Float[Tensor, "n E"] | None
    candidate_mapped: Float[Tensor, "N E"] | None
    given: Float[Tensor, "B some"] | None = None

    def score(self, rows: slice = slice(None)) -> ScoredBatch:
        """Return the scores of some queries, by default of all, with all candidates."""
        labels, mapped_queries = self.labels[rows], self.mapped_queries[rows]
        dense = score_matrix(self.queries[rows], self.candidates, self.metric)
        compressed, coarse, teacher = dense, None, None
        same = self.candidate_reconstruction is self.candidates and self.mapped_queries is self.queries
        if not same:  # as they are before the head's start
            compressed = score_matrix(mapped_queries, self.candidate_reconstruction, self.metric)
        if self.candidate_coarse is not None:
            coarse = score_matrix(mapped_queries, self.candidate_coarse, self.metric)
        if self.teacher_queries is not None and self.teacher_candidates is not None:
            teacher = score_matrix(self.teacher_queries[rows], self.teacher_candidates, self.metric)
        if self.given is not None:
            columns = labels[:, None] + torch.arange(self.given.shape[1], device=labels.device)
            teacher = torch.full_like(dense, float("nan")).scatter(
                1, columns, self.given[rows].to(dense.dtype)
            )
        repeated = repeated_documents(self.keys, labels)
        return ScoredBatch(
            dense=dense,
            compressed=compressed,
            labels=labels,
            ignore=other_relevant(self.keys, self.relevant[rows], labels) | repeated,
            repeated=repeated,
            documents=self.documents,
            reconstruction=self.reconstruction,
            positives=self.positives[rows],
            log_assignment=self.log_assignment,
            coarse=coarse,
            teacher=teacher,
            pairs=self._pairs(),
        )

    def _pairs(self) -> DocumentPairs | None:
        if self.mapped is None or self.candidate_mapped is None:
            return None
        return DocumentPairs(
            documents=self.documents,
            mapped=self.mapped,
            other_documents=self.candidates,
            other_mapped=self.candidate_mapped,
            same=self.document_keys[:, None] == self.keys,
        )


Teacher = tuple[Tensor, Tensor]
"""Vectors of the frozen teacher for a batch's queries, (B, D), and documents, (n, D)."""


def score_batch(
    vectors: Embeddings,
    batch: TokenBatch,
    *,
    metric: Metric,
    mode: CrossDevice,
    teacher: Teacher | None = None,
) -> ScoredBatch:
    """Return the scores of this device's queries, or in mode `full` of all queries; see `join_batch`."""
    return join_batch(vectors, batch, metric=metric, mode=mode, teacher=teacher).score()


def join_batch(
    vectors: Embeddings,
    batch: TokenBatch,
    *,
    metric: Metric,
    mode: CrossDevice,
    teacher: Teacher | None = None,
) -> JoinedBatch:
    """Bring together what is scored on this device.

    Args:
        vectors: Queries, documents and the head's output on them.
        batch: Where they come from.
        metric: Score contract.
        mode: Which documents are scored; see the module.
        teacher: Vectors of the frozen teacher for the same queries and documents.
    """
    join, head, own = JOIN[mode], vectors.compressed, len(vectors.documents)
    candidates = join(vectors.documents)
    same = head.reconstruction is vectors.documents
    reconstruction = candidates if same else join(head.reconstruction)
    keys = all_gather(batch.document_keys) if mode != "in_batch" else batch.document_keys
    queries, mapped_queries = vectors.queries, vectors.mapped_queries
    relevant, positives = batch.relevant_keys, batch.positives
    labels = positives + (_rank() * own if mode != "in_batch" else 0)
    parts, mapped, log_assignment = (vectors.documents, head.reconstruction), head.mapped, head.log_assignment
    document_keys, candidate_mapped = batch.document_keys, None if mapped is None else join(mapped)
    given = batch.teacher_scores
    teacher_queries, teacher_candidates = teacher or (None, None)
    if teacher_candidates is not None and mode != "in_batch":
        teacher_candidates = all_gather(teacher_candidates)
    if mode == "full":
        queries, mapped_queries = gather_detached(queries), gather_detached(mapped_queries)
        relevant = gather_padded(relevant)
        labels = positives = all_gather(labels)
        parts, mapped, document_keys = (candidates, reconstruction), candidate_mapped, keys
        given = None if given is None else all_gather(given)
        log_assignment = None if log_assignment is None else gather_detached(log_assignment)
        teacher_queries = None if teacher_queries is None else all_gather(teacher_queries)
    return JoinedBatch(
        metric=metric,
        queries=queries,
        mapped_queries=mapped_queries,
        candidates=candidates,
        candidate_reconstruction=reconstruction,
        candidate_coarse=None if head.coarse is None else join(head.coarse),
        keys=keys,
        relevant=relevant,
        labels=labels,
        documents=parts[0],
        reconstruction=parts[1],
        positives=positives,
        log_assignment=log_assignment,
        teacher_queries=teacher_queries,
        teacher_candidates=teacher_candidates,
        document_keys=document_keys,
        mapped=mapped,
        candidate_mapped=candidate_mapped,
        given=given,
    )


def repeated_documents(keys: Int[Tensor, " N"], labels: Int[Tensor, " B"]) -> Bool[Tensor, "B N"]:
    """Mark documents that stand in another column already, so that none counts twice.

    Of equal documents the first counts, but a query's positive always does, and then its copies do not.
    """
    _, group = keys.unique(return_inverse=True)
    columns = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(keys, len(keys)).scatter_reduce_(0, group, columns, "amin")
    repeated = (first[group] != columns) | (keys == keys[labels][:, None])
    return repeated.scatter(1, labels[:, None], False)


def _rank() -> int:
    return torch.distributed.get_rank() if world_size() > 1 else 0

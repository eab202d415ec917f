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

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from retriever import Embeddings, TokenBatch
from retriever.data import other_relevant
from retriever.distributed import all_gather, gather_detached, gather_padded, world_size
from retriever.scores import Metric, score_matrix
from training.losses import ScoredBatch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["CrossDevice", "repeated_documents", "score_batch"]

CrossDevice = Literal["in_batch", "detached", "rows", "full"]

JOIN = {"in_batch": lambda x: x, "detached": gather_detached, "rows": all_gather, "full": gather_detached}


def score_batch(
    vectors: Embeddings,
    batch: TokenBatch,
    *,
    metric: Metric,
    mode: CrossDevice,
    teacher: tuple[Float[Tensor, "B D"], Float[Tensor, "n D"]] | None = None,
) -> ScoredBatch:
    """Return the scores of this device's queries, or in mode `full` of all queries.

    Args:
        vectors: Queries, documents and the head's output on them.
        batch: Where they come from.
        metric: Score contract.
        mode: Which documents are scored; see the module.
        teacher: Vectors of the frozen teacher for the same queries and documents.
    """
    join, head, own = JOIN[mode], vectors.compressed, len(vectors.documents)
    documents, reconstruction = join(vectors.documents), join(head.reconstruction)
    keys = all_gather(batch.document_keys) if mode != "in_batch" else batch.document_keys
    queries, mapped_queries = vectors.queries, vectors.mapped_queries
    relevant, positives = batch.relevant_keys, batch.positives
    labels = positives + (_rank() * own if mode != "in_batch" else 0)
    parts, mapped, log_assignment = (vectors.documents, head.reconstruction), head.mapped, head.log_assignment
    if mode == "full":
        queries, mapped_queries = gather_detached(queries), gather_detached(mapped_queries)
        relevant = gather_padded(relevant)
        labels = positives = all_gather(labels)
        parts = (documents, reconstruction)
        mapped = None if mapped is None else gather_detached(mapped)
        log_assignment = None if log_assignment is None else gather_detached(log_assignment)
    repeated = repeated_documents(keys, labels)
    return ScoredBatch(
        dense=score_matrix(queries, documents, metric),
        compressed=score_matrix(mapped_queries, reconstruction, metric),
        labels=labels,
        ignore=other_relevant(keys, relevant, labels) | repeated,
        repeated=repeated,
        documents=parts[0],
        reconstruction=parts[1],
        positives=positives,
        log_assignment=log_assignment,
        coarse=None if head.coarse is None else score_matrix(mapped_queries, join(head.coarse), metric),
        teacher=None if teacher is None else _teacher_scores(teacher, metric, mode),
        mapped=mapped,
    )


def _teacher_scores(teacher: tuple[Tensor, Tensor], metric: Metric, mode: CrossDevice) -> Tensor:
    queries, documents = teacher
    if mode == "full":
        queries = all_gather(queries)
    return score_matrix(queries, documents if mode == "in_batch" else all_gather(documents), metric)


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

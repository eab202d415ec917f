"""The training corpus as vectors and codes: for towers that are frozen, and for live negatives.

Shapes: n documents, D dimensions, E dimensions in the head's space, B queries, R known relevant documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from retriever import Document
from retriever.data import document_key
from retriever.heads import CompressionHead
from retriever.scores import score_matrix

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["Embed", "TrainingCorpus"]

Embed = Callable[[Sequence[Document]], Tensor]
"""Documents -> their vectors, (n, D)."""
ROWS_AT_ONCE = 65_536  # documents scored at once: bounds the (rows, D) reconstruction and (B, rows) scores


class TrainingCorpus(nn.Module):
    """Documents by row. The codes are part of the state, so that a resumed run finds the same negatives.

    Args:
        documents: All documents that may be met in training, by row; they may lie on disk.
        num_codes: Codes kept of a document, 0 for none.
        code_dtype: Of the codes kept: uint8 where they are all below 256.
        keys: Keys of the documents' ids, (n,), where they are known.
    """

    codes: Tensor

    def __init__(
        self,
        documents: Sequence[Document],
        num_codes: int = 0,
        *,
        code_dtype: torch.dtype = torch.int32,
        keys: Int[Tensor, " n"] | None = None,
    ) -> None:
        super().__init__()
        self.documents = documents
        if keys is None:
            keys = torch.tensor([document_key(document.id) for document in documents])
        self.keys = keys
        self._sorted_keys, self._order = keys.sort(stable=True)
        self.vectors: Tensor | None = None  # (n, D), set where the document tower is frozen
        self.register_buffer("codes", torch.zeros(len(documents), num_codes, dtype=code_dtype))

    def embed(self, embed: Embed) -> None:
        """Keep the vectors of all documents."""
        self.vectors = embed(self.documents)

    def rows(self, keys: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return the rows of documents, -1 for a key that is of none."""
        wanted = keys.cpu()
        places = torch.searchsorted(self._sorted_keys, wanted).clamp(max=len(self._order) - 1)
        rows = self._order[places].masked_fill(self._sorted_keys[places] != wanted, -1)
        return rows.to(keys.device)

    @torch.no_grad()
    def encode(self, head: CompressionHead, embed: Embed) -> None:
        """Keep the codes of all documents, made block by block of vectors that are not kept."""
        for start in range(0, len(self.documents), ROWS_AT_ONCE):
            block = slice(start, start + ROWS_AT_ONCE)
            vectors = embed(self.documents[block]) if self.vectors is None else self.vectors[block]
            self.codes[block] = head.encode(vectors.to(self.codes.device)).to(self.codes.dtype)

    @torch.no_grad()
    def renew(self, keys: Int[Tensor, " N"], codes: Int[Tensor, "N M"]) -> None:
        """Keep new codes of some documents; where a document comes several times, its first."""
        rows, group = self.rows(keys).unique(return_inverse=True)
        places = torch.arange(len(keys), device=keys.device)
        first = torch.full_like(rows, len(keys)).scatter_reduce_(0, group, places, "amin")
        self.codes[rows] = codes[first].to(self.codes.dtype)

    @torch.no_grad()
    def limits(
        self,
        queries: Float[Tensor, "B D"],
        positives: Int[Tensor, " B"],
        head: CompressionHead,
        *,
        margin: float | None,
        max_relative: float | None,
        compressed: bool,
    ) -> Float[Tensor, " B"] | None:
        """Return the score above which a document may be relevant without anyone having said so.

        Args:
            queries: Query vectors.
            positives: Keys of their positives, whose scores s are the measure.
            head: Decodes, and has the score contract.
            margin: At most s - margin.
            max_relative: At most s - (1 - max_relative) |s|: for s > 0 the TopK-PercPos of NV-Retriever
                (arXiv:2407.15831, section 3.2).
            compressed: Score by the codes; else by the uncompressed vectors.
        """
        if margin is None and max_relative is None:
            return None
        if compressed:
            queries = head.map_queries(queries)
        documents = self._reconstruct(head, self.rows(positives), compressed)
        scores = score_matrix(queries, documents, head.metric).diagonal()
        limit = torch.full_like(scores, float("inf"))
        if margin is not None:
            limit = limit.minimum(scores - margin)
        if max_relative is not None:
            limit = limit.minimum(scores - (1 - max_relative) * scores.abs())
        return limit

    @torch.no_grad()
    def hardest(
        self,
        queries: Float[Tensor, "B D"],
        relevant_keys: Int[Tensor, "B R"],
        head: CompressionHead,
        *,
        count: int,
        depth: int,
        compressed: bool,
        limits: Float[Tensor, " B"] | None = None,
    ) -> Int[Tensor, " B*count"]:
        """Return rows of documents that score high and are not known to be relevant; -1 where no more are left.

        Args:
            queries: Query vectors.
            relevant_keys: Keys of each query's relevant documents, zero-padded.
            head: Decodes, and has the score contract.
            count: Documents a query.
            depth: They are chosen at random among so many best, or are the best if `count` is as large.
            compressed: Score by the codes; else by the uncompressed vectors.
            limits: Documents that score higher for a query are left out.
        """
        if compressed:
            queries = head.map_queries(queries)
        width = relevant_keys.shape[1]
        wanted = min(depth + width, len(self.documents))  # the relevant ones are taken out afterwards
        best_scores = queries.new_empty(len(queries), 0)
        best_rows = relevant_keys.new_empty(len(queries), 0)
        for start in range(0, len(self.documents), ROWS_AT_ONCE):
            documents = self._reconstruct(head, slice(start, start + ROWS_AT_ONCE), compressed)
            scores = score_matrix(queries, documents, head.metric)
            if limits is not None:
                scores = scores.masked_fill(scores > limits[:, None], float("-inf"))
            found = scores.topk(min(wanted, scores.shape[1]))
            best_scores = torch.cat([best_scores, found.values], 1)
            best_rows = torch.cat([best_rows, found.indices + start], 1)
            best = best_scores.topk(min(wanted, best_scores.shape[1]))
            best_scores, best_rows = best.values, best_rows.gather(1, best.indices)
        relevant = self.rows(relevant_keys)
        best_rows = best_rows.masked_fill(best_scores.isneginf(), -1)
        hit = (best_rows[:, :, None] == relevant[:, None, :]).any(-1) | (best_rows < 0)
        order = hit.to(torch.uint8).argsort(dim=1, stable=True)  # those not relevant first, best first
        ranked = best_rows.gather(1, order)[:, :depth]
        if count < ranked.shape[1]:
            last = hit.gather(1, order)[:, :depth]  # in a small corpus: drawn only when nothing else is left
            draw = torch.rand(ranked.shape, device=ranked.device) + last
            ranked = ranked.gather(1, draw.argsort(1)[:, :count])
        return ranked.flatten()

    def _reconstruct(
        self, head: CompressionHead, rows: slice | Int[Tensor, " rows"], compressed: bool
    ) -> Float[Tensor, "rows E"]:
        if compressed:
            return head.decode(self.codes[rows].long())
        assert self.vectors is not None, (
            "experiment checks that dense live negatives come with frozen documents"
        )
        return self.vectors[rows]

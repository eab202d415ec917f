"""Hard negatives through an index: what it ranks high for a training query and nobody judged relevant.

Shapes: B queries at once, k results, D dimensions.

Queries go through the index in batches, texts are read one by one where a filter needs them: memory does not grow with
the corpus. Documents that are relevant without a judgement are the danger; NV-Retriever (arXiv:2407.15831, section 3.2)
compares the filters.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from index import Searcher
from retriever import (
    Document,
    DualEncoder,
    InputError,
    Precision,
    Qrels,
    Query,
    embed_documents,
    embed_queries,
)
from retriever.scores import score_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MinedNegatives", "Miner", "MiningConfig"]

Hit = tuple[int, float]
"""Row of a document in the index, and its score."""


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """Which documents become negatives. Ranks count documents that are not relevant, from 1.

    Attributes:
        per_query: Negatives a query at most.
        skip: Best ranks passed over.
        depth: Last rank looked at.
        pick: The "first" of those left, or "random" ones.
        margin: Leave out documents that score higher than the query's best positive less this; None does not.
        max_relative: Leave out documents that score higher than this share of the positive's score (NV-Retriever:
            0.95); None does not.
        same_text: Leave out copies: documents with the text of a positive or of a better ranked negative. Needs an
            index with texts.
        seed: Seed of the random picks; each query's depend on its id alone.
    """

    per_query: int = 7
    skip: int = 0
    depth: int = 100
    pick: Literal["first", "random"] = "first"
    margin: float | None = None
    max_relative: float | None = None
    same_text: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_query < 1:
            raise InputError(f"per_query must be at least 1, got {self.per_query}.")
        if not 0 <= self.skip < self.depth:
            raise InputError(f"skip must be 0 or more and below depth, got {self.skip} and {self.depth}.")
        if self.pick not in ("first", "random"):
            raise InputError(f"pick must be first or random, got {self.pick!r}.")
        if self.margin is not None and not 0 <= self.margin < float("inf"):
            raise InputError(f"margin must be 0 or more, got {self.margin}.")
        if self.max_relative is not None and not 0 < self.max_relative <= 1:
            raise InputError(f"max_relative must be above 0 and at most 1, got {self.max_relative}.")

    def limit(self, positive: float) -> float:
        """Return the highest score that a negative of a query may have, from its positive's."""
        margin = 0.0 if self.margin is None else self.margin
        share = 1.0 if self.max_relative is None else self.max_relative
        return min(positive - margin, positive - (1 - share) * abs(positive))

    @property
    def compares(self) -> bool:
        """Whether negatives are compared with their positive."""
        return self.margin is not None or self.max_relative is not None


@dataclass(frozen=True, slots=True)
class MinedNegatives:
    """What was found for a query.

    Attributes:
        query: Its id.
        negatives: Rows of the negatives with their scores, best first.
        positives: Rows of the positives with their scores, as far as known.
    """

    query: str
    negatives: list[Hit]
    positives: list[Hit] = field(default_factory=list)


class Miner:
    """Mines an index.

    Args:
        searcher: The index.
        qrels: Judgements of the queries to mine for; documents judged above 0 are their positives.
        config: Which documents to take.
        teacher: A model whose uncompressed scores take the place of the index's in filters and results; it reads the
            texts of all documents looked at.
        precision: Arithmetic of the towers.

    Raises:
        InputError: If a positive is not in the index, or texts are needed and the index has none.
    """

    def __init__(
        self,
        searcher: Searcher,
        qrels: Qrels,
        config: MiningConfig,
        *,
        teacher: DualEncoder | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self.searcher, self.config, self.teacher, self.precision = searcher, config, teacher, precision
        self.relevant = {
            query: {document for document, score in judged.items() if score > 0}
            for query, judged in qrels.items()
        }
        self.rows = _find_rows(searcher, set().union(*self.relevant.values()))
        if (config.same_text or teacher) and searcher.document(0) is None:
            raise InputError(
                f"{searcher.folder} holds no texts. Set same_text false and give no teacher, or export with texts."
            )

    def mine(self, queries: Mapping[str, Query], *, batch_size: int = 256) -> Iterator[MinedNegatives]:
        """Yield the negatives of each query in order; a query for which none is left has an empty list.

        Args:
            queries: Their texts by id.
            batch_size: Queries searched at once.
        """
        names = [name for name, relevant in self.relevant.items() if relevant]
        for start in range(0, len(names), batch_size):
            batch = names[start : start + batch_size]
            texts = [queries[name] for name in batch]
            widest = max(len(self.relevant[name]) for name in batch)
            vectors = self.searcher.embed(texts, precision=self.precision)
            scores, rows = self.searcher.search_vectors(vectors, self.config.depth + widest)
            hits = [self._hits(s, r) for s, r in zip(scores, rows, strict=True)]
            positives = [[self.rows[d] for d in sorted(self.relevant[name])] for name in batch]
            looked_at = [
                [hit for hit in found if hit[0] not in own][self.config.skip : self.config.depth]
                for found, own in zip(hits, positives, strict=True)
            ]
            known = [
                [hit for hit in found if hit[0] in own] for found, own in zip(hits, positives, strict=True)
            ]
            if self.teacher is not None:
                looked_at, known = self._teach(self.teacher, texts, looked_at, positives)
            for name, found, own, rated in zip(batch, looked_at, positives, known, strict=True):
                yield MinedNegatives(name, self._choose(name, self._filter(found, own, rated)), rated)

    def _hits(self, scores: NDArray[np.float32], rows: NDArray[np.int64]) -> list[Hit]:
        """Return the results of a query; probed lists may hold fewer documents than asked for."""
        return [(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True) if row >= 0]

    def _filter(self, found: list[Hit], positives: Sequence[int], rated: Sequence[Hit]) -> list[Hit]:
        """Leave out what may be relevant.

        A positive without a score ranks below all that was looked at, so that nothing is left for its query.
        """
        if self.config.compares:
            limit = self.config.limit(max((score for _, score in rated), default=float("-inf")))
            found = [hit for hit in found if hit[1] <= limit]
        if not self.config.same_text:
            return found
        seen = {self._text(row) for row in positives}
        kept = []
        for hit in found:
            if (text := self._text(hit[0])) not in seen:
                seen.add(text)
                kept.append(hit)
        return kept

    def _choose(self, query: str, found: list[Hit]) -> list[Hit]:
        config = self.config
        if config.pick == "first" or len(found) <= config.per_query:
            return found[: config.per_query]
        chosen = random.Random(f"{config.seed}/{query}").sample(range(len(found)), config.per_query)
        return [found[place] for place in sorted(chosen)]

    def _teach(
        self, teacher: DualEncoder, texts: Sequence[Query], found: list[list[Hit]], positives: list[list[int]]
    ) -> tuple[list[list[Hit]], list[list[Hit]]]:
        """Return the same documents with the teacher's scores, best first, and the positives with theirs."""
        wanted = sorted({row for hits in found for row, _ in hits}.union(*positives))
        place = {row: number for number, row in enumerate(wanted)}
        documents = embed_documents(teacher, [self.document(row) for row in wanted], precision=self.precision)
        queries = embed_queries(teacher, texts, precision=self.precision)

        def rate(query: torch.Tensor, rows: Sequence[int]) -> list[Hit]:
            if not rows:
                return []
            own = documents[[place[row] for row in rows]]
            scores = score_matrix(query[None], own, teacher.head.metric)[0].tolist()
            return sorted(zip(rows, scores, strict=True), key=lambda hit: -hit[1])

        rated = [rate(q, [row for row, _ in hits]) for q, hits in zip(queries, found, strict=True)]
        return rated, [rate(q, rows) for q, rows in zip(queries, positives, strict=True)]

    def document(self, row: int) -> Document:
        """Return the text of a document of the index."""
        document = self.searcher.document(row)
        assert document is not None, "the constructor saw that texts are there"
        return document

    def _text(self, row: int) -> tuple[str, str]:
        document = self.document(row)
        return document.title, document.text


def _find_rows(searcher: Searcher, wanted: set[str]) -> dict[str, int]:
    """Return the rows of some documents, without holding the ids of the others."""
    rows = {name: row for row, name in enumerate(searcher.document_ids) if name in wanted}
    if missing := sorted(wanted - rows.keys()):
        raise InputError(
            f"the relevant document {missing[0]!r} is not in the index {searcher.folder}. "
            "Mine with the data set whose corpus was exported."
        )
    return rows

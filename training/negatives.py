"""Which pairs form a batch, and which documents count as negatives.

Shapes: B queries a step over all devices, H given negatives a query.

In-batch negatives are the other documents of the batch on every device (`retriever.distributed.all_gather`);
documents known to be relevant are left out of the softmax. Given negatives come from the data folder.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from retriever import RetrievalData, TextPair
from retriever.disk import document_ids
from retriever.errors import InputError

__all__ = ["BatchPlan", "PairDataset"]

Draw = tuple[int, int]
"""Row of a pair, and the seed of its random choice of negatives."""


class PairDataset(torch.utils.data.Dataset[TextPair]):
    """All (query, relevant document) pairs of a split.

    Args:
        data: Documents, queries, judgements, given negatives.
        negatives_per_query: H. A query with fewer given negatives is filled up with random documents.
    """

    def __init__(self, data: RetrievalData, negatives_per_query: int = 0) -> None:
        self.data = data
        self.negatives_per_query = negatives_per_query
        self.rows = [
            (query, document)
            for query, judged in data.qrels.items()
            for document, score in judged.items()
            if score > 0
        ]
        self._document_ids = document_ids(data.documents) if negatives_per_query else []
        needed = negatives_per_query + max(map(len, data.qrels.values()), default=0)
        if negatives_per_query and len(self._document_ids) <= needed:
            raise InputError(
                f"negatives_per_query={negatives_per_query} is too much for a corpus of {len(self._document_ids)} "
                "documents. Lower it."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> TextPair:
        """Return a pair with its negatives drawn from the seed."""
        row, seed = draw
        query, positive = self.rows[row]
        judged = self.data.qrels[query]
        relevant = tuple(document for document, score in judged.items() if score > 0)
        negatives = (
            self._negatives(query, set(relevant), random.Random(seed)) if self.negatives_per_query else []
        )
        scores = self.data.scores.get(query, {})
        return TextPair(
            query=self.data.queries[query],
            positive=self.data.documents[positive],
            negatives=tuple(self.data.documents[document] for document in negatives),
            relevant_ids=relevant,
            teacher_scores=tuple(scores.get(document, math.nan) for document in (positive, *negatives))
            if self.data.scores
            else None,
        )

    def length(self, row: int) -> int:
        """Return the characters of a pair's document."""
        document = self.data.documents[self.rows[row][1]]
        return len(document.title) + len(document.text)

    def _negatives(self, query: str, relevant: set[str], generator: random.Random) -> list[str]:
        given = [document for document in self.data.negatives.get(query, []) if document not in relevant]
        chosen = generator.sample(given, min(self.negatives_per_query, len(given)))
        while len(chosen) < self.negatives_per_query:
            candidate = generator.choice(self._document_ids)
            if candidate not in relevant and candidate not in chosen:
                chosen.append(candidate)
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Which pairs every step uses: a pure function of seed and step, whatever the number of processes.

    An epoch is a permutation. Windows of `bucket_batches` batches are sorted by length and cut into batches,
    whose order is shuffled again: little padding, and random batches. The incomplete last batch is left out.

    Attributes:
        lengths: Length of every pair's document.
        batch_size: B, queries a step over all devices.
        seed: Seed of the permutations.
        bucket_batches: Batches sorted together; 1 leaves the order random.
    """

    lengths: list[int]
    batch_size: int
    seed: int
    bucket_batches: int = 16

    def __post_init__(self) -> None:
        if len(self.lengths) < self.batch_size:
            raise InputError(
                f"batch_size={self.batch_size} is more than the {len(self.lengths)} training pairs. "
                "Lower optimization.batch_size or give more pairs."
            )

    @property
    def batches_per_epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.lengths) // self.batch_size

    def steps(self, start: int, stop: int, part: slice) -> Iterator[list[Draw]]:
        """Yield `part` of the batch of each step from `start` to `stop` - 1."""
        step = start
        while step < stop:
            epoch, first = divmod(step, self.batches_per_epoch)
            batches = self._epoch(epoch)[first : first + stop - step]
            for batch in batches:
                yield batch[part]
            step += len(batches)

    def _epoch(self, epoch: int) -> list[list[Draw]]:
        generator = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        del order[
            self.batches_per_epoch * self.batch_size :
        ]  # before sorting, or it would always be the longest
        window = self.batch_size * self.bucket_batches
        batches = []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        generator.shuffle(batches)
        return [[(row, generator.getrandbits(62)) for row in batch] for batch in batches]

"""The sets of pairs that a run trains on, and which of them each batch is from.

A batch is from one set, so that its in-batch negatives are of that set, too: documents of another set are told apart
too easily. Sets take turns at random, as often as their weights and sizes say.
"""

from __future__ import annotations

import random
import sys
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, count, islice
from typing import TypeVar

import torch

from retriever import InputError, RetrievalData, TextPair, read_corpus, read_data
from retriever.beir import read_scores
from retriever.disk import JoinedDocuments, NamedDocuments, joined_name, open_documents
from retriever.pseudo_queries import pseudo_queries
from retriever.vectors import is_vectors
from training.experiment import DataConfig
from training.negatives import BatchPlan, Draw, PairDataset

T = TypeVar("T")

__all__ = ["MixedPairs", "MixedPlan", "join_sets", "read_pseudo", "read_sets", "without_copies"]


def read_sets(config: DataConfig, *, scored: bool = False) -> list[RetrievalData]:
    """Return the data of each set; in memory, copies of documents count as one.

    Args:
        config: The sets.
        scored: Also read the teacher's scores of given negatives and positives.

    Raises:
        InputError: If a set cannot be read.
    """
    on_disk, sets = config.texts == "disk", []
    for one in config.sets:
        data = (
            read_pseudo(one.source, on_disk=on_disk)
            if config.labels == "pseudo"
            else read_data(one.source, one.train_split, on_disk=on_disk)
        )
        if scored:
            data = replace(data, scores=read_scores(one.source, data.documents))
            _check_scored(data, one.source)
        sets.append(data if on_disk or is_vectors(one.source) else without_copies(data))
    return sets


def read_pseudo(source: str, *, on_disk: bool = False) -> RetrievalData:
    """Return the corpus of a set with queries made of its documents.

    Raises:
        InputError: If the set cannot be read, or is of vectors.
    """
    if is_vectors(source):
        raise InputError(
            f"data.labels pseudo makes queries of texts, and {source} holds vectors. Choose judged."
        )
    if on_disk:
        return pseudo_queries(open_documents(source))
    return pseudo_queries({document.id: document for document in read_corpus(source)})


def _check_scored(data: RetrievalData, source: str) -> None:
    """Raise InputError if a positive has no score of the teacher."""
    for query, judged in data.qrels.items():
        for document, score in judged.items():
            if score > 0 and document not in data.scores.get(query, {}):
                raise InputError(
                    f"{source} has no teacher's score of the query {query!r} and its relevant document {document!r}. "
                    "Write negatives.jsonl with positive_scores: endex mine --teacher MODEL."
                )


def without_copies(data: RetrievalData) -> RetrievalData:
    """Return the data with documents of equal title and text as one, the first: else they would be negatives.

    Documents without a text have no copies.
    """
    first: dict[tuple[str, str], str] = {}
    name = {
        document.id: first.setdefault((document.title, document.text), document.id)
        for document in data.documents.values()
        if document.title or document.text
    }
    if len(first) == len(name):
        return data
    copies = {copy for copy, original in name.items() if copy != original}

    def renamed(judged: Mapping[str, int]) -> dict[str, int]:
        best: dict[str, int] = {}
        for document, score in judged.items():
            best[name[document]] = max(score, best.get(name[document], score))
        return best

    return RetrievalData(
        {one: document for one, document in data.documents.items() if one not in copies},
        data.queries,
        {query: renamed(judged) for query, judged in data.qrels.items()},
        {query: list(dict.fromkeys(name[d] for d in given)) for query, given in data.negatives.items()},
        {query: {name[d]: score for d, score in scores.items()} for query, scores in data.scores.items()},
    )


def join_sets(sets: Sequence[RetrievalData]) -> tuple[RetrievalData, list[RetrievalData]]:
    """Return several sets as one, and each by itself, all with the names of the joined set."""
    if len(sets) == 1:
        return sets[0], list(sets)
    documents = [NamedDocuments(number, data.documents) for number, data in enumerate(sets)]
    parts = [_renamed(number, data, documents[number]) for number, data in enumerate(sets)]
    whole = RetrievalData(
        JoinedDocuments(documents),
        _union(part.queries for part in parts),
        _union(part.qrels for part in parts),
        _union(part.negatives for part in parts),
        _union(part.scores for part in parts),
    )
    return whole, parts


def _renamed(number: int, data: RetrievalData, documents: NamedDocuments) -> RetrievalData:
    def name(one: str) -> str:
        return joined_name(number, one)

    def named(values: Mapping[str, T]) -> dict[str, T]:
        return {name(one): value for one, value in values.items()}

    return RetrievalData(
        documents,
        named(data.queries),
        {name(query): named(judged) for query, judged in data.qrels.items()},
        {name(query): list(map(name, given)) for query, given in data.negatives.items()},
        {name(query): named(scores) for query, scores in data.scores.items()},
    )


def _union(parts: Iterable[Mapping[str, T]]) -> dict[str, T]:
    return {name: value for part in parts for name, value in part.items()}


class MixedPairs(torch.utils.data.Dataset[TextPair]):
    """The pairs of all sets, one set after the other."""

    def __init__(self, sets: Sequence[PairDataset]) -> None:
        self.sets = sets
        self.ends = list(accumulate(map(len, sets)))
        self.rows = [pair for one in sets for pair in one.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> TextPair:
        """Return a pair with its negatives drawn from the seed."""
        row, seed = draw
        number = bisect(self.ends, row)
        return self.sets[number][row - (self.ends[number - 1] if number else 0), seed]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPlan:
    """Which pairs of several sets every step uses: a pure function of seed and step, as each set's `BatchPlan`.

    In an epoch a set has round(weight x its batches) batches, at least one, in an order drawn anew; through the epochs
    they go on where the last epoch ended, so that every pair of a set is seen as often as any other.

    Attributes:
        plans: The sets' plans; each counts its pairs from 0.
        weights: How often pairs of a set are seen in an epoch, on average.
        seed: Seed of the order.
    """

    plans: list[BatchPlan]
    weights: list[float]
    seed: int

    @property
    def counts(self) -> list[int]:
        """Batches of each set in an epoch."""
        return [
            max(1, round(weight * plan.batches_per_epoch))
            for plan, weight in zip(self.plans, self.weights, strict=True)
        ]

    @property
    def batches_per_epoch(self) -> int:
        """Steps of an epoch."""
        return sum(self.counts)

    def steps(self, start: int, stop: int, part: slice) -> Iterator[list[Draw]]:
        """Yield `part` of the batch of each step from `start` to `stop` - 1."""
        epoch, done = divmod(start, self.batches_per_epoch)
        past = self._order(epoch)[:done]
        batches = [
            plan.steps(epoch * batches + past.count(number), sys.maxsize, part)
            for number, (plan, batches) in enumerate(zip(self.plans, self.counts, strict=True))
        ]
        first = [0, *accumulate(len(plan.lengths) for plan in self.plans)]
        order = chain.from_iterable(map(self._order, count(epoch)))
        for number in islice(order, done, done + stop - start):
            yield [(first[number] + row, seed) for row, seed in next(batches[number])]

    def _order(self, epoch: int) -> list[int]:
        """Return the set of every batch of an epoch."""
        order = [number for number, batches in enumerate(self.counts) for _ in range(batches)]
        random.Random(f"{self.seed}/sets/{epoch}").shuffle(order)
        return order

"""Retrieval quality, dense and through the codes.

Shapes: B queries, n documents, D dimensions, k results.

Measures are those of trec_eval by ir-measures. Compressed scores often tie, because documents share codes;
trec_eval orders equal scores by document id, falling, and so do these figures, whatever the order of the hits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from heapq import nsmallest
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from index import Searcher
from retriever import (
    DualEncoder,
    InputError,
    Precision,
    Qrels,
    RetrievalData,
    embed_documents,
    embed_queries,
)
from retriever.distributed import all_gather, world_size
from retriever.scores import Metric, score_matrix

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "MEASURES",
    "Run",
    "evaluate_index",
    "evaluate_model",
    "measure",
    "search_exhaustively",
    "select_evaluation",
]

MEASURES = ("ndcg@10", "mrr@10", "recall@1", "recall@10", "recall@100")
DEPTH = 100  # results a query that the measures look at
Run = dict[str, dict[str, float]]
"""Query id -> document id -> score."""
T = TypeVar("T")


def measure(qrels: Qrels, run: Run) -> dict[str, float]:
    """Return the mean of every measure over the judged queries; a query without results counts as 0."""
    from ir_measures import RR, R, calc_aggregate, nDCG

    wanted = {"ndcg@10": nDCG @ 10} | {f"recall@{k}": R @ k for k in (1, 10, 100)}
    values = calc_aggregate(wanted.values(), qrels, run)
    first_ten = {
        query: dict(sorted(found.items(), key=_trec_order, reverse=True)[:10]) for query, found in run.items()
    }
    # RR with a cutoff would be another tool's in ir-measures, with other ties
    values[RR] = calc_aggregate([RR], qrels, first_ten)[RR]
    return {name: float(values[wanted.get(name, RR)]) for name in MEASURES}


def _trec_order(hit: tuple[str, float]) -> tuple[float, bytes]:
    """Sort key of trec_eval, to be reversed: score, then the document id's bytes."""
    return hit[1], hit[0].encode()


def search_exhaustively(
    queries: Float[Tensor, "B D"],
    documents: Float[Tensor, "n D"],
    k: int,
    *,
    metric: Metric = "inner_product",
    rows_at_once: int = 256,
) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
    """Return the k highest scores of every query and the rows of their documents."""
    parts = [
        score_matrix(rows, documents, metric).topk(min(k, len(documents)))
        for rows in queries.split(rows_at_once)
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def select_evaluation(data: RetrievalData, *, queries: int = 0, documents: int = 0) -> RetrievalData:
    """Return a smaller evaluation: queries and documents chosen by hash, all judged documents of them kept.

    Args:
        data: The whole evaluation.
        queries: Queries kept, 0 for all.
        documents: Documents kept, 0 for all.
    """
    chosen = sorted(data.qrels, key=_hash)[: queries or None]
    qrels = {query: data.qrels[query] for query in chosen}
    judged = {document for row in qrels.values() for document in row}
    others = (document for document in data.documents if document not in judged)
    keep = judged.union(nsmallest(max(0, documents - len(judged)), others, _hash) if documents else others)
    return RetrievalData(
        {name: data.documents[name] for name in data.documents if name in keep},
        {query: data.queries[query] for query in chosen},
        qrels,
    )


def evaluate_model(
    model: DualEncoder, data: RetrievalData, *, batch_size: int = 64, precision: Precision = "fp32"
) -> dict[str, float]:
    """Return `dense/...` and, if the head compresses, `compressed/...` measures by exhaustive search.

    In a distributed run every process embeds and searches its share; all must call this together.
    """
    documents, ids = list(data.documents.values()), list(data.documents)
    device = model.device
    x = embed_in_shares(
        documents,
        lambda part: embed_documents(model, part, batch_size=batch_size, precision=precision),
        device,
    )
    names = list(data.qrels)
    texts = [data.queries[name] for name in names]
    q = embed_in_shares(
        texts, lambda part: embed_queries(model, part, batch_size=batch_size, precision=precision), device
    )
    results = {"dense": (q, x)}
    if model.head.config.name != "none":
        with torch.no_grad():
            parts = [model.head.decode(model.compress(part)) for part in x.split(4096)]
            results["compressed"] = (model.head.map_queries(q), torch.cat(parts))
    metrics = {}
    for kind, (queries, vectors) in results.items():
        scores, rows = _search_in_shares(queries, vectors, model.head.metric)
        found = measure(
            data.qrels, _run(names, scores.tolist(), [[ids[row] for row in r] for r in rows.tolist()])
        )
        metrics.update({f"{kind}/{name}": value for name, value in found.items()})
    return metrics


def _search_in_shares(
    queries: Float[Tensor, "B D"], documents: Float[Tensor, "n D"], metric: Metric
) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
    """Search this process's share of the queries and join the results of all."""
    if world_size() == 1:
        return search_exhaustively(queries, documents, DEPTH, metric=metric)

    def search(share: Sequence[int]) -> Tensor:
        scores, rows = search_exhaustively(queries[list(share)], documents, DEPTH, metric=metric)
        return torch.stack([scores.double(), rows.double()], 1)  # both are exact in float64

    found = embed_in_shares(range(len(queries)), search, queries.device)
    return found[:, 0], found[:, 1].long()


def evaluate_index(
    searcher: Searcher, data: RetrievalData, *, k: int = DEPTH, precision: Precision = "fp32"
) -> tuple[dict[str, float], Run]:
    """Return the measures of an index folder on judged queries, and the run.

    Raises:
        InputError: If a judged document is not in the index.
    """
    indexed = set(searcher.document_ids)
    missing = next((d for row in data.qrels.values() for d in row if d not in indexed), None)
    if missing is not None:
        raise InputError(
            f"the judged document {missing!r} is not in the index {searcher.folder}. "
            "Evaluate with the data set whose corpus was exported."
        )
    names = list(data.qrels)
    scores, ids = searcher.search([data.queries[name] for name in names], k, precision=precision)
    run = _run(names, scores.tolist(), ids)
    return measure(data.qrels, run), run


def _run(names: Sequence[str], scores: list[list[float]], ids: list[list[str]]) -> Run:
    """Return the run; a query may have fewer ids than scores where an index found no more."""
    return {name: dict(zip(i, s, strict=False)) for name, s, i in zip(names, scores, ids, strict=True)}


def _hash(identifier: str) -> bytes:
    return hashlib.sha1(identifier.encode(), usedforsecurity=False).digest()


def embed_in_shares(
    items: Sequence[T], embed: Callable[[Sequence[T]], Tensor], device: torch.device
) -> Tensor:
    """Embed this process's share of the items and join the shares of all."""
    shares = world_size()
    if shares == 1:
        return embed(items).to(device)
    size = -(-len(items) // shares)
    rank = torch.distributed.get_rank()
    own = list(items[rank * size : (rank + 1) * size])
    own += list(items[:1]) * (
        size - len(own)
    )  # all do as much: a sharded tower's forward pass is a collective
    return all_gather(embed(own).to(device).detach())[: len(items)]

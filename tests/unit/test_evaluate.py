"""Measures against formulas by hand and pytrec_eval itself, with ties as trec_eval orders them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import pytrec_eval
import torch

from retriever import (
    Document,
    DualEncoder,
    InputError,
    Qrels,
    RetrievalData,
    embed_documents,
    embed_queries,
    read_data,
)
from retriever.heads import NoCompressionConfig, ProductQuantizerConfig
from retriever.scores import Metric
from training.evaluate import (
    MEASURES,
    Run,
    evaluate_index,
    evaluate_model,
    measure,
    search_exhaustively,
    select_evaluation,
)


@pytest.fixture
def fresh() -> random.Random:
    """Fresh random numbers; pytest shows the seed of a test that fails."""
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    return random.Random(seed)


def ranking(scores: dict[str, float]) -> list[str]:
    """Order documents as trec_eval does: falling score, equal scores by falling id."""
    return sorted(scores, key=lambda document: (scores[document], document), reverse=True)


def ndcg_at_10(judged: dict[str, int], ranked: list[str]) -> float:
    gains = [max(judged.get(document, 0), 0) for document in ranked[:10]]
    ideal = sorted((max(score, 0) for score in judged.values()), reverse=True)[:10]
    dcg, best = (sum(g / math.log2(rank + 2) for rank, g in enumerate(row)) for row in (gains, ideal))
    return dcg / best if best else 0.0


def mrr_at_10(judged: dict[str, int], ranked: list[str]) -> float:
    hits = (1 / (rank + 1) for rank, document in enumerate(ranked[:10]) if judged.get(document, 0) > 0)
    return next(hits, 0.0)


def recall_at(k: int) -> Callable[[dict[str, int], list[str]], float]:
    def recall(judged: dict[str, int], ranked: list[str]) -> float:
        relevant = {document for document, score in judged.items() if score > 0}
        return len(relevant & set(ranked[:k])) / len(relevant) if relevant else 0.0

    return recall


BY_HAND = {
    "ndcg@10": ndcg_at_10,
    "mrr@10": mrr_at_10,
    "recall@1": recall_at(1),
    "recall@10": recall_at(10),
    "recall@100": recall_at(100),
}


def by_hand(name: str, qrels: Qrels, run: Run) -> float:
    return sum(BY_HAND[name](judged, ranking(run.get(q, {}))) for q, judged in qrels.items()) / len(qrels)


def random_judgements(fresh: random.Random, distinct_scores: int) -> tuple[Qrels, Run]:
    """Forty queries over 150 documents; scores from few values tie often."""
    documents = [f"d{fresh.getrandbits(20)}" for _ in range(150)]
    qrels, run = {}, {}
    for number in range(40):
        judged = fresh.sample(documents, fresh.randint(1, 15))
        qrels[f"q{number}"] = {document: fresh.randint(0, 3) for document in judged} | {judged[0]: 1}
        found = fresh.sample(documents, fresh.randint(1, 120))
        run[f"q{number}"] = {document: fresh.randrange(distinct_scores) / 4 for document in found}
    return qrels, run


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_equals_the_formula_on_distinct_scores(name: str, fresh: random.Random) -> None:
    qrels, run = random_judgements(fresh, 2**20)
    assert measure(qrels, run)[name] == pytest.approx(by_hand(name, qrels, run), abs=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_orders_equal_scores_as_trec_eval_does(name: str, fresh: random.Random) -> None:
    qrels, run = random_judgements(fresh, 4)
    assert measure(qrels, run)[name] == pytest.approx(by_hand(name, qrels, run), abs=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_does_not_depend_on_the_order_of_the_hits(name: str, fresh: random.Random) -> None:
    qrels, run = random_judgements(fresh, 4)
    shuffled = {q: dict(fresh.sample(list(row.items()), len(row))) for q, row in run.items()}
    assert measure(qrels, shuffled)[name] == measure(qrels, run)[name]


@pytest.mark.parametrize("name", MEASURES)
def test_a_judged_query_without_results_counts_as_zero(name: str, fresh: random.Random) -> None:
    qrels, run = random_judgements(fresh, 2**20)
    lost = fresh.choice(list(run))
    del run[lost]
    assert measure(qrels, run)[name] == pytest.approx(by_hand(name, qrels, run), abs=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_queries_without_judgements_do_not_count(name: str, fresh: random.Random) -> None:
    qrels, run = random_judgements(fresh, 2**20)
    extra = {**run, "unjudged": dict(run["q0"])}
    assert measure(qrels, extra)[name] == measure(qrels, run)[name]


def test_ndcg_equals_pytrec_eval_itself(fresh: random.Random) -> None:
    qrels, run = random_judgements(fresh, 6)
    values = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    expected = np.mean([row["ndcg_cut_10"] for row in values.values()])
    assert measure(qrels, run)["ndcg@10"] == pytest.approx(expected, abs=1e-12)


def scores_of(queries: np.ndarray, documents: np.ndarray, metric: Metric) -> np.ndarray:
    """Return the scores in float64: q . x, or 1 - |q - x|^2 / 2."""
    queries, documents = queries.astype(np.float64), documents.astype(np.float64)
    if metric == "inner_product":
        return queries @ documents.T
    return 1 - ((queries[:, None] - documents[None]) ** 2).sum(-1) / 2


@pytest.mark.parametrize("metric", get_args(Metric))
@pytest.mark.parametrize(("queries", "documents", "k"), [(7, 50, 10), (300, 40, 5), (3, 8, 20), (1, 1, 1)])
def test_exhaustive_search_sorts_all_scores(queries: int, documents: int, k: int, metric: Metric) -> None:
    numbers = np.random.default_rng()
    q, x = numbers.standard_normal((queries, 12)), numbers.standard_normal((documents, 12))
    scores, rows = search_exhaustively(torch.from_numpy(q), torch.from_numpy(x), k, metric=metric)
    expected = np.argsort(-scores_of(q, x, metric), axis=1)[:, :k]
    np.testing.assert_array_equal(rows.numpy(), expected)
    np.testing.assert_allclose(
        scores.numpy(), np.take_along_axis(scores_of(q, x, metric), expected, 1), atol=1e-11
    )


def make_data(fresh: random.Random) -> RetrievalData:
    ids = [f"d{i}" for i in range(200)]
    qrels = {f"q{i}": {document: fresh.randint(0, 1) for document in fresh.sample(ids, 3)} for i in range(30)}
    return RetrievalData({i: Document(i, "", i) for i in ids}, {q: q for q in qrels}, qrels)


@pytest.mark.parametrize(("queries", "documents"), [(10, 50), (30, 5), (1, 0), (0, 0), (0, 150)])
def test_a_selection_keeps_every_judged_document_of_its_queries(
    fresh: random.Random, queries: int, documents: int
) -> None:
    selected = select_evaluation(make_data(fresh), queries=queries, documents=documents)
    judged = {document for row in selected.qrels.values() for document in row}
    assert judged <= set(selected.documents)


def test_a_selection_has_the_sizes_asked_for(fresh: random.Random) -> None:
    selected = select_evaluation(make_data(fresh), queries=10, documents=50)
    assert (len(selected.queries), len(selected.qrels), len(selected.documents)) == (10, 10, 50)


def test_a_selection_keeps_the_judgements_as_they_are(fresh: random.Random) -> None:
    data = make_data(fresh)
    selected = select_evaluation(data, queries=10, documents=50)
    assert selected.qrels == {query: data.qrels[query] for query in selected.qrels}


def test_zero_selects_everything(fresh: random.Random) -> None:
    data = make_data(fresh)
    selected = select_evaluation(data)
    assert (selected.documents, selected.queries, selected.qrels) == (
        data.documents,
        data.queries,
        data.qrels,
    )


def test_a_selection_does_not_depend_on_the_order_of_the_data(fresh: random.Random) -> None:
    data = make_data(fresh)
    other = RetrievalData(
        *(dict(fresh.sample(list(t.items()), len(t))) for t in (data.documents, data.queries, data.qrels))
    )
    assert select_evaluation(other, queries=10, documents=50) == select_evaluation(
        data, queries=10, documents=50
    )


def test_a_selection_does_not_favour_names_that_sort_first(fresh: random.Random) -> None:
    data = make_data(fresh)
    selected = select_evaluation(data, queries=10, documents=60)
    assert set(selected.queries) != set(sorted(data.queries)[:10])


@pytest.fixture(scope="module")
def data(tiny_data: Path) -> RetrievalData:
    return read_data(tiny_data, "train")


def from_scores(data: RetrievalData, scores: np.ndarray) -> dict[str, float]:
    """Return the measures of all scores, queries by documents."""
    run = {
        query: dict(zip(data.documents, row.tolist(), strict=True))
        for query, row in zip(data.qrels, scores, strict=True)
    }
    return {name: by_hand(name, data.qrels, run) for name in BY_HAND}


def embed(model: DualEncoder, data: RetrievalData) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of the judged queries and of the documents."""
    queries = embed_queries(model, [data.queries[name] for name in data.qrels])
    return queries.numpy(), embed_documents(model, list(data.documents.values())).numpy()


def test_dense_measures_of_a_model_are_those_of_its_vectors(
    tiny_dual_encoder: DualEncoder, data: RetrievalData
) -> None:
    q, x = embed(tiny_dual_encoder, data)
    expected = from_scores(data, scores_of(q, x, "inner_product"))
    found = evaluate_model(tiny_dual_encoder, data)
    assert {name: found[f"dense/{name}"] for name in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", get_args(Metric))
def test_compressed_measures_of_a_model_are_those_of_the_nearest_codewords(
    tiny_dual_encoder: DualEncoder, data: RetrievalData, metric: Metric
) -> None:
    config = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, rotation="none", metric=metric)
    tower = tiny_dual_encoder.query_encoder
    model = DualEncoder(tower, tower, config.build(tower.dim))
    q, x = embed(model, data)
    codebooks = 0.3 * np.random.default_rng().standard_normal((4, 16, 8)).astype(np.float32)
    model.head.codebooks.data.copy_(torch.from_numpy(codebooks))
    distances = ((x.reshape(len(x), 4, 1, 8) - codebooks) ** 2).sum(-1)  # (n, M, K)
    decoded = codebooks[np.arange(4), distances.argmin(-1)].reshape(len(x), -1)
    expected = from_scores(data, scores_of(q, decoded, metric))
    found = evaluate_model(model, data)
    assert {name: found[f"compressed/{name}"] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_a_model_without_compression_has_no_compressed_measures(
    tiny_dual_encoder: DualEncoder, data: RetrievalData
) -> None:
    tower = tiny_dual_encoder.query_encoder
    model = DualEncoder(tower, tower, NoCompressionConfig().build(tower.dim))
    assert {name.partition("/")[0] for name in evaluate_model(model, data)} == {"dense"}


def test_evaluation_leaves_the_model_in_training_mode(
    tiny_dual_encoder: DualEncoder, data: RetrievalData
) -> None:
    tiny_dual_encoder.train()
    evaluate_model(tiny_dual_encoder, data)
    assert tiny_dual_encoder.training


def test_an_index_without_a_judged_document_is_refused_with_its_id() -> None:
    searcher = SimpleNamespace(document_ids=["d1", "d2"], folder=Path("some-index"))
    data = RetrievalData({}, {"q": "text"}, {"q": {"d1": 1, "d7": 0}})
    with pytest.raises(InputError, match=r"'d7' is not in the index some-index"):
        evaluate_index(searcher, data)

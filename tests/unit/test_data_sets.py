"""Sets of pairs that are mixed, copies of documents, and scores that a teacher gave.

Shapes: B queries, N documents, H negatives a query.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from retriever import Document, Embeddings, InputError, RetrievalData, TokenBatch
from retriever.data import document_key
from retriever.heads import ProductQuantizerConfig
from training.data import MixedPairs, MixedPlan, join_sets, read_sets, without_copies
from training.experiment import DataConfig, SourceConfig
from training.losses import DistillationConfig, ScoredBatch
from training.losses.distillation import OBJECTIVES
from training.negatives import BatchPlan, PairDataset
from training.scoring import score_batch

SIZES, WEIGHTS = (40, 100, 9), (1.0, 0.5, 3.0)


def make_plan(
    sizes: tuple[int, ...] = SIZES, weights: tuple[float, ...] = WEIGHTS, seed: int = 1
) -> MixedPlan:
    plans = [
        BatchPlan(lengths=[row % 7 for row in range(size)], batch_size=4, seed=seed, bucket_batches=2)
        for size in sizes
    ]
    return MixedPlan(plans=plans, weights=list(weights), seed=seed)


def batches(plan: MixedPlan, start: int, stop: int) -> list[list[tuple[int, int]]]:
    return list(plan.steps(start, stop, slice(None)))


def sets_of(batch: list[tuple[int, int]]) -> set[int]:
    return {0 if row < 40 else 1 if row < 140 else 2 for row, _ in batch}


def test_a_plan_of_one_set_is_that_sets_plan() -> None:
    plan = make_plan((41,), (1.0,))
    assert plan.batches_per_epoch == 10
    assert batches(plan, 3, 35) == list(plan.plans[0].steps(3, 35, slice(None)))


def test_every_batch_is_from_one_set_and_sets_have_their_share() -> None:
    """10 batches, half of 25, three times 2."""
    plan = make_plan()
    assert plan.batches_per_epoch == 10 + 12 + 6
    for epoch in range(3):
        found = [sets_of(batch) for batch in batches(plan, 28 * epoch, 28 * (epoch + 1))]
        assert Counter(number for one in found for number in one) == {0: 10, 1: 12, 2: 6}
        assert all(len(one) == 1 for one in found)


def test_sets_alternate_in_another_order_in_each_epoch() -> None:
    found = [sets_of(batch).pop() for batch in batches(make_plan(), 0, 56)]
    assert found[:28] != found[28:]
    assert found[:28] != sorted(found[:28])


@pytest.mark.parametrize("start", [1, 13, 27, 28, 61])
def test_a_plan_goes_on_from_any_step(start: int) -> None:
    plan = make_plan()
    assert batches(plan, start, 70) == batches(plan, 0, 70)[start:]


def test_through_the_epochs_every_pair_of_a_set_is_seen_as_often() -> None:
    """Two epochs of the mixture are 24 of the 25 batches of the set of half weight."""
    seen = Counter(row for batch in batches(make_plan(), 0, 56) for row, _ in batch if 40 <= row < 140)
    assert set(seen.values()) == {1}
    assert len(seen) == 96


def test_a_process_takes_its_part_of_each_batch() -> None:
    plan = make_plan()
    whole = batches(plan, 5, 9)
    assert list(plan.steps(5, 9, slice(1, 3))) == [batch[1:3] for batch in whole]


# --- reading ---


def write_set(folder: Path, documents: list[dict[str, str]], pairs: list[tuple[str, str]]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    queries = [{"_id": query, "text": f"query {query}"} for query in dict(pairs)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels/train.tsv").write_text("".join(f"{q}\t{d}\t1\n" for q, d in pairs))
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Two sets whose ids are the same and whose texts are not."""
    return [
        str(
            write_set(
                tmp_path / name,
                [{"_id": f"d{row}", "text": f"{name} {row}"} for row in range(12)],
                [(f"q{row}", f"d{row}") for row in range(8)],
            )
        )
        for name in ("a", "b")
    ]


@pytest.mark.parametrize("texts", ["memory", "disk"])
def test_mixed_sets_keep_equal_ids_apart_and_draw_negatives_from_their_own(
    sources: list[str], texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENDEX_CACHE", str(tmp_path / "cache"))
    mixed = [SourceConfig(source=sources[1], weight=2.0)]
    config = DataConfig(source=sources[0], mixed_with=mixed, negatives_per_query=3, texts=texts)
    whole, parts = join_sets(read_sets(config))
    pairs = MixedPairs([PairDataset(part, 3) for part in parts])
    assert len(pairs) == 16
    assert [config.weight for config in config.sets] == [1.0, 2.0]
    for row in range(16):
        pair, name = pairs[row, row], "a" if row < 8 else "b"
        documents = [pair.positive, *pair.negatives]
        assert {document.text.split()[0] for document in documents} == {name}
        assert {document.id.split(":")[0] for document in documents} == {str(int(row >= 8))}
        assert whole.documents[pair.positive.id] == pair.positive
    assert len(whole.documents) == 24
    assert len(whole.queries) == len(whole.qrels) == 16


def test_one_set_keeps_its_names(sources: list[str]) -> None:
    (data,) = read_sets(DataConfig(source=sources[0]))
    assert join_sets([data]) == (data, [data])


def test_copies_of_a_document_count_as_one() -> None:
    texts = {"a": "x", "b": "y", "c": "x", "d": "x", "e": "z", "f": "y"}
    documents = {name: Document(name, "", text) for name, text in texts.items()}
    data = RetrievalData(
        documents,
        {"q": "?", "r": "?"},
        {"q": {"c": 1, "a": 2, "e": 0}, "r": {"f": 1}},
        {"q": ["b", "f", "e"]},
        {"q": {"c": 0.5}},
    )
    found = without_copies(data)
    assert list(found.documents) == ["a", "b", "e"]
    assert found.qrels == {"q": {"a": 2, "e": 0}, "r": {"b": 1}}
    assert found.negatives == {"q": ["b", "e"]}
    assert found.scores == {"q": {"a": 0.5}}


def test_documents_that_differ_in_their_title_or_have_no_text_are_no_copies() -> None:
    documents = [
        Document("a", "t", "x"),
        Document("b", "", "x"),
        Document("c", "", ""),
        Document("d", "", ""),
    ]
    data = RetrievalData({one.id: one for one in documents}, {}, {})
    assert without_copies(data) is data


# --- scores of a teacher ---


@pytest.fixture
def scored(sources: list[str]) -> str:
    """The first set with two negatives of each query and a teacher's scores; one negative has none."""
    rows: list[dict[str, Any]] = [
        {
            "query-id": f"q{row}",
            "negatives": [f"d{row + 1}", f"d{row + 2}"],
            "scores": [0.1 * row, 0.2],
            "positives": [f"d{row}"],
            "positive_scores": [1.0 + row],
        }
        for row in range(8)
    ]
    (Path(sources[0]) / "negatives.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources[0]


def test_a_pair_has_the_scores_of_its_positive_and_of_its_negatives(scored: str) -> None:
    """A random document beside the two given ones has none."""
    (data,) = read_sets(DataConfig(source=scored), scored=True)
    pair = PairDataset(data, 3)[3, 0]
    assert pair.teacher_scores is not None
    expected = {"d3": 4.0, "d4": pytest.approx(0.3), "d5": 0.2}
    names = [document.id for document in (pair.positive, *pair.negatives)]
    for name, score in zip(names, pair.teacher_scores, strict=True):
        assert score == expected[name] if name in expected else math.isnan(score)
    assert set(expected) <= set(names)


def test_pairs_have_no_scores_where_no_loss_reads_them(scored: str) -> None:
    (data,) = read_sets(DataConfig(source=scored))
    assert PairDataset(data, 2)[0, 0].teacher_scores is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scores": [0.1]},
            r"negatives\.jsonl:1: 'scores' must be a list with a score for each of 'negatives'",
        ),
        ({"positive_scores": None}, r"'positive_scores' must be a list"),
        ({"scores": [0.1, None]}, r"'scores' must hold finite numbers, got None"),
        ({"negatives": ["d1", "dx"]}, r"the document 'dx' is not in the corpus"),
        ({"positives": [], "positive_scores": []}, r"no teacher's score of the query 'q0' and .* 'd0'"),
    ],
)
def test_a_line_without_its_scores_is_refused(scored: str, change: dict[str, Any], message: str) -> None:
    path = Path(scored) / "negatives.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **change}), *others]))
    with pytest.raises(InputError, match=message):
        read_sets(DataConfig(source=scored), scored=True)


def test_scores_are_demanded_from_a_set_that_has_none(sources: list[str]) -> None:
    with pytest.raises(
        InputError, match=r"has no negatives\.jsonl with scores. Write it: endex mine --teacher"
    ):
        read_sets(DataConfig(source=sources[1]), scored=True)


def scored_batch(given: torch.Tensor, live: int) -> ScoredBatch:
    """Return the scores of a batch of 3 pairs with H = 2; d1 and d0 come twice."""
    queries, documents = torch.randn(3, 6), torch.randn(9 + live, 6)
    head = ProductQuantizerConfig(num_codebooks=2, codebook_bits=2).build(6)
    names = ["d0", "d1", "d2", "d3", "d1", "d5", "d6", "d7", "d0", *(f"live{row}" for row in range(live))]
    batch = TokenBatch(
        queries={},
        documents={},
        document_keys=torch.tensor([document_key(name) for name in names]),
        relevant_keys=torch.tensor([[document_key(name)] for name in ("d0", "d3", "d6")]),
        positives=torch.arange(3) * 3,
        teacher_scores=given,
    )
    vectors = Embeddings(queries, documents, head(documents), queries)
    return score_batch(vectors, batch, metric="inner_product", mode="rows")


@pytest.mark.parametrize("live", [0, 4])
def test_given_scores_stand_in_the_columns_of_the_querys_own_documents(live: int) -> None:
    given = torch.arange(9.0).view(3, 3)
    given[1, 2] = math.nan
    scored = scored_batch(given, live)
    assert scored.teacher is not None
    for row in range(3):
        torch.testing.assert_close(scored.teacher[row, 3 * row : 3 * row + 3], given[row], equal_nan=True)
        others = [column for column in range(9 + live) if column // 3 != row]
        assert scored.teacher[row, others].isnan().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_distillation_of_given_scores_compares_each_query_with_its_own_documents(objective: Any) -> None:
    """As if each query had come alone with those of its documents that have scores."""
    torch.manual_seed(2)
    given = torch.randn(3, 3)
    given[1, 2] = math.nan
    scored = scored_batch(given, 2)
    loss = DistillationConfig(teacher="given", objective=objective, temperature=0.7).build()
    single = []
    for row in range(3):
        known = ~given[row].isnan()
        own = scored.compressed[row, 3 * row : 3 * row + 3][known].double()[None]
        everything = torch.zeros_like(own, dtype=torch.bool)
        label = torch.zeros(1, dtype=torch.long)
        target = given[row][known].double()[None]
        single.append(OBJECTIVES[objective](target / 0.7, own / 0.7, everything, label))
    found = loss(scored)["compressed"].double()
    torch.testing.assert_close(found, torch.stack(single).mean(), rtol=1e-5, atol=1e-6)

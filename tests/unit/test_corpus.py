"""The training corpus finds the best documents that are not relevant, whatever the size of its chunks.

Shapes: n documents, B queries, R known relevant documents, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever import Document
from retriever.data import document_key
from retriever.heads import CompressionHead, IVFProductQuantizerConfig, ProductQuantizerConfig
from training.corpus import TrainingCorpus

DOCUMENTS, B, R, D = 50, 6, 3, 8
SEEDS = (0, 1, 2)
chunks = pytest.mark.parametrize("rows_at_once", [1, 7, 50, 1000])


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_head(metric: str = "l2", *, lists: bool = False) -> CompressionHead:
    torch.manual_seed(3)
    options: dict[str, Any] = {"num_codebooks": 4, "codebook_bits": 4, "rotation": "none", "metric": metric}
    config = (
        IVFProductQuantizerConfig(num_lists=300, **options) if lists else ProductQuantizerConfig(**options)
    )
    return config.build(D)


def make_corpus(seed: int, head: CompressionHead | None = None) -> TrainingCorpus:
    """Return documents d0, d1 ... with random vectors and, with a head, their codes."""
    documents = [Document(f"d{row}", "", f"text {row}") for row in range(DOCUMENTS)]
    corpus = TrainingCorpus(documents, num_codes=head.num_codes if head else 0)
    corpus.embed(lambda found: rand(len(found), D, seed=seed))
    if head:
        corpus.encode(head, corpus.vectors)
    return corpus


def make_queries(seed: int) -> tuple[Tensor, Tensor, list[set[int]]]:
    """Return queries, keys of relevant documents padded with zeros, and their rows; one is not in the corpus."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(DOCUMENTS, generator=generator)[: 1 + b % R].tolist() for b in range(B)]
    keys = [[document_key(f"d{row}") for row in known] + [0] * (R - len(known)) for known in rows]
    keys[0][-1] = document_key("elsewhere")
    return rand(B, D, seed=seed + 50), torch.tensor(keys), [set(known) for known in rows]


def ranking(queries: Tensor, vectors: Tensor, metric: str, relevant: list[set[int]]) -> list[list[int]]:
    """Rows that are not relevant, best first, by brute force in float64."""
    q, x = queries.double().numpy(), vectors.detach().double().numpy()
    scores = q @ x.T if metric == "inner_product" else -((q[:, None] - x) ** 2).sum(-1)
    return [
        [row for row in np.argsort(-line, kind="stable").tolist() if row not in known]
        for line, known in zip(scores, relevant, strict=True)
    ]


@chunks
@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("seed", SEEDS)
def test_hardest_by_vectors_are_the_best_of_a_brute_force_search(
    seed: int, metric: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.corpus.ROWS_AT_ONCE", rows_at_once)
    corpus, (queries, keys, relevant) = make_corpus(seed), make_queries(seed)
    found = corpus.hardest(queries, keys, make_head(metric), count=5, depth=5, compressed=False)
    expected = [row[:5] for row in ranking(queries, corpus.vectors, metric, relevant)]
    assert found.view(B, 5).tolist() == expected


@chunks
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_hardest_by_codes_are_the_best_of_the_decoded_vectors(
    seed: int, lists: bool, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.corpus.ROWS_AT_ONCE", rows_at_once)
    head = make_head(lists=lists)
    corpus, (queries, keys, relevant) = make_corpus(seed, head), make_queries(seed)
    found = corpus.hardest(queries, keys, head, count=5, depth=5, compressed=True).view(B, 5)
    decoded = head.decode(head.encode(corpus.vectors))
    scores = torch.cdist(queries.double(), decoded.detach().double())
    expected = [row[:5] for row in ranking(queries, decoded, "l2", relevant)]
    np.testing.assert_allclose(
        scores.gather(1, found), scores.gather(1, torch.tensor(expected)), rtol=0, atol=1e-5
    )  # equal codes tie


@chunks
@pytest.mark.parametrize("seed", SEEDS)
def test_hardest_are_drawn_from_the_best_of_the_depth(
    seed: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.corpus.ROWS_AT_ONCE", rows_at_once)
    corpus, (queries, keys, relevant) = make_corpus(seed), make_queries(seed)
    found = corpus.hardest(queries, keys, make_head(), count=3, depth=10, compressed=False).view(B, 3)
    best = ranking(queries, corpus.vectors, "l2", relevant)
    for row, expected in zip(found.tolist(), best, strict=True):
        assert len(set(row)) == 3
        assert set(row) <= set(expected[:10])


def test_all_of_the_depth_are_drawn_sooner_or_later() -> None:
    corpus, (queries, keys, relevant), head = make_corpus(0), make_queries(0), make_head()
    torch.manual_seed(0)
    draws = [corpus.hardest(queries, keys, head, count=2, depth=6, compressed=False) for _ in range(100)]
    best = ranking(queries, corpus.vectors, "l2", relevant)
    for b, rows in enumerate(torch.stack(draws).view(100, B, 2).transpose(0, 1)):
        assert set(rows.flatten().tolist()) == set(best[b][:6])


def test_draws_are_those_of_the_seed() -> None:
    corpus, (queries, keys, _), head = make_corpus(0), make_queries(0), make_head()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(corpus.hardest(queries, keys, head, count=2, depth=20, compressed=False).tolist())
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize("depth", [1, 10, DOCUMENTS - R, 10_000])
@pytest.mark.parametrize("seed", SEEDS)
def test_relevant_documents_are_never_negatives_while_others_are_left(seed: int, depth: int) -> None:
    """Also not where they rank first: the queries here are relevant documents themselves."""
    corpus, (_, keys, relevant) = make_corpus(seed), make_queries(seed)
    queries = torch.stack([corpus.vectors[min(known)] for known in relevant])
    count = min(depth, DOCUMENTS - R)
    found = corpus.hardest(queries, keys, make_head(), count=count, depth=depth, compressed=False)
    for row, known in zip(found.view(B, -1).tolist(), relevant, strict=True):
        assert len(row) == count
        assert not known & set(row)


def test_rows_are_found_by_key() -> None:
    corpus = make_corpus(0)
    keys = torch.tensor([document_key(f"d{row}") for row in (3, 0, 49, 3)])
    assert corpus.rows(keys).tolist() == [3, 0, 49, 3]


@pytest.mark.parametrize("lists", [False, True])
def test_codes_are_part_of_the_state(lists: bool) -> None:
    head = make_head(lists=lists)
    corpus = make_corpus(0, head)
    restored = TrainingCorpus(corpus.documents, num_codes=head.num_codes)
    restored.load_state_dict(corpus.state_dict())
    assert torch.equal(restored.codes.long(), head.encode(corpus.vectors))


def test_vectors_are_no_part_of_the_state() -> None:
    """A frozen tower makes them again."""
    assert list(make_corpus(0).state_dict()) == ["codes"]


def test_documents_of_a_batch_get_their_new_codes_and_others_keep_theirs() -> None:
    head = make_head()
    corpus = make_corpus(0, head)
    before, codes = corpus.codes.clone(), torch.randint(16, (3, head.num_codes))
    corpus.renew(torch.tensor([document_key(f"d{row}") for row in (7, 30, 7)]), codes)
    assert corpus.codes[[7, 30]].tolist() == codes[:2].tolist()  # of two codes for d7 the first
    others = [row for row in range(DOCUMENTS) if row not in (7, 30)]
    assert torch.equal(corpus.codes[others], before[others])


@pytest.mark.parametrize("margin", [None, 0.4])
@pytest.mark.parametrize("max_relative", [None, 0.7, 1.0])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_documents_that_score_too_near_the_positive_are_no_negatives(
    margin: float | None, max_relative: float | None, compressed: bool, metric: str
) -> None:
    """Against every document's score in float64; where few are left, the rest is -1."""
    head = make_head(metric)
    corpus, (queries, keys, relevant) = make_corpus(1, head), make_queries(1)
    vectors = head.decode(head.encode(corpus.vectors)) if compressed else corpus.vectors
    q, x = queries.double(), vectors.detach().double()
    scores = q @ x.T if metric == "inner_product" else 1 - (q[:, None] - x).square().sum(-1) / 2
    positives = torch.tensor([min(known) for known in relevant])
    own = scores.gather(1, positives[:, None])
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if margin is not None:
        allowed &= scores <= own - margin + 1e-9
    if max_relative is not None:
        allowed &= scores <= own - (1 - max_relative) * own.abs() + 1e-6
    limits = corpus.limits(
        queries,
        torch.tensor([document_key(f"d{row}") for row in positives.tolist()]),
        head,
        margin=margin,
        max_relative=max_relative,
        compressed=compressed,
    )
    assert (limits is None) == (margin is None and max_relative is None)
    found = corpus.hardest(
        queries, keys, head, count=DOCUMENTS, depth=DOCUMENTS, compressed=compressed, limits=limits
    )
    for b, row in enumerate(found.view(B, DOCUMENTS).tolist()):
        expected = set(allowed[b].nonzero().flatten().tolist())
        ties = {r for r in expected if abs(float(scores[b, r] - own[b])) < 1e-5}
        assert set(row) - {-1} - ties == expected - ties

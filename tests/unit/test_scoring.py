"""What a query is scored with: every document once, none that is relevant as a negative.

Shapes: B queries, N documents, R known relevant documents, D dimensions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retriever import Embeddings, TokenBatch
from retriever.data import document_key, join_tokens, other_relevant
from retriever.distributed import all_gather, gather_detached, gather_padded
from retriever.heads import HeadOutput, IVFProductQuantizerConfig, ProductQuantizerConfig
from training.scoring import repeated_documents, score_batch

B, N, D = 4, 8, 8
MODES = ("in_batch", "detached", "rows", "full")


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def batches(draw: Any) -> tuple[list[str], list[int], list[list[str]]]:
    """Names of documents (few, so that they repeat), columns of positives, relevant names of each query."""
    names = draw(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=12))
    labels = draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=6))
    relevant = [[names[label], *draw(st.lists(st.sampled_from("abcdefgh"), max_size=3))] for label in labels]
    return names, labels, relevant


def to_tensors(
    names: list[str], labels: list[int], relevant: list[list[str]]
) -> tuple[Tensor, Tensor, Tensor]:
    keys = torch.tensor([document_key(name) for name in names])
    width = max(map(len, relevant))
    rows = [[document_key(name) for name in row] + [0] * (width - len(row)) for row in relevant]
    return keys, torch.tensor(labels), torch.tensor(rows)


# --- masks ---


@settings(deadline=None, max_examples=300)
@given(batches())
def test_repeated_documents_are_those_of_a_plain_loop(case: Any) -> None:
    names, labels, _ = case
    keys, columns, _ = to_tensors(*case)
    expected = []
    for label in labels:
        seen = {names[label]}  # the positive itself always counts, its copies do not
        row = []
        for column, name in enumerate(names):
            row.append(column != label and name in seen)
            seen.add(name)
        expected.append(row)
    assert repeated_documents(keys, columns).tolist() == expected


@settings(deadline=None, max_examples=300)
@given(batches())
def test_every_different_document_is_left_exactly_once(case: Any) -> None:
    names = case[0]
    keys, columns, _ = to_tensors(*case)
    for left_out in repeated_documents(keys, columns).tolist():
        left = [name for name, out in zip(names, left_out, strict=True) if not out]
        assert sorted(left) == sorted(set(names))


@settings(deadline=None, max_examples=300)
@given(batches())
def test_what_is_neither_repeated_nor_relevant_is_a_negative(case: Any) -> None:
    """Both masks together: a query's negatives are the other documents by name, each once."""
    names, labels, relevant = case
    keys, columns, known = to_tensors(*case)
    ignore = other_relevant(keys, known, columns) | repeated_documents(keys, columns)
    for row, label in enumerate(labels):
        counted = [c for c in range(len(names)) if c != label and not ignore[row, c]]
        assert sorted(names[c] for c in counted) == sorted(set(names) - set(relevant[row]))


@settings(deadline=None, max_examples=100)
@given(batches())
def test_a_positive_is_never_ignored(case: Any) -> None:
    keys, columns, known = to_tensors(*case)
    ignore = other_relevant(keys, known, columns) | repeated_documents(keys, columns)
    assert not ignore.gather(1, columns[:, None]).any()


# --- one process ---


def make_batch(seed: int, names: str = "abcdefgh") -> TokenBatch:
    keys = torch.tensor([document_key(name) for name in names])
    positives = torch.arange(B) * (N // B)
    return TokenBatch(
        queries={},
        documents={},
        document_keys=keys,
        relevant_keys=keys[positives][:, None],
        positives=positives,
    )


def make_vectors(seed: int, *, lists: bool = False) -> Embeddings:
    options: dict[str, Any] = {
        "num_codebooks": 2,
        "codebook_bits": 2,
        "rotation": "none",
        "estimator": "softmax",
    }
    torch.manual_seed(seed)
    config = IVFProductQuantizerConfig(num_lists=3, **options) if lists else ProductQuantizerConfig(**options)
    head, documents, queries = config.build(D), rand(N, D, seed=seed), rand(B, D, seed=seed + 1)
    return Embeddings(queries, documents, *head.compress_batch(documents, queries))


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("mode", MODES)
def test_scores_of_one_process_are_those_of_all_pairs(mode: str, metric: str) -> None:
    vectors = make_vectors(0, lists=True)
    teacher = (rand(B, D, seed=5), rand(N, D, seed=6))
    scored = score_batch(vectors, make_batch(0), metric=metric, mode=mode, teacher=teacher)
    sides = {
        "dense": (vectors.queries, vectors.documents),
        "compressed": (vectors.queries, vectors.compressed.reconstruction),
        "coarse": (vectors.queries, vectors.compressed.coarse),
        "teacher": teacher,
    }
    for name, (queries, documents) in sides.items():
        q, x = queries.detach().double(), documents.detach().double()
        expected = q @ x.T if metric == "inner_product" else 1 - torch.cdist(q, x) ** 2 / 2
        torch.testing.assert_close(getattr(scored, name).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_the_same_in_one_process(mode: str) -> None:
    vectors, batch = make_vectors(1, lists=True), make_batch(1, "abcdaagh")
    found = score_batch(vectors, batch, metric="l2", mode=mode)
    expected = score_batch(vectors, batch, metric="l2", mode="rows")
    for name in (
        "dense",
        "compressed",
        "coarse",
        "labels",
        "ignore",
        "repeated",
        "positives",
        "log_assignment",
    ):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("mode", MODES)
def test_a_document_that_occurs_twice_is_ignored_once(mode: str) -> None:
    """Columns 1 and 5 are one document; the copies of positive 0 do not count for query 0."""
    scored = score_batch(make_vectors(0), make_batch(0, "abcdeaga"), metric="l2", mode=mode)
    assert scored.repeated.nonzero().tolist() == [[row, column] for row in range(4) for column in (5, 7)]


@pytest.mark.parametrize("mode", MODES)
def test_a_head_with_a_space_of_its_own_is_scored_in_it(mode: str) -> None:
    queries, documents = rand(B, D, seed=1), rand(N, D, seed=2)
    q, x, x_hat, lists = (rand(rows, 3, seed=seed) for seed, rows in enumerate((B, N, N, N), start=3))
    output = HeadOutput(reconstruction=x_hat, codes=torch.zeros(0), coarse=lists, mapped=x)
    scored = score_batch(Embeddings(queries, documents, output, q), make_batch(0), metric="l2", mode=mode)
    torch.testing.assert_close(scored.dense, 1 - torch.cdist(queries, documents) ** 2 / 2)
    torch.testing.assert_close(scored.compressed, 1 - torch.cdist(q, x_hat) ** 2 / 2)
    torch.testing.assert_close(scored.coarse, 1 - torch.cdist(q, lists) ** 2 / 2)
    assert torch.equal(scored.originals, x)
    assert torch.equal(scored.pairs.other_documents, documents)
    assert torch.equal(scored.pairs.same, torch.eye(N, dtype=torch.bool))


def test_a_head_without_lists_and_a_run_without_a_teacher_give_no_such_scores() -> None:
    scored = score_batch(make_vectors(0), make_batch(0), metric="l2", mode="rows")
    assert (scored.coarse, scored.teacher) == (None, None)


def test_positives_are_rows_of_the_given_documents() -> None:
    vectors = make_vectors(0)
    scored = score_batch(vectors, make_batch(0), metric="l2", mode="rows")
    assert torch.equal(scored.documents[scored.positives], vectors.documents[::2])
    assert torch.equal(scored.reconstruction, vectors.compressed.reconstruction)


@pytest.mark.parametrize("gather", [all_gather, gather_detached, gather_padded])
def test_one_process_gathers_the_tensor_itself(gather: Any) -> None:
    x = rand(3, 2, seed=0).requires_grad_()
    assert gather(x) is x


# --- batches that grow ---


@pytest.mark.parametrize(("first", "second"), [(3, 5), (5, 3), (4, 4)])
def test_joined_tokens_are_padded_to_the_longer_batch(first: int, second: int) -> None:
    parts = [
        {
            "input_ids": torch.arange(2 * n).view(2, n) + 1,
            "attention_mask": torch.ones(2, n, dtype=torch.int64),
        }
        for n in (first, second)
    ]
    joined = join_tokens(*parts)
    width = max(first, second)
    rows = [row + [0] * (width - len(row)) for part in parts for row in part["input_ids"].tolist()]
    mask = [[1] * n + [0] * (width - n) for n in (first, first, second, second)]
    assert (joined["input_ids"].tolist(), joined["attention_mask"].tolist()) == (rows, mask)


def test_further_documents_are_positives_of_none_and_keep_the_others_in_place() -> None:
    batch = make_batch(0)
    extended = batch.with_documents({}, torch.tensor([7, 8]))
    assert extended.document_keys.tolist() == [*batch.document_keys.tolist(), 7, 8]
    assert torch.equal(extended.positives, batch.positives)


def test_a_further_document_that_is_there_already_counts_once() -> None:
    """A live negative that is another query's positive."""
    batch = make_batch(0)
    extended = batch.with_documents({}, batch.document_keys[[2, 3]])
    documents, queries = rand(N + 2, D, seed=0), rand(B, D, seed=1)
    output = HeadOutput(reconstruction=documents, codes=torch.zeros(0))
    vectors = Embeddings(queries, documents, output, queries)
    scored = score_batch(vectors, extended, metric="l2", mode="rows")
    assert scored.repeated[:, N:].tolist() == [[True, True]] * B
    assert not scored.repeated[:, :N].any()

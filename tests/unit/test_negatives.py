"""Batches are a pure function of seed and step; negatives are never relevant."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch

from retriever import Document, InputError, RetrievalData
from retriever.data import document_key, other_relevant
from training.negatives import BatchPlan, PairDataset


@pytest.fixture
def fresh() -> random.Random:
    """Fresh random numbers; pytest shows the seed of a test that fails."""
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    return random.Random(seed)


def make_plan(
    fresh: random.Random, pairs: int = 100, batch_size: int = 8, seed: int = 3, bucket_batches: int = 4
) -> BatchPlan:
    lengths = [fresh.randint(1, 2000) for _ in range(pairs)]
    return BatchPlan(lengths=lengths, batch_size=batch_size, seed=seed, bucket_batches=bucket_batches)


def rows_of(batches: list[list[tuple[int, int]]]) -> list[int]:
    return [row for row, _ in chain.from_iterable(batches)]


def make_data(fresh: random.Random, documents: int = 30, given: bool = False) -> RetrievalData:
    """Ten queries with one to three relevant documents and one judged as not relevant."""
    ids = [f"d{i}" for i in range(documents)]
    qrels, negatives = {}, {}
    for number in range(10):
        chosen = fresh.sample(ids, fresh.randint(2, 4))
        qrels[f"q{number}"] = {**dict.fromkeys(chosen[1:], 1), chosen[0]: 0}
        if given:
            negatives[f"q{number}"] = fresh.sample(ids, 9)
    return RetrievalData(
        {i: Document(i, "", f"text of {i}") for i in ids},
        {name: f"text of {name}" for name in qrels},
        qrels,
        negatives,
    )


def relevant_to(data: RetrievalData, query_text: str) -> set[str]:
    name = query_text.removeprefix("text of ")
    return {document for document, score in data.qrels[name].items() if score > 0}


def test_equal_plans_give_equal_batches(fresh: random.Random) -> None:
    plan = make_plan(fresh)
    again = BatchPlan(lengths=list(plan.lengths), batch_size=8, seed=3, bucket_batches=4)
    assert list(plan.steps(0, 40, slice(None))) == list(again.steps(0, 40, slice(None)))


def test_another_seed_gives_other_batches(fresh: random.Random) -> None:
    plan = make_plan(fresh)
    other = BatchPlan(lengths=plan.lengths, batch_size=8, seed=4, bucket_batches=4)
    assert rows_of(list(plan.steps(0, 12, slice(None)))) != rows_of(list(other.steps(0, 12, slice(None))))


def test_another_epoch_gives_other_batches(fresh: random.Random) -> None:
    plan = make_plan(fresh)
    n = plan.batches_per_epoch
    assert rows_of(list(plan.steps(0, n, slice(None)))) != rows_of(list(plan.steps(n, 2 * n, slice(None))))


def test_a_plan_does_not_depend_on_the_global_random_state(fresh: random.Random) -> None:
    plan = make_plan(fresh)
    first = list(plan.steps(0, 12, slice(None)))
    random.seed(fresh.getrandbits(32))
    torch.manual_seed(fresh.getrandbits(32))
    assert list(plan.steps(0, 12, slice(None))) == first


@pytest.mark.parametrize(("pairs", "bucket_batches"), [(100, 1), (100, 4), (96, 4), (9, 16)])
def test_an_epoch_uses_no_pair_twice(fresh: random.Random, pairs: int, bucket_batches: int) -> None:
    plan = make_plan(fresh, pairs=pairs, bucket_batches=bucket_batches)
    for epoch in range(3):
        n = plan.batches_per_epoch
        rows = rows_of(list(plan.steps(epoch * n, (epoch + 1) * n, slice(None))))
        assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("bucket_batches", [1, 4, 16])
def test_every_batch_is_full(fresh: random.Random, bucket_batches: int) -> None:
    plan = make_plan(fresh, pairs=103, bucket_batches=bucket_batches)
    assert {len(batch) for batch in plan.steps(0, 50, slice(None))} == {8}


def test_an_epoch_leaves_out_less_than_one_batch(fresh: random.Random) -> None:
    plan = make_plan(fresh, pairs=103, bucket_batches=4)
    assert len(rows_of(list(plan.steps(0, plan.batches_per_epoch, slice(None))))) == 96


@pytest.mark.parametrize("bucket_batches", [1, 4, 16])
def test_over_many_epochs_every_pair_is_used(fresh: random.Random, bucket_batches: int) -> None:
    plan = make_plan(fresh, pairs=103, bucket_batches=bucket_batches)
    rows = rows_of(list(plan.steps(0, 30 * plan.batches_per_epoch, slice(None))))
    assert set(range(103)) - set(rows) == set()


@pytest.mark.parametrize("start", [0, 1, 11, 12, 13, 30])
def test_a_start_at_a_step_gives_the_tail_of_the_whole_sequence(fresh: random.Random, start: int) -> None:
    plan = make_plan(fresh)  # 12 steps an epoch
    assert list(plan.steps(start, 40, slice(None))) == list(plan.steps(0, 40, slice(None)))[start:]


def test_a_plan_gives_as_many_steps_as_asked(fresh: random.Random) -> None:
    assert len(list(make_plan(fresh).steps(5, 42, slice(None)))) == 37


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_all_processes_join_to_the_whole_batch(fresh: random.Random, processes: int) -> None:
    plan = make_plan(fresh)
    size = 8 // processes
    shares = [list(plan.steps(0, 30, slice(r * size, (r + 1) * size))) for r in range(processes)]
    joined = [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)]
    assert joined == list(plan.steps(0, 30, slice(None)))


def test_bucketing_halves_the_padding_at_least(fresh: random.Random) -> None:
    plan = make_plan(fresh, pairs=800, bucket_batches=1)
    bucketed = BatchPlan(lengths=plan.lengths, batch_size=8, seed=3, bucket_batches=16)

    def padding(batches: BatchPlan) -> int:
        rows = [[plan.lengths[row] for row, _ in batch] for batch in batches.steps(0, 100, slice(None))]
        return sum(len(batch) * max(batch) - sum(batch) for batch in rows)

    assert padding(bucketed) < 0.5 * padding(plan)


def test_bucketed_batches_do_not_come_in_order_of_length(fresh: random.Random) -> None:
    plan = make_plan(fresh, pairs=800, bucket_batches=100)
    longest = [max(plan.lengths[row] for row, _ in batch) for batch in plan.steps(0, 100, slice(None))]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_a_batch_larger_than_the_pairs_is_refused_with_both_numbers(fresh: random.Random) -> None:
    with pytest.raises(InputError, match=r"batch_size=8 is more than the 7 training pairs"):
        make_plan(fresh, pairs=7)


def test_the_pairs_are_the_positive_judgements(fresh: random.Random) -> None:
    data = make_data(fresh)
    expected = [(q, d) for q, judged in data.qrels.items() for d, score in judged.items() if score > 0]
    pairs = [PairDataset(data)[row, 0] for row in range(len(PairDataset(data)))]
    assert [(pair.query, pair.positive.id) for pair in pairs] == [(f"text of {q}", d) for q, d in expected]


def test_a_pair_names_all_relevant_documents_of_its_query(fresh: random.Random) -> None:
    data = make_data(fresh)
    dataset = PairDataset(data)
    pairs = [dataset[row, 0] for row in range(len(dataset))]
    assert all(set(pair.relevant_ids) == relevant_to(data, pair.query) for pair in pairs)


@pytest.mark.parametrize("given", [False, True])
def test_negatives_are_never_relevant(fresh: random.Random, given: bool) -> None:
    data = make_data(fresh, given=given)
    dataset = PairDataset(data, negatives_per_query=5)
    for row in range(len(dataset)):
        for seed in range(20):
            pair = dataset[row, seed]
            assert relevant_to(data, pair.query).isdisjoint(negative.id for negative in pair.negatives)


@pytest.mark.parametrize("given", [False, True])
def test_the_negatives_of_a_pair_are_distinct_and_as_many_as_asked(fresh: random.Random, given: bool) -> None:
    dataset = PairDataset(make_data(fresh, given=given), negatives_per_query=12)
    for row in range(len(dataset)):
        assert len({negative.id for negative in dataset[row, fresh.getrandbits(32)].negatives}) == 12


def test_equal_draw_seeds_give_equal_pairs(fresh: random.Random) -> None:
    dataset = PairDataset(make_data(fresh), negatives_per_query=5)
    seed = fresh.getrandbits(62)
    assert dataset[0, seed] == dataset[0, seed]


def test_other_draw_seeds_give_other_negatives(fresh: random.Random) -> None:
    dataset = PairDataset(make_data(fresh), negatives_per_query=5)
    assert len({dataset[0, seed].negatives for seed in range(20)}) > 1


def test_negatives_come_from_the_given_ones_when_these_suffice(fresh: random.Random) -> None:
    data = make_data(fresh, given=True)
    dataset = PairDataset(data, negatives_per_query=2)
    for row, (query, _) in enumerate(dataset.rows):
        drawn = {negative.id for seed in range(10) for negative in dataset[row, seed].negatives}
        assert drawn <= set(data.negatives[query])


def test_all_given_negatives_are_used_before_random_ones(fresh: random.Random) -> None:
    data = make_data(fresh, given=True)
    dataset = PairDataset(data, negatives_per_query=12)
    for row, (query, _) in enumerate(dataset.rows):
        given = set(data.negatives[query]) - relevant_to(data, f"text of {query}")
        assert given <= {negative.id for negative in dataset[row, 0].negatives}


@pytest.mark.parametrize("documents", [8, 9])
def test_a_corpus_too_small_for_the_negatives_is_refused(fresh: random.Random, documents: int) -> None:
    data = make_data(fresh, documents=documents)
    with pytest.raises(InputError, match=f"negatives_per_query=9 is too much for a corpus of {documents}"):
        PairDataset(data, negatives_per_query=9)


def test_the_length_of_a_pair_counts_title_and_text(fresh: random.Random) -> None:
    data = RetrievalData({"d": Document("d", "four", "sevenish")}, {"q": "query"}, {"q": {"d": 1}})
    assert PairDataset(data).length(0) == 12


@pytest.mark.parametrize(("queries", "documents", "relevant"), [(6, 20, 3), (1, 1, 1), (16, 4, 8)])
def test_the_mask_of_other_relevant_documents_equals_a_loop(
    fresh: random.Random, queries: int, documents: int, relevant: int
) -> None:
    pool = [document_key(f"d{i}") for i in range(12)]  # few, so that documents repeat
    keys = [fresh.choice(pool) for _ in range(documents)]
    labels = [fresh.randrange(documents) for _ in range(queries)]
    rows = []
    for label in labels:
        row = [keys[label], *fresh.sample(pool, fresh.randint(0, relevant - 1))]
        rows.append(row + [0] * (relevant - len(row)))
    mask = other_relevant(torch.tensor(keys), torch.tensor(rows), torch.tensor(labels))
    expected = [
        [column != labels[i] and keys[column] in rows[i] for column in range(documents)]
        for i in range(queries)
    ]
    assert mask.tolist() == expected


def test_the_mask_is_empty_when_no_document_is_relevant(fresh: random.Random) -> None:
    keys = torch.tensor([document_key(f"d{i}") for i in range(6)])
    relevant = torch.tensor([[document_key("elsewhere"), 0]] * 3)
    assert not other_relevant(keys, relevant, torch.tensor([0, 2, 4])).any()


def test_document_keys_are_positive_and_distinct(fresh: random.Random) -> None:
    keys = {document_key(f"{fresh.getrandbits(64)}/{i}") for i in range(10_000)}
    assert len(keys) == 10_000
    assert all(0 < key < 2**63 for key in keys)

"""Hinge (Poeem) and LambdaRank (JPQ) against loops in float64 written from the papers.

Shapes: B queries, N documents.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever import InputError
from training.losses import HingeConfig, LambdaRankConfig, RetrievalLoss, ScoredBatch

B, N = 5, 12
SEEDS = (0, 1, 2)


def make_batch(seed: int, share_ignored: float = 0.3) -> ScoredBatch:
    """Return random compressed scores; the dense ones are of no use to these losses."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N, (B,), generator=generator)
    ignore = (torch.rand(B, N, generator=generator) < share_ignored).scatter(1, labels[:, None], False)
    vectors = torch.zeros(N, 2, dtype=torch.float64)
    return ScoredBatch(
        dense=torch.full((B, N), float("nan"), dtype=torch.float64),
        compressed=torch.randn(B, N, generator=generator, dtype=torch.float64),
        labels=labels,
        ignore=ignore,
        repeated=torch.zeros_like(ignore),
        documents=vectors,
        reconstruction=vectors,
        positives=labels,
    )


def value(loss: RetrievalLoss, batch: ScoredBatch) -> float:
    (part,) = loss(batch).values()
    return part.item()


def gradient(loss: RetrievalLoss, batch: ScoredBatch) -> Tensor:
    scores = batch.compressed.clone().requires_grad_()
    (part,) = loss(replace(batch, compressed=scores)).values()
    part.backward()
    return scores.grad


def numeric_gradient(loss: RetrievalLoss, batch: ScoredBatch, step: float = 1e-6) -> np.ndarray:
    found = np.zeros((B, N))
    for cell in np.ndindex(B, N):
        shift = torch.zeros(B, N, dtype=torch.float64)
        shift[cell] = step
        above, below = (value(loss, replace(batch, compressed=batch.compressed + s)) for s in (shift, -shift))
        found[cell] = (above - below) / (2 * step)
    return found


def negatives(batch: ScoredBatch, b: int) -> list[int]:
    return [j for j in range(N) if j != batch.labels[b] and not batch.ignore[b, j]]


# --- hinge ---


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("margin", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_hinge_is_the_mean_over_queries_of_the_margin_violations(
    seed: int, margin: float, reduction: str
) -> None:
    batch = make_batch(seed)
    scores, per_query = batch.compressed.numpy(), []
    for b in range(B):
        terms = [max(0.0, margin - scores[b, batch.labels[b]] + scores[b, j]) for j in negatives(batch, b)]
        per_query.append(np.mean(terms) if reduction == "mean" else np.sum(terms))
    found = value(HingeConfig(margin=margin, reduction=reduction).build(), batch)
    assert found == pytest.approx(np.mean(per_query), rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("seed", SEEDS)
def test_hinge_gradient_is_its_finite_difference(seed: int, reduction: str) -> None:
    loss, batch = HingeConfig(margin=0.5, reduction=reduction).build(), make_batch(seed)
    np.testing.assert_allclose(gradient(loss, batch), numeric_gradient(loss, batch), rtol=0, atol=1e-6)


def test_hinge_is_zero_where_the_positive_wins_by_the_margin() -> None:
    batch = make_batch(0)
    ahead = batch.compressed.scatter(1, batch.labels[:, None], 100.0)
    assert value(HingeConfig(margin=1.0).build(), replace(batch, compressed=ahead)) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_hinge_of_queries_without_negatives_is_zero(reduction: str) -> None:
    batch = make_batch(0, share_ignored=2.0)  # all but the positives
    assert value(HingeConfig(margin=1.0, reduction=reduction).build(), batch) == 0


@pytest.mark.parametrize("margin", [-0.1, float("inf"), float("nan")])
def test_hinge_refuses_a_margin_that_is_negative_or_not_finite(margin: float) -> None:
    with pytest.raises(InputError, match="margin must be zero or more, got"):
        HingeConfig(margin=margin)


def test_hinge_refuses_an_unknown_reduction() -> None:
    with pytest.raises(InputError, match=r"reduction must be one of mean, sum, got 'max'"):
        HingeConfig(reduction="max")


# --- lambda rank ---


def lambda_rank(batch: ScoredBatch, temperature: float, depth: int) -> float:
    """Sum over negatives ranked up to `depth` of |1/r- - 1/r+| log(1 + exp(s- - s+)), mean over queries."""
    scores, per_query = batch.compressed.numpy() / temperature, []
    for b in range(B):
        positive = int(batch.labels[b])
        candidates = sorted([positive, *negatives(batch, b)], key=lambda j: -scores[b, j])
        rank = {j: place + 1 for place, j in enumerate(candidates)}
        terms = [
            abs(1 / rank[j] - 1 / rank[positive]) * np.log1p(np.exp(scores[b, j] - scores[b, positive]))
            for j in negatives(batch, b)
            if rank[j] <= depth
        ]
        per_query.append(np.sum(terms))
    return float(np.mean(per_query))


@pytest.mark.parametrize("depth", [1, 3, 200])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_lambda_rank_is_the_formula_of_jpq(seed: int, temperature: float, depth: int) -> None:
    batch = make_batch(seed)
    found = value(LambdaRankConfig(temperature=temperature, depth=depth).build(), batch)
    assert found == pytest.approx(lambda_rank(batch, temperature, depth), rel=1e-10)


@pytest.mark.parametrize("depth", [3, 200])
@pytest.mark.parametrize("seed", SEEDS)
def test_lambda_rank_gradient_is_its_finite_difference_with_ranks_held(seed: int, depth: int) -> None:
    """The weights are constants of the step: no rank changes under a tiny change of a score."""
    loss, batch = LambdaRankConfig(temperature=0.7, depth=depth).build(), make_batch(seed)
    np.testing.assert_allclose(gradient(loss, batch), numeric_gradient(loss, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_ignored_documents_take_no_rank(seed: int) -> None:
    batch = make_batch(seed)
    lifted = batch.compressed + 50.0 * batch.ignore  # would be ranks 1, 2, ... and push all others down
    loss = LambdaRankConfig(depth=2).build()
    assert value(loss, replace(batch, compressed=lifted)) == value(loss, batch)


@pytest.mark.parametrize("seed", SEEDS)
def test_negatives_below_the_depth_get_no_gradient(seed: int) -> None:
    batch = make_batch(seed, share_ignored=0.0)
    found = gradient(LambdaRankConfig(depth=4).build(), batch)
    for b in range(B):
        below = batch.compressed[b].argsort(descending=True)[4:]
        assert not [j for j in below.tolist() if j != batch.labels[b] and found[b, j] != 0]


def test_lambda_rank_of_a_query_whose_positive_is_first_still_pushes_the_second_down() -> None:
    batch = make_batch(0)
    ahead = batch.compressed.scatter(1, batch.labels[:, None], 10.0)
    found = gradient(LambdaRankConfig(temperature=1.0).build(), replace(batch, compressed=ahead))
    assert bool((found.scatter(1, batch.labels[:, None], 0.0).max(1).values > 0).all())


@pytest.mark.parametrize("depth", [0, -1])
def test_lambda_rank_refuses_a_depth_below_one(depth: int) -> None:
    with pytest.raises(InputError, match=f"depth must be at least 1, got {depth}"):
        LambdaRankConfig(depth=depth)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_lambda_rank_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature must be positive, got"):
        LambdaRankConfig(temperature=temperature)

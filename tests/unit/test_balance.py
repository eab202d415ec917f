"""Sinkhorn-balanced assignment: the plan's margins, a naive iteration, and when it is on.

Shapes: N vectors, M codebooks, K codewords.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever import InputError
from retriever.heads import (
    IVFProductQuantizerConfig,
    ProductQuantizer,
    ProductQuantizerConfig,
)
from retriever.heads.balance import balanced_codes, sinkhorn

N, M, K, S = 64, 3, 8, 4
SEEDS = (0, 1, 2)
EPSILONS = (0.003, 0.05, 1.0)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_sinkhorn(costs: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Alternate scaling of columns and rows of one codebook's kernel, (N, K), element by element."""
    low, high = costs.min(), costs.max()
    plan = np.exp(-((costs - low) / (high - low) * 2 - 1) / epsilon)
    rows, columns = plan.shape
    for _ in range(iterations):
        for k in range(columns):
            plan[:, k] *= (1 / columns) / plan[:, k].sum()
        for n in range(rows):
            plan[n] *= (1 / rows) / plan[n].sum()
    return plan


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_rows_of_the_plan_sum_to_one_over_n(seed: int, epsilon: float) -> None:
    plan = sinkhorn(rand(N, M, K, seed=seed).square(), epsilon=epsilon, iterations=100)
    torch.testing.assert_close(plan.sum(2), torch.full((N, M), 1 / N).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("epsilon", [0.05, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_columns_of_the_plan_sum_to_one_over_k(seed: int, epsilon: float) -> None:
    plan = sinkhorn(rand(N, M, K, seed=seed).square(), epsilon=epsilon, iterations=2000)
    torch.testing.assert_close(plan.sum(0), torch.full((M, K), 1 / K).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("iterations", [1, 7, 100])
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_plan_is_that_of_a_naive_iteration(seed: int, epsilon: float, iterations: int) -> None:
    costs = rand(N, M, K, seed=seed).square()
    plan = sinkhorn(costs, epsilon=epsilon, iterations=iterations)
    for m in range(M):
        expected = naive_sinkhorn(costs[:, m].double().numpy(), epsilon, iterations)
        np.testing.assert_allclose(plan[:, m].numpy(), expected, rtol=1e-8, atol=1e-300)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_plan_does_not_depend_on_the_scale_and_offset_of_the_costs(seed: int) -> None:
    costs = rand(N, M, K, seed=seed).double()
    plans = [sinkhorn(c, epsilon=0.05, iterations=50) for c in (costs, 1000 * costs + 5)]
    torch.testing.assert_close(*plans, rtol=1e-8, atol=1e-15)


def test_equal_costs_give_the_uniform_plan() -> None:
    plan = sinkhorn(torch.full((N, M, K), 3.0), epsilon=0.003, iterations=5)
    torch.testing.assert_close(plan, torch.full((N, M, K), 1 / (N * K)).double(), rtol=1e-9, atol=0)


def skewed_costs(seed: int) -> Tensor:
    """Costs by which nearly every vector would choose the first codeword."""
    costs = rand(512, M, K, seed=seed).square()
    costs[:, :, 0] -= 3
    return costs


@pytest.mark.parametrize("seed", SEEDS)
def test_codes_of_skewed_costs_are_nearly_uniform(seed: int) -> None:
    costs = skewed_costs(seed)
    codes = balanced_codes(costs, epsilon=0.003, iterations=100)
    shares = [np.bincount(codes[:, m], minlength=K) / 512 for m in range(M)]
    free = np.bincount(costs.argmin(-1)[:, 0], minlength=K) / 512
    assert free.max() > 0.8
    assert np.max(shares) < 1.5 / K
    assert np.min(shares) > 0.5 / K


@pytest.mark.parametrize("seed", SEEDS)
def test_costs_that_are_balanced_already_keep_their_nearest_codewords(seed: int) -> None:
    codes = torch.arange(N).repeat(M, 1).T % K
    costs = torch.ones(N, M, K).scatter(2, codes[:, :, None], 0.0) + 0.01 * rand(N, M, K, seed=seed)
    assert torch.equal(balanced_codes(costs, epsilon=0.05, iterations=100), codes)


def make_head(seed: int, **options: object) -> tuple[ProductQuantizer, Tensor]:
    """Return a quantizer and vectors that crowd around one of its codewords."""
    config = ProductQuantizerConfig(
        num_codebooks=M, codebook_bits=3, rotation="none", balance="sinkhorn", **options
    )
    head = config.build(M * S)
    with torch.no_grad():
        head.codebooks.copy_(rand(M, K, S, seed=seed))
    crowd = head.codebooks.detach()[:, 0].flatten() + 0.3 * rand(256, M * S, seed=seed + 100)
    return head, crowd


@pytest.mark.parametrize("seed", SEEDS)
def test_codes_in_training_are_spread_over_the_codewords(seed: int) -> None:
    head, x = make_head(seed)
    counts = torch.stack([head.train()(x).codes[:, m].bincount(minlength=K) for m in range(M)])
    assert int(counts.max()) < 2 * 256 / K


@pytest.mark.parametrize("seed", SEEDS)
def test_codes_in_evaluation_are_the_nearest_codewords(seed: int) -> None:
    head, x = make_head(seed)
    distances = (x.view(256, M, 1, S) - head.codebooks.detach()).square().sum(-1)
    assert torch.equal(head.eval()(x).codes, distances.argmin(-1))


@pytest.mark.parametrize("seed", SEEDS)
def test_encoded_codes_are_never_balanced(seed: int) -> None:
    head, x = make_head(seed)
    expected = head.eval()(x).codes
    assert torch.equal(head.train().encode(x), expected)


@pytest.mark.parametrize("estimator", ["identity", "codeword", "softmax"])
def test_the_reconstruction_in_training_is_made_of_the_balanced_codes(estimator: str) -> None:
    head, x = make_head(0, estimator=estimator)
    output = head.train()(x)
    torch.testing.assert_close(output.reconstruction, head.decode(output.codes), rtol=0, atol=1e-5)


def test_only_the_codewords_of_an_inverted_file_are_balanced() -> None:
    """Lists keep their nearest vectors: a search would look for them there."""
    head = IVFProductQuantizerConfig(
        num_lists=4, num_codebooks=M, codebook_bits=3, rotation="none", balance="sinkhorn"
    ).build(M * S)
    with torch.no_grad():
        head.coarse.codewords.copy_(rand(1, 4, M * S, seed=3))
    x = head.centroids[1].detach() + 0.1 * rand(64, M * S, seed=4)
    lists = head.train()(x).codes[:, 0]
    assert lists.tolist() == [1] * 64


@pytest.mark.parametrize("assignment", ["frozen", "frozen_in_training"])
def test_a_frozen_assignment_is_refused_together_with_balance(assignment: str) -> None:
    with pytest.raises(InputError, match=r"balance none, got 'l2' and 'sinkhorn'"):
        ProductQuantizerConfig(balance="sinkhorn", assignment=assignment)


@pytest.mark.parametrize("epsilon", [0.0, 0.0019, float("inf"), float("nan")])
def test_an_epsilon_whose_kernel_float64_cannot_hold_is_refused(epsilon: float) -> None:
    with pytest.raises(InputError, match=r"sinkhorn_epsilon must be "):
        ProductQuantizerConfig(sinkhorn_epsilon=epsilon)


def test_the_smallest_allowed_epsilon_gives_a_finite_plan() -> None:
    plan = sinkhorn(rand(N, M, K, seed=0), epsilon=0.002, iterations=100)
    assert bool(plan.isfinite().all())


@pytest.mark.parametrize("iterations", [0, -1])
def test_no_iteration_is_refused(iterations: int) -> None:
    with pytest.raises(InputError, match=f"sinkhorn_iterations must be positive, got {iterations}"):
        ProductQuantizerConfig(sinkhorn_iterations=iterations)

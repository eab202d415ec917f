"""What each gradient estimator returns, and what its gradient reaches.

Oracles are written as loops in float64 from the papers' formulas; none calls the library.

Shapes: N vectors, M codebooks, K codewords, S sub-dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever.heads.estimators import (
    ESTIMATORS,
    codeword_estimator,
    identity_estimator,
    softmax_estimator,
)

N, M, K, S = 5, 3, 8, 4
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """Float64 inputs of an estimator and an upstream gradient."""

    z: Tensor  # (N, M, S)
    codebooks: Tensor  # (M, K, S)
    codes: Tensor  # (N, M)
    upstream: Tensor  # (N, M, S)
    temperature: float

    def scores(self, z: Tensor, codebooks: Tensor) -> Tensor:
        return -(z[:, :, None] - codebooks[None]).square().sum(-1) / self.temperature


def make_case(seed: int, temperature: float = 1.0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(N, M, S, generator=generator, dtype=torch.float64)
    codebooks = torch.randn(M, K, S, generator=generator, dtype=torch.float64)
    upstream = torch.randn(N, M, S, generator=generator, dtype=torch.float64)
    codes = (z[:, :, None] - codebooks[None]).square().sum(-1).argmin(-1)
    return Case(z.requires_grad_(), codebooks.requires_grad_(), codes, upstream, temperature)


def selected(case: Case) -> Tensor:
    rows = [[case.codebooks[m, case.codes[n, m]] for m in range(M)] for n in range(N)]
    return torch.stack([torch.stack(row) for row in rows]).detach()


def softmax_moments(z: np.ndarray, codewords: np.ndarray, temperature: float) -> tuple[np.ndarray, ...]:
    """Return p (K,), mean (S,) and covariance (S, S) of one codebook's codewords under the selection softmax."""
    logits = np.array([-((z - c) ** 2).sum() / temperature for c in codewords])
    p = np.exp(logits - logits.max())
    p /= p.sum()
    mean = sum(weight * c for weight, c in zip(p, codewords, strict=True))
    covariance = sum(weight * np.outer(c - mean, c - mean) for weight, c in zip(p, codewords, strict=True))
    return p, mean, covariance


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_value_is_the_selected_codewords(name: str, seed: int) -> None:
    case = make_case(seed)
    estimate = ESTIMATORS[name](case.z, case.codebooks, case.scores(case.z, case.codebooks), case.codes)
    torch.testing.assert_close(estimate.codewords, selected(case), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("estimator", [identity_estimator, codeword_estimator])
def test_straight_through_gradient_of_the_vectors_is_the_upstream_gradient(
    estimator: object, seed: int
) -> None:
    case = make_case(seed)
    scores = case.scores(case.z, case.codebooks)
    codewords = estimator(case.z, case.codebooks, scores, case.codes).codewords
    codewords.backward(case.upstream)
    assert torch.equal(case.z.grad, case.upstream)


@pytest.mark.parametrize("seed", SEEDS)
def test_identity_gives_the_codebooks_no_gradient(seed: int) -> None:
    case = make_case(seed)
    scores = case.scores(case.z, case.codebooks)
    identity_estimator(case.z, case.codebooks, scores, case.codes).codewords.backward(case.upstream)
    assert case.codebooks.grad is None or not case.codebooks.grad.any()


@pytest.mark.parametrize("seed", SEEDS)
def test_codeword_gives_each_chosen_codeword_the_summed_upstream_gradient_and_others_none(seed: int) -> None:
    case = make_case(seed)
    scores = case.scores(case.z, case.codebooks)
    codeword_estimator(case.z, case.codebooks, scores, case.codes).codewords.backward(case.upstream)
    expected = torch.zeros(M, K, S, dtype=torch.float64)
    for n in range(N):
        for m in range(M):
            expected[m, case.codes[n, m]] += case.upstream[n, m]
    torch.testing.assert_close(case.codebooks.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_jacobian_is_twice_the_covariance_over_the_temperature_in_each_subspace(
    seed: int, temperature: float
) -> None:
    case = make_case(seed, temperature)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: softmax_estimator(z, case.codebooks, case.scores(z, case.codebooks), case.codes).codewords,
        case.z,
    )
    expected = np.zeros((N, M, S, N, M, S))
    z, codebooks = case.z.detach().numpy(), case.codebooks.detach().numpy()
    for n in range(N):
        for m in range(M):
            covariance = softmax_moments(z[n, m], codebooks[m], temperature)[2]
            expected[n, m, :, n, m, :] = 2 * covariance / temperature
    np.testing.assert_allclose(jacobian.detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_gradient_of_the_vectors_is_the_finite_difference_of_the_soft_mean(
    seed: int, temperature: float
) -> None:
    case = make_case(seed, temperature)
    scores = case.scores(case.z, case.codebooks)
    softmax_estimator(case.z, case.codebooks, scores, case.codes).codewords.backward(case.upstream)
    z, codebooks, step = case.z.detach().numpy(), case.codebooks.detach().numpy(), 1e-5
    expected = np.zeros((N, M, S))
    for n, m, s in np.ndindex(N, M, S):
        shift = step * np.eye(S)[s]
        above = softmax_moments(z[n, m] + shift, codebooks[m], temperature)[1]
        below = softmax_moments(z[n, m] - shift, codebooks[m], temperature)[1]
        expected[n, m, s] = ((above - below) / (2 * step)) @ case.upstream[n, m].numpy()
    np.testing.assert_allclose(case.z.grad.numpy(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_codebook_gradient_is_the_direct_one_of_the_chosen_and_the_softmax_one_of_all(
    seed: int, temperature: float
) -> None:
    case = make_case(seed, temperature)
    scores = case.scores(case.z, case.codebooks)
    softmax_estimator(case.z, case.codebooks, scores, case.codes).codewords.backward(case.upstream)
    z, codebooks, g = (t.detach().numpy() for t in (case.z, case.codebooks, case.upstream))
    expected = np.zeros((M, K, S))
    for n in range(N):
        for m in range(M):
            expected[m, case.codes[n, m]] += g[n, m]
            p, mean, _ = softmax_moments(z[n, m], codebooks[m], temperature)
            for k in range(K):
                score_share = p[k] * g[n, m] @ (codebooks[m, k] - mean)
                expected[m, k] += score_share * 2 * (z[n, m] - codebooks[m, k]) / temperature
    np.testing.assert_allclose(case.codebooks.grad.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_gradient_reaches_every_codeword(seed: int) -> None:
    case = make_case(seed)
    scores = case.scores(case.z, case.codebooks)
    softmax_estimator(case.z, case.codebooks, scores, case.codes).codewords.backward(case.upstream)
    assert bool((case.codebooks.grad != 0).any(-1).all())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_log_assignment_is_the_log_softmax_at_the_codes_summed_over_the_codebooks(
    seed: int, temperature: float
) -> None:
    case = make_case(seed, temperature)
    scores = case.scores(case.z, case.codebooks)
    log_assignment = softmax_estimator(case.z, case.codebooks, scores, case.codes).log_assignment
    z, codebooks = case.z.detach().numpy(), case.codebooks.detach().numpy()
    expected = [
        sum(
            np.log(softmax_moments(z[n, m], codebooks[m], temperature)[0][case.codes[n, m]]) for m in range(M)
        )
        for n in range(N)
    ]
    np.testing.assert_allclose(log_assignment.detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", [identity_estimator, codeword_estimator])
def test_estimator_without_a_softmax_has_no_log_assignment(estimator: object) -> None:
    case = make_case(0)
    scores = case.scores(case.z, case.codebooks)
    assert estimator(case.z, case.codebooks, scores, case.codes).log_assignment is None


@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_gradient_of_the_vectors_vanishes_when_the_choice_is_clear(seed: int) -> None:
    case = make_case(seed, temperature=1e-4)
    scores = case.scores(case.z, case.codebooks)
    softmax_estimator(case.z, case.codebooks, scores, case.codes).codewords.backward(case.upstream)
    assert case.z.grad.abs().max() < 1e-6

"""Selection functions score as their formulas say, and what scores best is what is encoded.

Oracles are loops in float64 written from the formulas in MoPQ's paper and release.

Shapes: N vectors, M codebooks, K codewords, S sub-dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever import InputError
from retriever.heads import ProductQuantizer, ProductQuantizerConfig
from retriever.heads.selection import SELECTIONS, Selection

N, M, K, S = 20, 3, 8, 4
SEEDS = (0, 1, 2)
every_selection = pytest.mark.parametrize("name", SELECTIONS)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_selection(name: str, seed: int) -> Selection:
    """Return a selection function with random weights in float64."""
    selection = SELECTIONS[name](M, K, S).double()
    with torch.no_grad():
        for number, parameter in enumerate(selection.parameters()):
            parameter.copy_(rand(*parameter.shape, seed=1000 + 10 * seed + number))
    return selection


Score = Callable[[dict[str, np.ndarray], np.ndarray, np.ndarray, int, int], float]
"""Weights, whole vector (M, S), codebooks (M, K, S), m, k -> score."""

FORMULAS: dict[str, Score] = {
    "l2": lambda w, z, c, m, k: -((z[m] - c[m, k]) ** 2).sum(),
    "inner_product": lambda w, z, c, m, k: z[m] @ c[m, k],
    "cosine": lambda w, z, c, m, k: z[m] @ c[m, k] / np.sqrt((z[m] @ z[m]) * (c[m, k] @ c[m, k])),
    "bilinear": lambda w, z, c, m, k: z[m] @ w["weight"][m] @ c[m, k],
    "mlp": lambda w, z, c, m, k: max(
        0.0, w["linear.weight"][m * K + k] @ z.ravel() + w["linear.bias"][m * K + k]
    ),
    "sub_mlp": lambda w, z, c, m, k: max(0.0, w["weight"][m, k] @ z[m] + w["bias"][m, k]),
    "mix": lambda w, z, c, m, k: (
        np.concatenate([w["product"][m], w["distance"][m]])
        @ np.concatenate([z[m] * c[m, k], (z[m] - c[m, k]) ** 2])
    ),
    "dpq": lambda w, z, c, m, k: z[m] @ w["keys"][m, k],
}


def formula(name: str, selection: Selection, z: Tensor, codebooks: Tensor) -> np.ndarray:
    """Return all scores, (N, M, K), one by one."""
    weights = {key: value.detach().numpy() for key, value in selection.state_dict().items()}
    scores = np.empty((len(z), M, K))
    for n, m, k in np.ndindex(scores.shape):
        scores[n, m, k] = FORMULAS[name](weights, z[n].numpy(), codebooks.numpy(), m, k)
    return scores


def make_head(name: str, seed: int, **options: object) -> ProductQuantizer:
    """Return a quantizer with random codewords and random weights of its selection function."""
    config = ProductQuantizerConfig(
        num_codebooks=M, codebook_bits=3, rotation="none", selection=name, **options
    )
    head = config.build(M * S)
    with torch.no_grad():
        head.codebooks.copy_(rand(M, K, S, seed=seed))
        for parameter, source in zip(
            head.fine.selection.parameters(), make_selection(name, seed).parameters(), strict=True
        ):
            parameter.copy_(source)
    return head


def test_every_selection_has_a_formula_here() -> None:
    assert list(FORMULAS) == list(SELECTIONS)


@every_selection
@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_those_of_the_written_formula(name: str, seed: int) -> None:
    selection, z, codebooks = (
        make_selection(name, seed),
        rand(N, M, S, seed=seed),
        rand(M, K, S, seed=seed + 50),
    )
    expected = formula(name, selection, z, codebooks)
    np.testing.assert_allclose(selection(z, codebooks).detach().numpy(), expected, rtol=0, atol=1e-10)


@every_selection
@pytest.mark.parametrize("seed", SEEDS)
def test_the_codeword_that_scores_best_is_encoded(name: str, seed: int) -> None:
    head, x = make_head(name, seed), rand(N, M * S, seed=seed + 100)
    scores = formula(name, head.fine.selection.double(), x.view(N, M, S), head.codebooks.detach().double())
    head.float()
    found = np.take_along_axis(scores, head.encode(x.float()).numpy()[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(found, scores.max(-1), rtol=0, atol=1e-5)  # 1e-5: ties of float32


@every_selection
def test_training_and_encoding_choose_the_same_codewords(name: str) -> None:
    head, x = make_head(name, 0), rand(N, M * S, seed=1).float()
    assert torch.equal(head(x).codes, head.encode(x))


@pytest.mark.parametrize("name", ["l2", "inner_product", "cosine", "bilinear", "mix"])
@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_estimator_reaches_all_codewords_that_scores_look_at(name: str, seed: int) -> None:
    head = make_head(name, seed, estimator="softmax", selection_temperature=5.0)
    x, upstream = rand(N, M * S, seed=seed + 100).float(), rand(N, M * S, seed=seed + 200).float()
    head(x).reconstruction.backward(upstream)
    assert bool(head.codebooks.grad.abs().sum(-1).gt(0).all())


@pytest.mark.parametrize("name", ["mlp", "sub_mlp", "dpq"])
@pytest.mark.parametrize("seed", SEEDS)
def test_codewords_that_scores_do_not_look_at_get_only_the_direct_gradient(name: str, seed: int) -> None:
    head = make_head(name, seed, estimator="softmax", selection_temperature=5.0)
    x, upstream = rand(N, M * S, seed=seed + 100).float(), rand(N, M * S, seed=seed + 200).float()
    output = head(x)
    output.reconstruction.backward(upstream)
    expected = torch.zeros(M, K, S)
    for n, m in np.ndindex(N, M):
        expected[m, output.codes[n, m]] += upstream.view(N, M, S)[n, m]
    torch.testing.assert_close(head.codebooks.grad, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_estimator_reaches_every_key_of_dpq(seed: int) -> None:
    head = make_head("dpq", seed, estimator="softmax", selection_temperature=5.0)
    x, upstream = rand(N, M * S, seed=seed + 100).float(), rand(N, M * S, seed=seed + 200).float()
    head(x).reconstruction.backward(upstream)
    assert bool(head.fine.selection.keys.grad.abs().sum(-1).gt(0).all())


@every_selection
def test_softmax_estimator_trains_the_weights_of_a_selection(name: str) -> None:
    head = make_head(name, 0, estimator="softmax", selection_temperature=5.0)
    head(rand(N, M * S, seed=1).float()).reconstruction.backward(rand(N, M * S, seed=2).float())
    assert all(bool(p.grad.abs().sum() > 0) for p in head.fine.selection.parameters())


@every_selection
def test_probability_of_the_codes_is_the_softmax_of_the_selection_scores(name: str) -> None:
    temperature = 1.7
    head = make_head(name, 0, estimator="softmax", selection_temperature=temperature)
    x = rand(N, M * S, seed=1)
    output = head(x.float())
    scores = formula(name, head.fine.selection.double(), x.view(N, M, S), head.codebooks.detach().double())
    p = np.exp(scores / temperature)
    p /= p.sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, output.codes.numpy()[:, :, None], axis=2)
    np.testing.assert_allclose(
        output.log_assignment.detach().numpy(), np.log(chosen).sum((1, 2)), rtol=0, atol=1e-4
    )


# --- starting values ---


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["mix", "sub_mlp"])
def test_a_started_selection_prefers_the_nearest_codeword(name: str, seed: int) -> None:
    """Vectors near a codeword, so that the best logit is positive."""
    selection, codebooks = make_selection(name, seed), rand(M, K, S, seed=seed + 50)
    if name == "mix":
        selection = SELECTIONS["mix"](M, K, S).double()  # starts without codebooks
    selection.start(codebooks)
    z = codebooks.transpose(0, 1) + 0.1 * rand(K, M, S, seed=seed + 60)  # (K, M, S)
    distances = (z[:, :, None] - codebooks).square().sum(-1)
    assert torch.equal(selection(z, codebooks).argmax(-1), distances.argmin(-1))


@pytest.mark.parametrize("seed", SEEDS)
def test_sub_mlp_starts_in_the_order_of_the_distances_wherever_it_is_positive(seed: int) -> None:
    selection, codebooks = make_selection("sub_mlp", seed), rand(M, K, S, seed=seed + 50)
    selection.start(codebooks)
    z = rand(N, M, S, seed=seed + 60)
    logits = selection(z, codebooks).detach()
    distances = (z[:, :, None] - codebooks).square().sum(-1)
    shift = (logits + distances) * (
        logits > 0
    )  # the same number in a row: of the vector, not of the codeword
    for n, m in np.ndindex(N, M):
        positive = logits[n, m] > 0
        assert shift[n, m, positive].numpy() == pytest.approx(shift[n, m, positive].mean().item(), abs=1e-9)


def test_mix_starts_as_the_l2_score() -> None:
    z, codebooks = rand(N, M, S, seed=0), rand(M, K, S, seed=1)
    started, l2 = SELECTIONS["mix"](M, K, S).double(), SELECTIONS["l2"](M, K, S)
    torch.testing.assert_close(started(z, codebooks), l2(z, codebooks), rtol=0, atol=1e-10)


def test_bilinear_starts_as_the_inner_product() -> None:
    z, codebooks = rand(N, M, S, seed=0), rand(M, K, S, seed=1)
    started, products = SELECTIONS["bilinear"](M, K, S).double(), SELECTIONS["inner_product"](M, K, S)
    torch.testing.assert_close(started(z, codebooks), products(z, codebooks), rtol=0, atol=1e-12)


def test_dpq_starts_with_the_codewords_as_keys() -> None:
    z, codebooks = rand(N, M, S, seed=0), rand(M, K, S, seed=1)
    started = make_selection("dpq", 0)
    started.start(codebooks)
    expected = SELECTIONS["inner_product"](M, K, S)(z, codebooks)
    torch.testing.assert_close(started(z, codebooks).detach(), expected, rtol=0, atol=1e-12)


def test_keys_of_dpq_stay_when_codewords_move() -> None:
    z, codebooks = rand(N, M, S, seed=0), rand(M, K, S, seed=1)
    selection = make_selection("dpq", 0)
    assert torch.equal(selection(z, codebooks), selection(z, codebooks + 1))


# --- configuration ---


@every_selection
@pytest.mark.parametrize("assignment", ["frozen", "frozen_in_training"])
def test_a_frozen_assignment_is_refused_with_every_selection_but_l2(name: str, assignment: str) -> None:
    if name == "l2":
        assert ProductQuantizerConfig(selection=name, assignment=assignment).selection == name
        return
    with pytest.raises(
        InputError, match=rf"goes with selection l2 and balance none, got '{name}' and 'none'"
    ):
        ProductQuantizerConfig(selection=name, assignment=assignment)


def test_an_unknown_selection_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"selection must be one of l2, .*dpq, got 'gumbel'"):
        ProductQuantizerConfig(selection="gumbel")

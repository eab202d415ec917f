"""FAISS's starting values of a product quantizer: as good as FAISS's own, and equal for equal seeds.

Shapes: n vectors, D dimensions, M codebooks, K codewords.
"""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from index import FaissFit

D, M, BITS = 16, 4, 4
SEEDS = (0, 1, 2)


def make_sample(seed: int, rows: int = 800) -> Tensor:
    """Return vectors whose dimensions have unequal spread and depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=generator) * torch.linspace(1.5, 0.1, D)[:, None]
    return torch.randn(rows, D, generator=generator) @ mixing


def fit(
    sample: Tensor, *, rotate: bool = True, seed: int = 0, **options: int
) -> tuple[Tensor | None, Tensor]:
    return FaissFit(**options).product_codebooks(
        sample, num_codebooks=M, codebook_bits=BITS, rotate=rotate, seed=seed
    )


def squared_error(x: Tensor, rotation: Tensor | None, codebooks: Tensor) -> float:
    """Return the mean squared error of the nearest codewords, in float64."""
    y = x.double() if rotation is None else x.double() @ rotation.double().T
    z = y.view(len(x), M, 1, -1)
    distances = (z - codebooks.double()[None]).square().sum(-1)
    return distances.min(-1).values.sum(1).mean().item()


@pytest.mark.parametrize("seed", SEEDS)
def test_rotated_codebooks_are_as_good_as_those_of_the_faiss_factory(seed: int) -> None:
    x = make_sample(seed)
    theirs = faiss.index_factory(D, f"OPQ{M},PQ{M}x{BITS}np")
    theirs.train(x.numpy())
    error = np.square(theirs.sa_decode(theirs.sa_encode(x.numpy())) - x.numpy()).sum(1).mean()
    assert squared_error(x, *fit(x)) <= 1.03 * error


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_codebooks_are_as_good_as_those_of_the_faiss_factory(seed: int) -> None:
    x = make_sample(seed)
    theirs = faiss.index_factory(D, f"PQ{M}x{BITS}np")
    theirs.train(x.numpy())
    error = np.square(theirs.sa_decode(theirs.sa_encode(x.numpy())) - x.numpy()).sum(1).mean()
    assert squared_error(x, *fit(x, rotate=False)) <= 1.03 * error


@pytest.mark.parametrize("seed", SEEDS)
def test_rotation_lowers_the_error_of_unequal_dimensions(seed: int) -> None:
    x = make_sample(seed)
    assert squared_error(x, *fit(x)) < 0.9 * squared_error(x, *fit(x, rotate=False))


@pytest.mark.parametrize("seed", SEEDS)
def test_rotation_is_orthonormal(seed: int) -> None:
    rotation, _ = fit(make_sample(seed), opq_iterations=5)
    product = rotation.double() @ rotation.double().T
    torch.testing.assert_close(product, torch.eye(D).double(), rtol=0, atol=1e-5)


def test_no_rotation_is_returned_unless_asked_for() -> None:
    assert fit(make_sample(0), rotate=False)[0] is None


def test_codebooks_have_the_shape_of_the_quantizer() -> None:
    assert fit(make_sample(0), rotate=False)[1].shape == (M, 2**BITS, D // M)


@pytest.mark.parametrize("rotate", [False, True])
def test_fits_with_one_seed_are_equal(rotate: bool) -> None:
    x = make_sample(0)
    first, second = (fit(x, rotate=rotate, seed=5, opq_iterations=5) for _ in range(2))
    assert torch.equal(first[1], second[1])
    assert not rotate or torch.equal(first[0], second[0])


@pytest.mark.parametrize("rotate", [False, True])
def test_fits_with_different_seeds_differ(rotate: bool) -> None:
    x = make_sample(0)
    first, second = (fit(x, rotate=rotate, seed=seed, opq_iterations=5) for seed in (5, 6))
    assert not torch.equal(first[1], second[1])


def test_sample_is_left_as_it_is() -> None:
    x = make_sample(0)
    before = x.clone()
    fit(x, opq_iterations=2)
    assert torch.equal(x, before)


def test_sample_that_is_not_contiguous_gives_the_same_fit() -> None:
    x = make_sample(0)
    strided = x.T.contiguous().T
    assert torch.equal(fit(strided, opq_iterations=2)[1], fit(x, opq_iterations=2)[1])


def test_as_many_vectors_as_codewords_are_enough() -> None:
    x = make_sample(0, rows=2**BITS)
    assert squared_error(x, *fit(x, rotate=False)) < 1e-3


def test_a_rotation_comes_of_fewer_vectors_than_dimensions() -> None:
    wide = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))  # FAISS 1.15 ended the process
    rotation, _ = fit(wide, opq_iterations=3)
    assert rotation is not None
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(64), rtol=0, atol=1e-4)

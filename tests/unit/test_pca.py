"""The PCA head: principal components in front of another head.

Shapes: N vectors, D dimensions, E components.
"""

from __future__ import annotations

import re
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from index import FaissFit
from retriever import InputError
from retriever.heads import (
    PCA,
    FlatVectors,
    IVFProductQuantizerConfig,
    NoCompressionConfig,
    PCAConfig,
    ProductQuantizerConfig,
)

D, E = 24, 8
QUANTIZER = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)


def sample(seed: int, rows: int = 300) -> Tensor:
    """Return vectors whose dimensions are correlated and whose mean is far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator) * torch.linspace(2, 0.1, D)
    return torch.randn(rows, D, generator=generator) @ mix.T + 5 * torch.randn(D, generator=generator)


def started(seed: int, **options: Any) -> PCA:
    head = PCAConfig(**{"components": E, **options}).build(D)
    head.warm_start(sample(seed), FaissFit(), seed)
    return head


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_components_are_those_of_faiss_up_to_their_sign(seed: int) -> None:
    x = sample(seed)
    oracle = faiss.PCAMatrix(D, E)
    oracle.train(x.numpy())
    y = started(seed).map_queries(x)
    np.testing.assert_allclose(y.abs().numpy(), np.abs(oracle.apply(x.numpy())), atol=2e-3)


def test_rows_of_the_matrix_are_orthonormal() -> None:
    matrix = started(0).matrix.double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(E, dtype=torch.double), atol=1e-6, rtol=0)


def test_l2_ranks_as_the_reconstruction_in_all_dimensions_does() -> None:
    head, x, q = started(0, inner=QUANTIZER), sample(0), sample(1, 20)
    y = head.decode(head.encode(x)).double()
    whole = y @ head.matrix.double() + head.mean.double()  # (N, D)
    inside = torch.cdist(head.map_queries(q).double(), y).square()
    outside = torch.cdist(q.double(), whole).square()
    difference = outside - inside  # the part of a query outside the components, whatever the document
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), atol=1e-3, rtol=0)


def test_the_inner_head_starts_from_the_components() -> None:
    head = started(0, inner=QUANTIZER)
    alone = QUANTIZER.build(E)
    alone.warm_start(head.map_queries(sample(0)), FaissFit(), 0)
    assert torch.equal(head.inner.codebooks, alone.codebooks)  # type: ignore[arg-type]


def test_more_components_lose_less() -> None:
    x = sample(0)
    kept = [started(0, components=size).map_queries(x).square().sum().item() for size in (2, 8, 16, D)]
    assert kept == sorted(kept)
    assert kept[-1] == pytest.approx((x - x.mean(0)).square().sum().item(), rel=1e-4)


def test_gradient_reaches_towers_and_codewords_and_not_the_components() -> None:
    head, x = started(0, inner=QUANTIZER), sample(0).requires_grad_()
    output = head(x)
    output.reconstruction.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert head.inner.codebooks.grad.abs().sum() > 0  # type: ignore[union-attr,operator]
    assert {name for name, _ in head.named_parameters()} == {"inner.fine.codewords"}
    assert torch.equal(output.mapped, head.map_queries(x))  # type: ignore[arg-type]


def test_float_components_are_exported_for_l2() -> None:
    assert started(0).export() == FlatVectors(dim=E, metric="l2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 0}, "components must be at least 1, got 0."),
        ({"components": D + 1}, f"components must be at most the dimension {D}, got {D + 1}."),
        ({"inner": NoCompressionConfig()}, "inner must be a head that quantizes, got 'none'."),
        ({"inner": PCAConfig(components=4)}, "inner must be a head that quantizes, got 'pca'."),
        (
            {"inner": ProductQuantizerConfig(num_codebooks=4, metric="inner_product")},
            "needs an inner head with metric l2, got 'inner_product'.",
        ),
        ({"components": 9, "inner": QUANTIZER}, "must be a multiple of num_codebooks, got dim=9"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        PCAConfig(**{"components": E, **options}).build(D)


def test_a_sample_too_small_for_the_inner_head_is_refused() -> None:
    head = PCAConfig(components=E, inner=IVFProductQuantizerConfig(num_codebooks=4, num_lists=5)).build(D)
    with pytest.raises(InputError, match="256"):
        head.warm_start(sample(0, 200), FaissFit(), 0)

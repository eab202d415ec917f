"""Codewords fitted together to codes: the solution of the normal equations, and nearer to the documents of a start.

Shapes: N vectors, D dimensions, M codebooks, K codewords, J lists.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from index import FaissFit
from retriever import InputError
from retriever.heads import IVFResidualQuantizerConfig, ResidualQuantizerConfig
from retriever.heads.refit import refit

D, M, BITS, J, N = 24, 5, 5, 40, 400
SEEDS = (0, 1, 2)
SIZE: dict[str, Any] = {"num_codebooks": M, "codebook_bits": BITS, "eval_beam": 8}
CONFIGS = (ResidualQuantizerConfig, IVFResidualQuantizerConfig)


def make_config(kind: type[ResidualQuantizerConfig], **options: Any) -> ResidualQuantizerConfig:
    lists = {"num_lists": J, "list_beam": 3} if kind is IVFResidualQuantizerConfig else {}
    return kind(**SIZE, **lists, **options)


def make_vectors(seed: int, rows: int = N) -> Tensor:
    """Return vectors whose dimensions have unequal spread."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, generator=generator) * torch.linspace(2, 0.2, D)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sizes", [(7,), (40, 32, 32), (3, 500, 8, 8, 8, 8)])
def test_refit_solves_the_normal_equations(seed: int, sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = make_vectors(seed).double()
    books = [torch.randn(size, D, generator=generator, dtype=torch.double) for size in sizes]
    codes = torch.stack([torch.randint(size, (N,), generator=generator) for size in sizes], 1)
    columns = [torch.nn.functional.one_hot(codes[:, a], size) for a, size in enumerate(sizes)]
    chosen, words = torch.cat(columns, 1).double(), torch.cat(books)
    system = chosen.T @ chosen + torch.eye(len(words), dtype=torch.double)
    exact = torch.linalg.solve(system, chosen.T @ x + words)
    found = torch.cat(refit(x, books, codes))
    assert (found - exact).norm() < 1e-5 * (exact - words).norm()
    unused = chosen.sum(0) == 0
    assert torch.equal(found[unused], words[unused])


def test_vectors_that_their_codewords_make_leave_the_codewords_as_they_are() -> None:
    books = [torch.randn(8, D), torch.randn(16, D)]
    codes = torch.stack([torch.randint(8, (N,)), torch.randint(16, (N,))], 1)
    x = books[0][codes[:, 0]] + books[1][codes[:, 1]]
    for book, found in zip(books, refit(x, books, codes), strict=True):
        assert found.dtype == book.dtype
        torch.testing.assert_close(found, book, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_start_is_nearer_to_its_documents(kind: type[ResidualQuantizerConfig], seed: int) -> None:
    x, errors = make_vectors(seed), []
    for fitted in (False, True):
        head = make_config(kind, refit=fitted).build(D)
        head.warm_start(x, FaissFit(), seed)
        assert head.training
        head.eval()
        errors.append(float((head.decode(head.encode(x)).detach() - x).square().sum(1).mean()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_documents_of_the_start_or_others(kind: type[ResidualQuantizerConfig]) -> None:
    with pytest.raises(InputError, match="Set refit true for a corpus that is known"):
        make_config(kind, refit=True, leave_one_out=True)


def test_lists_that_are_sums_are_refused() -> None:
    with pytest.raises(InputError, match="got list_structure=gno_imi"):
        IVFResidualQuantizerConfig(**SIZE, num_lists=16, list_structure="gno_imi", refit=True)

"""Codewords fitted without the documents that they are held against: an oracle by brute force, and documents to come.

Shapes: n documents, B sums, D dimensions, K codewords, M codebooks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from index import FaissFit
from index.leave_one_out import fit_step, fit_sums
from retriever import InputError
from retriever.heads import (
    CompressionHead,
    HeadConfig,
    IVFProductQuantizerConfig,
    IVFResidualQuantizerConfig,
    ResidualQuantizerConfig,
)

D, M, BITS, J, N = 24, 5, 5, 40, 400
SEEDS = (0, 1, 2)
SIZE: dict[str, Any] = {"num_codebooks": M, "codebook_bits": BITS}


def make_vectors(seed: int, rows: int = N) -> Tensor:
    """Return vectors whose dimensions have unequal spread."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, generator=generator) * torch.linspace(2, 0.2, D)


def step_by_brute_force(residuals: Tensor, centroids: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Return codewords and what is left, in float64, from the means of all other documents for each one."""
    residuals, centroids = residuals.double(), centroids.double()
    count, width, _ = residuals.shape
    nearest = torch.cdist(residuals.flatten(0, 1), centroids).argmin(1).view(count, width)

    def means(documents: Tensor) -> Tensor:
        """Return the means of the residuals next to the centroids; infinite where there are none."""
        words = torch.full_like(centroids, torch.inf)
        for word in nearest[documents].unique().tolist():
            words[word] = residuals[documents][nearest[documents] == word].mean(0)
        return words

    parents, chosen = [], []
    for document in range(count):
        words = means(torch.arange(count) != document)
        untouched = words.isinf() & ~torch.isin(torch.arange(len(words)), nearest[document])[:, None]
        words = torch.where(untouched, centroids, words)  # next to which nothing lies
        table = (residuals[document][:, None] - words).square().sum(2).flatten()
        best = table.topk(beam, largest=False).indices
        parents.append(residuals[document][best // len(words)])
        chosen.append(words[best % len(words)])
    parent, word = torch.stack(parents), torch.stack(chosen)
    shrink = (parent[:, 0] * word[:, 0]).sum() / word[:, 0].square().sum()
    every = means(torch.arange(count))
    return shrink * torch.where(every.isinf(), centroids, every), parent - shrink * word


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("width", "beam"), [(1, 1), (1, 4), (3, 3)])
def test_a_step_leaves_what_the_other_documents_codewords_would(seed: int, width: int, beam: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    residuals = make_vectors(seed, 60)[:, None] + 0.3 * torch.randn(60, width, D, generator=generator)
    centroids = residuals[torch.randperm(60, generator=generator)[:12], 0]
    words, left = fit_step(residuals, centroids, beam)
    expected_words, expected = step_by_brute_force(residuals, centroids, beam)
    torch.testing.assert_close(words.double(), expected_words, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_document_alone_with_its_codeword_takes_another() -> None:
    residuals = torch.tensor([[0.0, 4.0], [0.1, 4.0], [9.0, 0.0]])[:, None]
    words, left = fit_step(residuals, residuals[[0, 2], 0], 1)
    shrink = words[1, 0] / 9
    torch.testing.assert_close(left[2, 0], torch.tensor([9.0, 0.0]) - shrink * torch.tensor([0.05, 4.0]))


def test_documents_that_are_all_alike_leave_nothing() -> None:
    words, left = fit_step(torch.ones(8, 1, D), torch.ones(2, D), 2)
    assert words.isfinite().all()
    torch.testing.assert_close(left[:, 0], torch.zeros(8, D))


def test_as_many_codewords_as_documents_are_finite() -> None:
    x = make_vectors(0, 2**BITS)
    assert fit_sums(x[:, None], **SIZE, beam=5, seed=0).isfinite().all()


def make_head(config: HeadConfig, seed: int) -> CompressionHead:
    """Return a head that starts from a sample."""
    head = config.build(D)
    head.warm_start(make_vectors(seed), FaissFit(), seed)
    return head


def squared_error(head: CompressionHead, x: Tensor) -> float:
    return (head.decode(head.encode(x)) - x).double().square().sum(1).mean().item()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("config", "share"),
    [
        (ResidualQuantizerConfig(**SIZE), 1.0),
        (IVFResidualQuantizerConfig(**SIZE, num_lists=J, list_beam=5), 0.97),
        (IVFProductQuantizerConfig(num_codebooks=4, codebook_bits=BITS, num_lists=100), 0.98),
    ],
)
def test_documents_to_come_are_described_better_than_by_faisss_fit(
    config: HeadConfig, share: float, seed: int
) -> None:
    known, others = make_vectors(seed), make_vectors(seed + 100, 4000)
    ours, theirs = make_head(replace(config, leave_one_out=True), seed), make_head(config, seed)  # type: ignore[call-arg]
    assert squared_error(ours, others) < share * squared_error(theirs, others)
    assert squared_error(ours, known) > squared_error(theirs, known)


@pytest.mark.parametrize("options", [{"list_structure": "gno_imi"}, {"start": "uniform"}])
def test_lists_that_are_not_fitted_alone_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="leave_one_out is for fitted centroids"):
        IVFProductQuantizerConfig(num_codebooks=4, num_lists=64, leave_one_out=True, **options)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_left_of_the_sample_is_what_will_be_left_of_others(seed: int) -> None:
    residuals = make_vectors(seed)[:, None]
    books = []
    for _ in range(3):
        centroids = residuals[torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:32], 0]
        words, residuals = fit_step(residuals, centroids, 1)
        books.append(words)
    others = make_vectors(seed + 100, 4000)
    for words in books:
        others = others - words[torch.cdist(others, words).argmin(1)]
    error = others.square().sum(1).mean().item()
    assert residuals.square().sum(2).mean().item() == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_seeds_give_equal_codebooks(seed: int) -> None:
    x = make_vectors(seed)[:, None]
    first, second = (fit_sums(x, **SIZE, beam=3, seed=seed) for _ in range(2))
    assert torch.equal(first, second)

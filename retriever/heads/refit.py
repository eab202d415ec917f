"""Codewords fitted together, by least squares, to the vectors that are written with them.

A residual quantizer fits one codebook after another. Once codes are chosen, the codewords of all codebooks that are
best for them solve one linear system (Babenko and Lempitsky, CVPR 2014, section 3.2), here by conjugate gradients
(Hestenes and Stiefel, 1952), which need no matrix of all codewords by all codewords.

Shapes: N vectors, D dimensions, A codebooks of K_a codewords.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["refit"]

STEPS = 200
PRECISION = 1e-6  # of the gradient, as a share of its first norm
TINY = 1e-300


@torch.no_grad()
def refit(
    x: Float[Tensor, "N D"], books: Sequence[Float[Tensor, "K_a D"]], codes: Int[Tensor, "N A"]
) -> list[Float[Tensor, "K_a D"]]:
    """Return the codebooks C with the least sum_i ||x_i - sum_a C_a[codes_ia]||^2 + sum_a ||C_a - books_a||^2.

    The second term counts what a codeword was as one more vector: one that few vectors have moves little, and one that
    none has stays. Computed in float64.

    Args:
        x: Vectors.
        books: Codebooks as they are.
        codes: A codeword of every codebook; their sum stands for the vector.
    """
    sizes = [len(book) for book in books]
    first = torch.tensor([0, *sizes[:-1]], device=codes.device).cumsum(0)
    columns = (codes + first).T.contiguous()  # rows of `start`
    start = torch.cat(list(books)).double()

    def sums(words: Tensor) -> Tensor:
        total = torch.zeros(len(x), words.shape[1], dtype=words.dtype, device=words.device)
        for column in columns:
            total += words[column]
        return total

    def gathered(rows: Tensor) -> Tensor:
        total = torch.zeros_like(start)
        for column in columns:
            total.index_add_(0, column, rows)
        return total

    used = torch.bincount(columns.flatten(), minlength=len(start))
    weight = 1 + used.double()[:, None]  # the system's diagonal
    gradient = gathered(x.double() - sums(start))
    moved, enough = torch.zeros_like(start), PRECISION * gradient.norm()
    direction = gradient / weight
    slope = (gradient * direction).sum(0)  # every dimension is a system of its own
    for _ in range(STEPS):
        if gradient.norm() <= enough:
            break
        image = gathered(sums(direction)) + direction
        step = slope / (direction * image).sum(0).clamp(min=TINY)
        moved += step * direction
        gradient = gradient - step * image
        scaled = gradient / weight
        before, slope = slope, (gradient * scaled).sum(0)
        direction = scaled + slope / before.clamp(min=TINY) * direction
    return list((start + moved).to(x.dtype).split(sizes))

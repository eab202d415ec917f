"""Residual quantization: codewords that add up to a vector, chosen one step after the other.

Shapes: N vectors, D dimensions, M codebooks (steps), K codewords, B sums that a beam keeps, L that it begins with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retriever.heads.pieces import at_once

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["beam_search", "beam_search_from", "gather_rows", "residuals", "squared_distances"]

TABLE = 1 << 20  # entries of the (rows, B, K) table of distances; 4 MB stay in the caches of a CPU


@torch.no_grad()
def beam_search(x: Float[Tensor, "N D"], codebooks: Float[Tensor, "M K D"], beam: int) -> Int[Tensor, "N M"]:
    """Return codes whose codewords add up to nearly `x`.

    Every step extends each of the B best sums by all K codewords and keeps the B nearest to `x`; the last keeps one
    (Babenko and Lempitsky, CVPR 2014; as `faiss.ResidualQuantizer`). B = 1 is the greedy choice.

    Args:
        x: Vectors.
        codebooks: Codewords in the order of the steps.
        beam: B; a step cannot keep more sums than there are.
    """
    return beam_search_from(x[:, None], codebooks, beam)[:, 1:]


@torch.no_grad()
def beam_search_from(
    starts: Float[Tensor, "N L D"], codebooks: Float[Tensor, "M K D"], beam: int
) -> Int[Tensor, "N 1+M"]:
    """Return the start that leads to the smallest residual, and the codes from there on; see `beam_search`.

    Args:
        starts: What each of L beginnings of a sum leaves of a vector.
        codebooks: Codewords in the order of the steps.
        beam: B.
    """
    rows = max(1, at_once(TABLE, starts.device) // (max(beam, starts.shape[1]) * codebooks.shape[1]))
    return torch.cat([_search_rows(part, codebooks, beam) for part in starts.split(rows)])


def _search_rows(
    residual: Float[Tensor, "N L D"], codebooks: Float[Tensor, "M K D"], beam: int
) -> Int[Tensor, "N 1+M"]:
    steps, size, _ = codebooks.shape
    count, width = residual.shape[:2]
    codes = torch.arange(width, device=residual.device).expand(count, width)[:, :, None]
    for step, words in enumerate(codebooks):
        distances = squared_distances(residual, words).flatten(1)  # (N, B K)
        kept = 1 if step == steps - 1 else min(beam, distances.shape[1])
        best = distances.topk(kept, largest=False).indices
        parents, chosen = best // size, best % size
        codes = torch.cat([gather_rows(codes, parents), chosen[:, :, None]], 2)
        residual = gather_rows(residual, parents) - words[chosen]
    return codes[:, 0]


def gather_rows(table: Tensor, rows: Int[Tensor, "N B"]) -> Tensor:
    """Return the chosen rows of every table of (N, rows, columns)."""
    return table.gather(1, rows[:, :, None].expand(-1, -1, table.shape[2]))


def squared_distances(
    residual: Float[Tensor, "N B D"], words: Float[Tensor, "K D"]
) -> Float[Tensor, "N B K"]:
    """Return ||r||^2 - 2 r . c + ||c||^2, after both moved by the codewords' mean: what they share would cancel."""
    middle = words.mean(0)
    r, c = residual - middle, words - middle
    squares = r.square().sum(-1, keepdim=True) + c.square().sum(-1)  # (N, B, K)
    return squares.sub_(r @ c.T, alpha=2)


def residuals(
    x: Float[Tensor, "N D"], codewords: Float[Tensor, "N M D"], *, gradient_once: bool
) -> Float[Tensor, "N M D"]:
    """Return what each step is given: the vector less the codewords of the steps before it.

    Args:
        x: Vectors.
        codewords: Chosen codewords, as constants.
        gradient_once: Let only the first step pass a gradient on to `x`, so that the sum of the steps passes it once.
    """
    before = torch.cat([torch.zeros_like(x)[:, None], codewords.cumsum(1)[:, :-1]], 1)
    if gradient_once:
        return torch.cat([x[:, None], x.detach()[:, None] - before[:, 1:]], 1)
    return x[:, None] - before

"""Residual quantization: codewords that add up to a vector, chosen one step after the other.

Shapes: N vectors, D dimensions, M codebooks (steps), K codewords, B sums that a beam keeps, L that it begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retriever.heads.pieces import at_once

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "Asked",
    "asked_of",
    "beam_search",
    "beam_search_from",
    "gather_rows",
    "residuals",
    "squared_distances",
]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the query that is expected for each vector asks of its code, beside a small error.

    Attributes:
        offset: d = u - x, the expected query less the vector, (N, D).
        weight: w of the second term in ||e||^2 + w (2 d . e + 2 ||e||^2)^2; of one over a squared distance.
    """

    offset: Float[Tensor, "N D"]
    weight: Float[Tensor, ""]

    def costs(
        self,
        errors: Float[Tensor, "N B K"],
        residual: Float[Tensor, "N B D"],
        words: Float[Tensor, "K D"],
    ) -> Float[Tensor, "N B K"]:
        """Return the costs of residuals less codewords, e, of squared lengths `errors`.

        The code of an unknown document that lies nearest brings it nearer to any query by ||e||^2, and to the expected
        one by -2 d . e - ||e||^2: the document keeps its place if both are the same.
        """
        along = (residual @ self.offset[:, :, None]) - (self.offset @ words.T)[:, None]  # d . e
        return errors + 4 * self.weight * (along + errors).square()


TABLE = 1 << 20  # entries of the (rows, B, K) table of distances; 4 MB stay in the caches of a CPU


@torch.no_grad()
def beam_search(
    x: Float[Tensor, "N D"], codebooks: Float[Tensor, "M K D"], beam: int, asked: Asked | None = None
) -> Int[Tensor, "N M"]:
    """Return codes whose codewords add up to nearly `x`.

    Every step extends each of the B best sums by all K codewords and keeps the B nearest to `x`; the last keeps one
    (Babenko and Lempitsky, CVPR 2014; as `faiss.ResidualQuantizer`). B = 1 is the greedy choice.

    Args:
        x: Vectors.
        codebooks: Codewords in the order of the steps.
        beam: B; a step cannot keep more sums than there are.
        asked: Keep and choose sums by its costs instead of the nearest.
    """
    return beam_search_from(x[:, None], codebooks, beam, asked)[:, 1:]


@torch.no_grad()
def beam_search_from(
    starts: Float[Tensor, "N L D"], codebooks: Float[Tensor, "M K D"], beam: int, asked: Asked | None = None
) -> Int[Tensor, "N 1+M"]:
    """Return the start that leads to the smallest residual, and the codes from there on; see `beam_search`.

    Args:
        starts: What each of L beginnings of a sum leaves of a vector.
        codebooks: Codewords in the order of the steps.
        beam: B.
        asked: As in `beam_search`.
    """
    rows = max(1, at_once(TABLE, starts.device) // (max(beam, starts.shape[1]) * codebooks.shape[1]))
    parts = starts.split(rows)
    pairs = zip(parts, asked_of(parts, asked), strict=True)
    return torch.cat([_search_rows(part, codebooks, beam, own) for part, own in pairs])


def asked_of(parts: Sequence[Tensor], asked: Asked | None) -> Sequence[Asked | None]:
    """Return what is asked of each part of the vectors."""
    if asked is None:
        return [None] * len(parts)
    return [Asked(offset, asked.weight) for offset in asked.offset.split([len(part) for part in parts])]


def _search_rows(
    residual: Float[Tensor, "N L D"], codebooks: Float[Tensor, "M K D"], beam: int, asked: Asked | None
) -> Int[Tensor, "N 1+M"]:
    steps, size, _ = codebooks.shape
    count, width = residual.shape[:2]
    codes = torch.arange(width, device=residual.device).expand(count, width)[:, :, None]
    for step, words in enumerate(codebooks):
        costs = squared_distances(residual, words)
        if asked is not None:
            costs = asked.costs(costs, residual, words)
        costs = costs.flatten(1)  # (N, B K)
        kept = 1 if step == steps - 1 else min(beam, costs.shape[1])
        best = costs.topk(kept, largest=False).indices
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

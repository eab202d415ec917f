"""Cells of two codebooks: K^2 inverted lists from 2 K vectors (GNO-IMI, Babenko and Lempitsky, CVPR 2016).

The centroid of cell (i, j) is S_i + alpha_ij T_j, where S and T have all D dimensions: the cells of each S_i are laid
out alike, at distances of their own. NO-IMI is the case alpha = 1. Written from the paper's equations.

Shapes: N vectors, D dimensions, K vectors in either codebook, J = K^2 cells, R first vectors that are looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from retriever.heads.base import QuantizerFit
from retriever.heads.codebooks import AssignmentName, Codebooks, add_use, use_is_full, use_statistics
from retriever.heads.estimators import Estimate, EstimatorName
from retriever.heads.lists import ListStructure
from retriever.heads.pieces import at_once

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["Cells", "build_coarse", "learn_cells", "nearest_cells"]

CANDIDATES = 8  # R, as published
ITERATIONS = 10  # of the learning, as published
TABLE = 1 << 20  # entries of the (rows, R, K) table of distances; 4 MB stay in the caches of a CPU


def build_coarse(
    num_lists: int,
    dim: int,
    *,
    estimator: EstimatorName,
    assignment: AssignmentName,
    structure: ListStructure,
) -> Codebooks | Cells:
    """Return the coarse quantizer of a head with lists: one codebook of whole vectors, or cells.

    A centroid gets the direct gradient also where `estimator` is "softmax": a softmax path over lists is not published.
    """
    direct: EstimatorName = "identity" if estimator == "identity" else "codeword"
    if structure == "free":
        return Codebooks(1, num_lists, dim, estimator=direct, assignment=assignment)
    return Cells(num_lists, dim, estimator=direct, scaled=structure == "gno_imi")


class Cells(nn.Module):
    """A coarse quantizer in the place of `Codebooks` of J whole vectors; a cell's number is i K + j.

    A vector's cell is the nearest among all cells of the R nearest S_i.

    Args:
        num_cells: J, a square.
        width: D.
        estimator: Gradient estimator of the choice, "identity" or "codeword".
        scaled: Learn alpha; otherwise it is 1 (NO-IMI).
    """

    usage: Tensor

    def __init__(self, num_cells: int, width: int, *, estimator: EstimatorName, scaled: bool) -> None:
        super().__init__()
        assert estimator != "softmax", "there is no softmax over cells"
        size = round(num_cells**0.5)
        self.first = nn.Parameter(torch.empty(size, width).uniform_(-1, 1))
        self.second = nn.Parameter(torch.empty(size, width).uniform_(-1, 1))
        self.scales = nn.Parameter(torch.ones(size, size), requires_grad=scaled)
        self.register_buffer("usage", torch.zeros((1, num_cells), dtype=torch.int64))
        self._moves_codewords = estimator == "codeword"

    @property
    def codewords(self) -> Float[Tensor, "1 J D"]:
        """All centroids, written out."""
        return (self.first[:, None] + self.scales[:, :, None] * self.second).flatten(0, 1)[None]

    def forward(self, z: Float[Tensor, "N 1 D"]) -> tuple[Estimate, Int[Tensor, "N 1"]]:
        """Return the centroids of the vectors' cells with the estimator's gradient path, and the cells."""
        codes = self.encode(z)
        centroids = self.select(codes)
        if self._moves_codewords:
            return Estimate(centroids + (z - z.detach())), codes
        return Estimate(z + (centroids - z).detach()), codes

    @torch.no_grad()
    def encode(self, z: Float[Tensor, "N 1 D"]) -> Int[Tensor, "N 1"]:
        """Return the numbers of the vectors' cells."""
        return nearest_cells(z.squeeze(1), self.first, self.second, self.scales)[0][:, None]

    def select(self, codes: Int[Tensor, "N 1"]) -> Float[Tensor, "N 1 D"]:
        """Return the centroids of cells."""
        i, j = self._pair(codes)
        return self.first[i] + self.scales[i, j][..., None] * self.second[j]

    @torch.no_grad()
    def fit(self, z: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> Float[Tensor, "n D"]:
        """Learn the cells of vectors, from k-means and the k-means of what that leaves; return the residuals."""
        words = fit.additive_codebooks(
            z, num_codebooks=2, codebook_bits=(len(self.first) - 1).bit_length(), beam=1, seed=seed
        )
        first, second, scales, _ = learn_cells(z, *words, scaled=self.scales.requires_grad)
        self.first.copy_(first)
        self.second.copy_(second)
        self.scales.copy_(scales)
        self.usage.zero_()
        device = self.first.device
        return (z.to(device) - self.select(self.encode(z.to(device)[:, None])).squeeze(1)).cpu()

    @torch.no_grad()
    def count(self, codes: Int[Tensor, "N 1"]) -> None:
        """Add cells to the usage counts of the current window."""
        add_use(self.usage, codes)

    def usage_statistics(self) -> dict[str, float]:
        """Return perplexity and the share of cells unused in the window; empty while it is short."""
        return use_statistics(self.usage)

    @torch.no_grad()
    def restart_dead_codes(
        self, z: Float[Tensor, "N 1 D"], window: float, generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """Begin a new window if this one is full; a cell is not alone in its S_i and T_j, so none is moved."""
        if use_is_full(self.usage, window):
            self.usage.zero_()
        return {}

    def _pair(self, codes: Int[Tensor, "N 1"]) -> tuple[Int[Tensor, "N 1"], Int[Tensor, "N 1"]]:
        size = len(self.first)
        return codes // size, codes % size


def nearest_cells(
    z: Float[Tensor, "N D"],
    first: Float[Tensor, "K D"],
    second: Float[Tensor, "K D"],
    scales: Float[Tensor, "K K"],
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Return the nearest cell of every vector, among those of the R nearest S_i, and its squared distance.

    ||z - S_i - a T_j||^2 = ||z - S_i||^2 - 2 a z . T_j + (2 a S_i . T_j + a^2 ||T_j||^2), a = alpha_ij: the last part
    is the same for all vectors, so a vector costs 2 K D + R K instead of K^2 D.
    """
    middle = first.mean(0)  # what vectors and S share would cancel
    first = first - middle
    constant = 2 * scales * (first @ second.T) + scales.square() * second.square().sum(1)
    rows = max(1, at_once(TABLE, z.device) // (CANDIDATES * len(second)))
    parts = [_nearest_rows(part - middle, first, second, scales, constant) for part in z.split(rows)]
    cells, distances = (torch.cat(values) for values in zip(*parts, strict=True))
    return cells, distances


def _nearest_rows(
    z: Float[Tensor, "N D"],
    first: Float[Tensor, "K D"],
    second: Float[Tensor, "K D"],
    scales: Float[Tensor, "K K"],
    constant: Float[Tensor, "K K"],
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    squares = z.square().sum(1, keepdim=True) + first.square().sum(1) - 2 * z @ first.T  # (N, K)
    nearest = squares.topk(min(CANDIDATES, len(first)), largest=False)
    i = nearest.indices  # (N, R)
    distances = nearest.values[:, :, None] + constant[i] - 2 * scales[i] * (z @ second.T)[:, None]
    best, place = distances.flatten(1).min(1)
    size = len(second)
    return i.gather(1, (place // size)[:, None]).squeeze(1) * size + place % size, best


@torch.no_grad()
def learn_cells(
    z: Float[Tensor, "n D"],
    first: Float[Tensor, "K D"],
    second: Float[Tensor, "K D"],
    *,
    scaled: bool,
) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K D"], Float[Tensor, "K K"], list[float]]:
    """Return S, T, alpha and the mean squared distance of the vectors to their cells before and after every iteration.

    An iteration assigns the vectors, then sets alpha, T and S in turn to the minimum of the distances, the others held:

        alpha_ij = mean (z - S_i) . T_j / ||T_j||^2 over the cell,  T_j = sum alpha (z - S_i) / sum alpha^2,
        S_i = mean (z - alpha_ij T_j)

    A vector keeps its cell where the search among R candidates finds no nearer one, so no iteration makes it worse.
    """
    z, s, t = z.double(), first.double(), second.double()
    size = len(s)
    scales = torch.ones(size, size, dtype=torch.float64)
    cells, distances = nearest_cells(z, s, t, scales)
    errors = [distances.mean().item()]
    for _ in range(ITERATIONS):
        i, j = cells // size, cells % size
        if scaled:
            scales = _best_scales(z - s[i], t, cells)
        a = scales[i, j][:, None]
        t = _weighted_means(j, a * (z - s[i]), a.square().squeeze(1), t)
        s = _weighted_means(i, z - a * t[j], torch.ones_like(distances), s)
        distances = (z - s[i] - a * t[j]).square().sum(1)
        found, nearer = nearest_cells(z, s, t, scales)
        better = nearer < distances
        cells, distances = torch.where(better, found, cells), torch.where(better, nearer, distances)
        errors.append(distances.mean().item())
    return s.float(), t.float(), scales.float(), errors


def _weighted_means(
    groups: Int[Tensor, " n"],
    sums: Float[Tensor, "n D"],
    weights: Float[Tensor, " n"],
    old: Float[Tensor, "K D"],
) -> Float[Tensor, "K D"]:
    """Return the sums over each group divided by its weights; a group without weight keeps its old vector."""
    total = torch.zeros(len(old), dtype=weights.dtype).index_add_(0, groups, weights)[:, None]
    found = torch.zeros_like(old).index_add_(0, groups, sums)
    return torch.where(total > 0, found / total.clamp(min=1e-30), old)


def _best_scales(
    rest: Float[Tensor, "n D"], second: Float[Tensor, "K D"], cells: Int[Tensor, " n"]
) -> Float[Tensor, "K K"]:
    """Return alpha by what S leaves of the vectors; a cell without any takes the mean over the others of its T_j."""
    size = len(second)
    share = (rest * second[cells % size]).sum(1) / second.square().sum(1).clamp(min=1e-30)[cells % size]
    sums = torch.zeros(size * size, dtype=share.dtype).index_add_(0, cells, share).view(size, size)
    counts = torch.bincount(cells, minlength=size * size).view(size, size)
    found = sums / counts.clamp(min=1)
    known = (counts > 0).sum(0)
    mean = torch.where(known > 0, found.sum(0) / known.clamp(min=1), torch.ones_like(found[0]))
    return torch.where(counts > 0, found, mean)

"""Residual quantizer whose codewords are judged by documents that had no part in them, while it is fitted.

A codeword is the mean of the residuals that lie next to it, so the sample lies nearer to its codewords than documents
to come will, the more so the smaller the sample, and every further codebook fits residuals that are too short. Here a
document's residual is what codewords made of the *other* documents alone would leave (leave-one-out, Stone, 1974), and
every codebook is shrunk by the factor that makes that least (as means are by James and Stein, 1961). Codewords start
as FAISS's do: k-means of the residuals of all of the beam's sums, in more and more dimensions.

Shapes: n documents, B sums that a beam keeps of each, D dimensions, K codewords.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from index._faiss import load_faiss
from retriever.heads.residual import gather_rows, squared_distances

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["fit_step", "fit_sums"]

TABLE = 1 << 24  # entries of the (documents, B, K) table of distances
TINY = 1e-30


def fit_sums(
    residuals: Float[Tensor, "n B D"], *, num_codebooks: int, codebook_bits: int, beam: int, seed: int
) -> Float[Tensor, "M K D"]:
    """Return the codebooks of what is left of documents, each fitted to what the one before leaves of them.

    Args:
        residuals: What each of B beginnings of a sum leaves.
        num_codebooks: M.
        codebook_bits: log2 of K.
        beam: Sums that every step keeps.
        seed: Of k-means.
    """
    books = []
    for step in range(num_codebooks):
        centroids = _progressive_centroids(residuals.flatten(0, 1), 2**codebook_bits, seed + step)
        words, residuals = fit_step(residuals, centroids, beam)
        books.append(words)
    return torch.stack(books)


def fit_step(
    residuals: Float[Tensor, "n B D"], centroids: Float[Tensor, "K D"], beam: int
) -> tuple[Float[Tensor, "K D"], Float[Tensor, "n B' D"]]:
    """Return a step's codewords, and what they leave of documents that have no part in them.

    Args:
        residuals: What each of B sums leaves of a document.
        centroids: Where codewords begin: each becomes the mean of the residuals that are nearest to it.
        beam: B', sums that are kept of the B K there are.
    """
    rows = residuals.flatten(0, 1)
    parts = rows.split(max(1, TABLE // len(centroids)))
    nearest = torch.cat([squared_distances(part[None], centroids)[0].argmin(1) for part in parts])
    counts = torch.bincount(nearest, minlength=len(centroids))
    sums = torch.zeros_like(centroids).index_add_(0, nearest, rows)
    words = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
    size = max(1, TABLE // (residuals.shape[1] * len(centroids)))
    pieces = zip(residuals.split(size), nearest.view(residuals.shape[:2]).split(size), strict=True)
    found = [_choose(piece, own, words, counts, beam) for piece, own in pieces]
    parents, chosen = (torch.cat(part) for part in zip(*found, strict=True))
    along, length = (parents[:, 0] * chosen[:, 0]).sum(), chosen[:, 0].square().sum()
    shrink = along / length.clamp(min=TINY)
    return shrink * words, parents - shrink * chosen


def _progressive_centroids(x: Float[Tensor, "n D"], count: int, seed: int) -> Float[Tensor, "K D"]:
    """Return k-means centroids, found in the first principal components and then in more, as FAISS's RQ does."""
    faiss = load_faiss()
    rows = np.ascontiguousarray(x.numpy(), dtype=np.float32)
    options = faiss.ProgressiveDimClusteringParameters()
    options.seed, options.min_points_per_centroid = seed, 1
    clustering = faiss.ProgressiveDimClustering(rows.shape[1], count, options)
    clustering.train(len(rows), faiss.swig_ptr(rows), faiss.ProgressiveDimIndexFactory())
    return torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(count, -1).copy())


def _choose(
    residuals: Float[Tensor, "n B D"],
    nearest: Int[Tensor, "n B"],
    words: Float[Tensor, "K D"],
    counts: Int[Tensor, " K"],
    beam: int,
) -> tuple[Float[Tensor, "n B' D"], Float[Tensor, "n B' D"]]:
    """Return the residuals that the best sums extend, and the codewords that they take, without the document itself."""
    means, exists = _without(residuals, nearest, words, counts)
    table = squared_distances(residuals, words)
    for j in range(nearest.shape[1]):  # the words in which a document has a part are other words for it
        distances = (residuals - means[:, j, None]).square().sum(2)
        distances.masked_fill_(~exists[:, j, None], torch.inf)
        table.scatter_(2, nearest[:, j, None, None].expand(-1, table.shape[1], 1), distances[:, :, None])
    flat = table.flatten(1)
    best = flat.topk(min(beam, flat.shape[1]), largest=False).indices
    parents, chosen = best // len(words), best % len(words)
    own = chosen[:, :, None] == nearest[:, None]  # (n, B', B)
    taken = torch.where(own.any(2, keepdim=True), gather_rows(means, own.int().argmax(2)), words[chosen])
    return gather_rows(residuals, parents), taken


def _without(
    residuals: Float[Tensor, "n B D"],
    nearest: Int[Tensor, "n B"],
    words: Float[Tensor, "K D"],
    counts: Int[Tensor, " K"],
) -> tuple[Float[Tensor, "n B D"], Bool[Tensor, "n B"]]:
    """Return what the codeword next to each residual is without the document's own, and whether it has others."""
    same = nearest[:, :, None] == nearest[:, None]
    others = counts[nearest] - same.sum(2)
    total = counts[nearest][:, :, None] * words[nearest] - same.to(residuals) @ residuals
    return total / others.clamp(min=1)[:, :, None], others > 0

"""Starting values of quantizers, fitted by FAISS on a sample of live vectors.

Shapes: n vectors, D dimensions, M codebooks, K codewords, S = D // M sub-dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from index._faiss import load_faiss

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["FaissFit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaissFit:
    """Implements `retriever.heads.QuantizerFit`.

    Attributes:
        opq_iterations: Alternations of codebook and rotation; FAISS's default is 50.
        kmeans_iterations: k-means iterations of the final codebooks; FAISS's default is 25.
    """

    opq_iterations: int = 50
    kmeans_iterations: int = 25

    def product_codebooks(
        self, sample: Float[Tensor, "n D"], *, num_codebooks: int, codebook_bits: int, rotate: bool, seed: int
    ) -> tuple[Float[Tensor, "D D"] | None, Float[Tensor, "M K S"]]:
        """Return the OPQ rotation A of y = A x (None unless `rotate`) and PQ codebooks of a sample."""
        faiss = load_faiss()
        x = np.ascontiguousarray(sample.numpy(), dtype=np.float32)
        dim = x.shape[1]
        rotation = None
        if rotate:
            opq = faiss.OPQMatrix(dim, num_codebooks)
            opq.niter = self.opq_iterations
            inner = faiss.ProductQuantizer(dim, num_codebooks, codebook_bits)
            _quieten(inner, seed)
            opq.pq = inner
            opq.train(x)
            opq.pq = None  # `inner` stays ours to free
            rotation = faiss.vector_to_array(opq.A).reshape(dim, dim)
            x = np.ascontiguousarray(x @ rotation.T)
        pq = faiss.ProductQuantizer(dim, num_codebooks, codebook_bits)
        _quieten(pq, seed)
        pq.cp.niter = self.kmeans_iterations
        pq.train(x)
        codebooks = faiss.vector_to_array(pq.centroids).reshape(num_codebooks, 2**codebook_bits, -1)
        return None if rotation is None else torch.from_numpy(rotation), torch.from_numpy(codebooks)


def _quieten(pq: object, seed: int) -> None:
    """Set the seed of a faiss.ProductQuantizer and silence its warning on small samples."""
    pq.cp.seed = seed  # type: ignore[attr-defined]
    pq.cp.min_points_per_centroid = 1  # type: ignore[attr-defined]

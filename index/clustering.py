"""Starting values of quantizers, fitted by FAISS on a sample of live vectors.

Shapes: n vectors, D dimensions, J lists, M codebooks, K codewords, S = D // M sub-dimensions.
Additive codewords have all D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from index._faiss import load_faiss
from index.leave_one_out import fit_step, fit_sums

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import NDArray

__all__ = ["FaissFit", "code_centroids"]


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
        x = np.ascontiguousarray(sample.numpy(), dtype=np.float32)
        rotation = None
        if rotate:
            rotation = self._rotation(x, num_codebooks, codebook_bits, seed)
            x = np.ascontiguousarray(x @ rotation.T)
        codebooks = self._codebooks(x, num_codebooks, codebook_bits, seed)
        return None if rotation is None else torch.from_numpy(rotation), torch.from_numpy(codebooks)

    def coarse_product_codebooks(
        self,
        sample: Float[Tensor, "n D"],
        *,
        num_lists: int,
        num_codebooks: int,
        codebook_bits: int,
        rotate: bool,
        on_residuals: bool,
        seed: int,
        leave_one_out: bool = False,
    ) -> tuple[Float[Tensor, "D D"] | None, Float[Tensor, "J D"], Float[Tensor, "M K S"]]:
        """Return OPQ rotation (None unless `rotate`), k-means centroids, and PQ codebooks of the residuals.

        In the order of FAISS's `OPQ{M},IVF{J},PQ{M}`; unless `on_residuals` the codebooks fit the whole vectors. With
        `leave_one_out` the centroids are those of `index.leave_one_out`, and the residuals what they leave there.
        """
        x = np.ascontiguousarray(sample.numpy(), dtype=np.float32)
        rotation = None
        if rotate:
            rotation = self._rotation(x, num_codebooks, codebook_bits, seed)
            x = np.ascontiguousarray(x @ rotation.T)
        centroids = self._lists(x, num_lists, seed)
        if leave_one_out:
            lists, left = fit_step(torch.from_numpy(x)[:, None], torch.from_numpy(centroids), 1)
            centroids, rest = lists.numpy(), left[:, 0].numpy()
        else:
            rest = _residuals(x, centroids)
        residuals = rest if on_residuals else x
        codebooks = self._codebooks(residuals, num_codebooks, codebook_bits, seed)
        return (
            None if rotation is None else torch.from_numpy(rotation),
            torch.from_numpy(centroids),
            torch.from_numpy(codebooks),
        )

    def additive_codebooks(
        self,
        sample: Float[Tensor, "n D"],
        *,
        num_codebooks: int,
        codebook_bits: int,
        beam: int,
        seed: int,
        leave_one_out: bool = False,
    ) -> Float[Tensor, "M K D"]:
        """Return the codebooks of FAISS's residual quantizer of a sample, or those of `index.leave_one_out`."""
        if leave_one_out:
            size = {"num_codebooks": num_codebooks, "codebook_bits": codebook_bits}
            return fit_sums(sample.float()[:, None], **size, beam=beam, seed=seed)
        x = np.ascontiguousarray(sample.numpy(), dtype=np.float32)
        return torch.from_numpy(self._sums(x, num_codebooks, codebook_bits, beam, seed))

    def coarse_additive_codebooks(
        self,
        sample: Float[Tensor, "n D"],
        *,
        num_lists: int,
        num_codebooks: int,
        codebook_bits: int,
        beam: int,
        seed: int,
        leave_one_out: bool = False,
        list_beam: int = 1,
    ) -> tuple[Float[Tensor, "J D"], Float[Tensor, "M K D"]]:
        """Return k-means centroids, and the codebooks of FAISS's residual quantizer of the residuals.

        In the order of FAISS's `IVF{J},RQ{M}x{bits}`; with `leave_one_out` both of `index.leave_one_out`, the
        codebooks for the residuals to the `list_beam` nearest centroids.
        """
        x = np.ascontiguousarray(sample.numpy(), dtype=np.float32)
        centroids = self._lists(x, num_lists, seed)
        if leave_one_out:
            size = {"num_codebooks": num_codebooks, "codebook_bits": codebook_bits}
            lists, left = fit_step(sample.float()[:, None], torch.from_numpy(centroids), list_beam)
            return lists, fit_sums(left, **size, beam=beam, seed=seed)
        codebooks = self._sums(_residuals(x, centroids), num_codebooks, codebook_bits, beam, seed)
        return torch.from_numpy(centroids), torch.from_numpy(codebooks)

    def _lists(self, x: NDArray[np.float32], num_lists: int, seed: int) -> NDArray[np.float32]:
        """Return k-means centroids, (J, D)."""
        kmeans = load_faiss().Kmeans(
            x.shape[1], num_lists, niter=self.kmeans_iterations, seed=seed, min_points_per_centroid=1
        )
        kmeans.train(x)
        centroids: NDArray[np.float32] = kmeans.centroids
        return centroids

    def _sums(
        self, x: NDArray[np.float32], num_codebooks: int, codebook_bits: int, beam: int, seed: int
    ) -> NDArray[np.float32]:
        """Return the codewords of a residual quantizer, (M, K, D)."""
        faiss = load_faiss()
        rq = faiss.ResidualQuantizer(x.shape[1], num_codebooks, codebook_bits)
        _quieten(rq, seed)
        rq.max_beam_size = beam
        # the tables of (M K)^2 products that training would end with serve only FAISS's own encoder
        rq.train_type |= faiss.ResidualQuantizer.Skip_codebook_tables
        rq.train(np.ascontiguousarray(x))
        codewords: NDArray[np.float32] = faiss.vector_to_array(rq.codebooks)
        return codewords.reshape(num_codebooks, 2**codebook_bits, -1)

    def _rotation(
        self, x: NDArray[np.float32], num_codebooks: int, codebook_bits: int, seed: int
    ) -> NDArray[np.float32]:
        """Return OPQ's matrix, (D, D)."""
        faiss = load_faiss()
        dim = x.shape[1]
        opq = faiss.OPQMatrix(dim, num_codebooks)
        opq.niter = self.opq_iterations
        inner = faiss.ProductQuantizer(dim, num_codebooks, codebook_bits)
        _quieten(inner, seed)
        opq.pq = inner
        opq.train(
            np.tile(x, (-(-dim // len(x)), 1))
        )  # FAISS writes where it must not if they are fewer than D
        opq.pq = None  # `inner` stays ours to free
        matrix: NDArray[np.float32] = faiss.vector_to_array(opq.A).reshape(dim, dim)
        return matrix

    def _codebooks(
        self, x: NDArray[np.float32], num_codebooks: int, codebook_bits: int, seed: int
    ) -> NDArray[np.float32]:
        """Return PQ's codewords, (M, K, S)."""
        faiss = load_faiss()
        pq = faiss.ProductQuantizer(x.shape[1], num_codebooks, codebook_bits)
        _quieten(pq, seed)
        pq.cp.niter = self.kmeans_iterations
        pq.train(np.ascontiguousarray(x))
        codewords: NDArray[np.float32] = faiss.vector_to_array(pq.centroids)
        return codewords.reshape(num_codebooks, 2**codebook_bits, -1)


def _residuals(x: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what the nearest centroids leave, (n, D)."""
    _, nearest = load_faiss().knn(x, centroids, 1)
    rest: NDArray[np.float32] = x - centroids[nearest[:, 0]]
    return rest


def _quieten(quantizer: object, seed: int) -> None:
    """Set the seed of a faiss.ProductQuantizer or ResidualQuantizer and silence its warning on small samples."""
    quantizer.cp.seed = seed  # type: ignore[attr-defined]
    quantizer.cp.min_points_per_centroid = 1  # type: ignore[attr-defined]


def code_centroids(
    centroids: Float[Tensor, "J D"],
    weights: Float[Tensor, " J"],
    *,
    steps: int,
    codewords: int,
    seed: int = 0,
) -> Int[Tensor, "J C"]:
    """Return codes of centroids: k-means of them, then of what each step leaves, with weights (QINCo2).

    FAISS's residual quantizer takes no weights, and at least as many vectors as dimensions.
    """
    faiss = load_faiss()
    rest = np.ascontiguousarray(centroids.numpy(), dtype=np.float32)
    found = []
    for step in range(steps):
        kmeans = faiss.Kmeans(rest.shape[1], codewords, niter=50, seed=seed + step, min_points_per_centroid=1)
        kmeans.train(rest, weights=np.ascontiguousarray(weights.numpy(), dtype=np.float32))
        found.append(kmeans.index.search(rest, 1)[1][:, 0])
        rest = rest - kmeans.centroids[found[-1]]
    return torch.from_numpy(np.stack(found, 1))

"""What a head hands to an index: arrays, and no FAISS object.

Shapes: D dimensions, E dimensions after compression (D unless the head maps), M codes a vector, K = 2**bits values a
code, S = E // M sub-dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from retriever.scores import Metric

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "AdditiveCodebooks",
    "CoarseAdditiveCodebooks",
    "CoarseFlatVectors",
    "CoarseProductCodebooks",
    "FaissExport",
    "FlatVectors",
    "NeuralCodec",
    "ProductCodebooks",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaissExport:
    """Base of the exports. Arrays from which an index is built; no FAISS object. `metric` is the score contract."""

    metric: Metric = "inner_product"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatVectors(FaissExport):
    """Uncompressed float32 vectors of `dim` dimensions."""

    dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CoarseFlatVectors(FlatVectors):
    """Uncompressed float32 vectors in inverted lists.

    Attributes:
        centroids: One of each inverted list, (J, D) float32.
    """

    centroids: Float[Tensor, "J D"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductCodebooks(FaissExport):
    """Product quantizer behind an optional rotation.

    Attributes:
        codebooks: Codewords, (M, K, S) float32.
        rotation: Matrix A of y = A x (as `nn.Linear.weight` and `faiss.LinearTransform.A`), (D, D) float32, or None.
        orthonormal: Whether the rotation is; one that is not carries inner products only.
    """

    codebooks: Float[Tensor, "M K S"]
    rotation: Float[Tensor, "D D"] | None = None
    orthonormal: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CoarseProductCodebooks(ProductCodebooks):
    """Product quantizer of the residuals to coarse centroids, all behind the rotation.

    Attributes:
        centroids: One of each inverted list, (J, D) float32.
    """

    centroids: Float[Tensor, "J D"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdditiveCodebooks(FaissExport):
    """Additive (for example residual) quantizer behind an optional rotation: a vector is the sum of its codewords.

    Attributes:
        codebooks: Codewords in the order of the codes, (M, K, D) float32.
        rotation: Matrix A of y = A x, (D, D) float32, or None.
        orthonormal: Whether the rotation is; one that is not carries inner products only.
    """

    codebooks: Float[Tensor, "M K D"]
    rotation: Float[Tensor, "D D"] | None = None
    orthonormal: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CoarseAdditiveCodebooks(AdditiveCodebooks):
    """Additive quantizer of the residuals to coarse centroids, all behind the rotation.

    Attributes:
        centroids: One of each inverted list, (J, D) float32.
    """

    centroids: Float[Tensor, "J D"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuralCodec(FaissExport):
    """Codes that a network decodes (QINCo, UNQ): FAISS has no form for them and holds them behind a linear decoder.

    That one only makes a short list; the scores that count are those of the head's `decode`. A head leaves the linear
    decoders out: `index.decoders` computes them in closed form, from codes of the corpus and what the head decodes
    them to.

    Attributes:
        dim: Dimension D.
        num_codes: M, without the list number.
        code_bits: log2 K.
        centroids: One of each inverted list, whose number stands before the codes, (J, D) float32, in the space of
            the decoded vectors; None where there are no lists.
        additive: Codebooks whose sums, plus the centroid where there are lists, come nearest to the decoded vectors,
            (M, K, D) float32.
        list_codes: Codes of each list's centroid, which pairs count behind a document's own, (J, C).
        pairs: Pairs of codes that have a table, (P, 2).
        tables: What each pair of values adds to that sum, (P, K K, D) float16.
    """

    dim: int
    num_codes: int
    code_bits: int
    centroids: Float[Tensor, "J D"] | None = None
    additive: Float[Tensor, "M K D"] | None = None
    list_codes: Int[Tensor, "J C"] | None = None
    pairs: Int[Tensor, "P 2"] | None = None
    tables: Float[Tensor, "P KK D"] | None = None

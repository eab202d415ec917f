"""What an index builder is: arrays in, FAISS object out; no training, no re-assignment.

Shapes: n documents, D dimensions, M codes a document; codes are packed bytes, (n, code_size).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from index._faiss import load_faiss
from retriever.errors import InputError
from retriever.heads import (
    AdditiveCodebooks,
    CoarseAdditiveCodebooks,
    CoarseFlatVectors,
    CoarseProductCodebooks,
    CompressionHead,
    FaissExport,
    FlatVectors,
    NeuralCodec,
    ProductCodebooks,
)
from retriever.heads.base import list_number_size

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "FaissIndex",
    "IndexBuilder",
    "check_codes",
    "check_export",
    "code_bits",
    "code_bytes",
    "faiss_metric",
    "inverted_file",
    "num_lists",
    "probing_all",
    "product_shape",
    "search_index",
    "set_codebooks",
    "set_vector",
    "split_lists",
    "vector_dim",
    "with_rotation",
]

FaissIndex = Any
"""A `faiss.Index`; FAISS's wrapper classes carry no types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexBuilder(ABC):
    """One index family and its options.

    Attributes:
        kind: Name in `BUILDERS`.
        carries: Types of export that the family can hold.
        remedy: What to do with an export that it cannot hold.
        gpu: Whether FAISS has this family on a GPU.
    """

    kind: ClassVar[str]
    carries: ClassVar[tuple[type[FaissExport], ...]]
    remedy: ClassVar[str]
    gpu: ClassVar[bool] = False

    @property
    def approximation(self) -> str:
        """What a search approximates, in one sentence; empty if scores and order are the model's."""
        return ""

    @property
    def exact(self) -> bool:
        """Whether a search of all lists returns the model's scores, within float32's rounding, in their order."""
        return not self.approximation

    @property
    def exact_scores(self) -> bool:
        """Whether the scores that are returned are the model's, though a better document may be missed."""
        return self.exact

    @property
    def least_overlap(self) -> float:
        """Smallest overlap@20 with the model's own results, searched exhaustively, with which it may be published."""
        return 1.0

    @property
    def improvement(self) -> str:
        """What a user can do for a larger overlap, in one sentence; empty for an exact form."""
        return ""

    def check(self, export: FaissExport) -> None:
        """Raise InputError if this family cannot carry the export, or the export is faulty."""
        if type(export) not in self.carries:
            raise InputError(
                f"an index of kind {self.kind!r} cannot carry {type(export).__name__}. {self.remedy}"
            )
        check_export(export)
        self._check(export)

    def prepare(self, head: CompressionHead, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissExport:
        """Return what is built: the head's export, and what a family adds to it from head and codes."""
        return head.export()

    def extra_bytes(self, export: FaissExport, documents: int) -> int:
        """Return the bytes of what `prepare` adds, for a corpus of so many documents."""
        return 0

    def build(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return a FAISS index that holds the exported codebooks and the codes as they are, behind the rotation.

        Raises:
            InputError: If the family cannot carry the export, or codes and export do not fit together.
        """
        self.check(export)
        check_codes(export, codes)
        built = self._fill(export, codes)
        assert built.metric_type == self._metric(export), "the constructor must not change the metric"
        assert built.ntotal == len(codes), f"{built.ntotal} of {len(codes)} documents were taken"
        return with_rotation(built, export)

    def _metric(self, export: FaissExport) -> int:
        """Return FAISS's number of the metric that the filled index has."""
        return faiss_metric(export)

    def _check(self, export: FaissExport) -> None:  # noqa: B027
        """Raise InputError for what this family alone cannot carry."""

    @abstractmethod
    def _fill(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return the filled index, without a rotation, of an export and codes that are checked."""


def check_export(export: FaissExport) -> None:
    """Raise InputError if the arrays of an export are of no use: FAISS itself checks no shape.

    Each codebook needs a power of two of codewords, 2 to 65536; centroids and rotation need the dimension of the
    codebooks.
    """
    if isinstance(export, NeuralCodec | CoarseFlatVectors) and export.centroids is not None:
        _check_shape("centroids", export.centroids, (len(export.centroids), export.dim))
    if not isinstance(export, ProductCodebooks | AdditiveCodebooks):
        return
    codewords = export.codebooks.shape[1]
    if codewords & (codewords - 1) or not 2 <= codewords <= 65536:
        raise InputError(
            f"FAISS needs 2**nbits codewords a codebook, nbits 1 to 16, got {codewords}. "
            "Export the head's codebooks whole."
        )
    dim = vector_dim(export)
    if isinstance(export, CoarseProductCodebooks | CoarseAdditiveCodebooks):
        _check_shape("centroids", export.centroids, (len(export.centroids), dim))
    if export.rotation is not None:
        _check_shape("rotation", export.rotation, (dim, dim))
        if export.metric == "l2" and not export.orthonormal:
            raise InputError(
                "a rotation that is not orthonormal changes squared distances, got metric 'l2'. "
                "Train with metric inner_product, or with the rotation opq."
            )


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, int]) -> None:
    if tuple(tensor.shape) != expected or not len(tensor):
        raise InputError(
            f"{name} must have shape {expected}, got {tuple(tensor.shape)}. Export them with their codebooks."
        )


def check_codes(export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> None:
    """Raise InputError unless codes are rows of bytes as wide as the export's, with list numbers that exist."""
    lists = num_lists(export)
    expected = code_bytes(export) + (list_number_size(lists) if lists else 0)
    if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] != expected:
        raise InputError(
            f"codes must be uint8 of shape (n, {expected}) for these codebooks, got {codes.dtype} of shape "
            f"{codes.shape}. Encode the corpus with the head that is exported."
        )
    if lists and len(codes):
        largest = int(split_lists(export, codes)[0].max())
        if largest >= lists:
            raise InputError(
                f"list numbers must be below {lists}, the lists of the head, got {largest}. "
                "Encode the corpus with the head that is exported."
            )


def vector_dim(export: FaissExport) -> int:
    """Return dimension D of the vectors of an export."""
    if isinstance(export, ProductCodebooks):
        return export.codebooks.shape[0] * export.codebooks.shape[2]
    if isinstance(export, AdditiveCodebooks):
        return export.codebooks.shape[2]
    assert isinstance(export, FlatVectors | NeuralCodec), (
        f"an export of an unknown type {type(export).__name__}"
    )
    return export.dim


def code_bits(export: ProductCodebooks | AdditiveCodebooks) -> int:
    """Return nbits: bits of a code, log2 of the codewords of a codebook."""
    return export.codebooks.shape[1].bit_length() - 1


def code_bytes(export: FaissExport) -> int:
    """Return the bytes of a document's code, without its list number."""
    if isinstance(export, ProductCodebooks | AdditiveCodebooks):
        return (export.codebooks.shape[0] * code_bits(export) + 7) // 8
    if isinstance(export, NeuralCodec):
        return (export.num_codes * export.code_bits + 7) // 8
    return 4 * vector_dim(export)


def num_lists(export: FaissExport) -> int:
    """Return J, or 0 where there are no lists."""
    if isinstance(export, CoarseFlatVectors | CoarseProductCodebooks | CoarseAdditiveCodebooks):
        return len(export.centroids)
    if isinstance(export, NeuralCodec) and export.centroids is not None:
        return len(export.centroids)
    return 0


def split_lists(
    export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]
) -> tuple[Int[NDArray[np.int64], " n"], UInt8[NDArray[np.uint8], "n rest"]]:
    """Return list numbers (little-endian in the first bytes of a row) and the codes behind them."""
    size = list_number_size(num_lists(export))
    numbers = np.zeros((len(codes), 8), dtype=np.uint8)
    numbers[:, :size] = codes[:, :size]
    return numbers.view("<i8")[:, 0], codes[:, size:]


def faiss_metric(export: FaissExport) -> int:
    """Return the number by which FAISS knows the export's metric."""
    faiss = load_faiss()
    return int(faiss.METRIC_INNER_PRODUCT if export.metric == "inner_product" else faiss.METRIC_L2)


def search_index(
    built: FaissIndex, queries: Float[NDArray[np.float32], "B D"], k: int, parameters: Any = None
) -> tuple[Float[NDArray[np.float32], "B k"], Int[NDArray[np.int64], "B k"]]:
    """Return scores as `retriever.scores` defines them, falling, and rows; FAISS returns squared distances for L2.

    Where the probed lists hold fewer than k documents, the rest are rows -1 with scores -inf. `parameters` are
    `faiss.SearchParameters` of the index's type.
    """
    values, rows = built.search(np.ascontiguousarray(queries, dtype=np.float32), k, params=parameters)
    scores = 1 - values / 2 if built.metric_type == load_faiss().METRIC_L2 else values
    return np.where(rows < 0, np.float32("-inf"), scores), rows


def inverted_file(built: FaissIndex) -> FaissIndex | None:
    """Return the `faiss.IndexIVF` inside an index, or None where there are no lists."""
    return load_faiss().try_extract_index_ivf(built)


@contextmanager
def probing_all(built: FaissIndex) -> Iterator[None]:
    """Probe every list of an index, if it has lists, and restore its `nprobe`."""
    lists = inverted_file(built)
    before = lists.nprobe if lists else 0
    try:
        if lists:
            lists.nprobe = lists.nlist
        yield
    finally:
        if lists:
            lists.nprobe = before


def set_vector(vector: Any, values: NDArray[np.generic], expected: int) -> None:
    """Copy an array into a C++ vector of FAISS, which itself checks no length."""
    flat = np.ascontiguousarray(values, dtype=np.float32).ravel()
    assert flat.size == expected, f"FAISS would read out of bounds: {flat.size} values for {expected}"
    load_faiss().copy_array_to_vector(flat, vector)


def product_shape(export: ProductCodebooks) -> tuple[int, int, int]:
    """Return dimension D, codebooks M and bits, as FAISS's product quantizers are constructed."""
    return vector_dim(export), len(export.codebooks), code_bits(export)


def set_codebooks(built: FaissIndex, export: ProductCodebooks) -> None:
    """Copy the codewords into an index that has a `pq`."""
    set_vector(built.pq.centroids, export.codebooks.numpy(), export.codebooks.numel())
    built.is_trained = True


def with_rotation(inner: FaissIndex, export: FaissExport) -> FaissIndex:
    """Wrap a filled index so that queries are multiplied by the rotation first; return it as it is without one.

    `inner` must hold its codes already: IndexPreTransform copies `ntotal` and cannot add codes itself.
    """
    if not isinstance(export, ProductCodebooks | AdditiveCodebooks) or export.rotation is None:
        return inner
    faiss = load_faiss()
    dim = inner.d
    matrix = faiss.OPQMatrix(dim, 1, dim) if export.orthonormal else faiss.LinearTransform(dim, dim)
    set_vector(matrix.A, export.rotation.numpy(), dim * dim)
    matrix.is_trained = True
    matrix.set_is_orthonormal()
    outer = faiss.IndexPreTransform(matrix, inner)
    outer.is_trained = True
    assert outer.ntotal == inner.ntotal, "the codes were added before wrapping"
    return outer

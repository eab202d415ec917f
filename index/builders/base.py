"""What an index builder is: arrays in, FAISS object out; no training, no re-assignment.

Shapes: n documents, D dimensions, M codes a document; codes are packed bytes, (n, code_size).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from index._faiss import load_faiss
from retriever.errors import InputError
from retriever.heads import FaissExport, ProductCodebooks

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = [
    "FaissIndex",
    "IndexBuilder",
    "inverted_file",
    "probing_all",
    "product_shape",
    "search_index",
    "set_codebooks",
    "set_vector",
    "with_rotation",
]

FaissIndex = Any
"""A `faiss.Index`; FAISS's wrapper classes carry no types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexBuilder(ABC):
    """One index family and its options."""

    @abstractmethod
    def check(self, export: FaissExport) -> None:
        """Raise InputError if this family cannot carry the export."""

    @abstractmethod
    def build(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return a FAISS index that holds the exported codebooks and the codes as they are."""


def refuse(family: str, export: FaissExport, remedy: str) -> InputError:
    """Return the error for an export that a family cannot carry."""
    return InputError(f"an index of kind {family!r} cannot carry {type(export).__name__}. {remedy}")


def search_index(
    built: FaissIndex, queries: Float[NDArray[np.float32], "B D"], k: int
) -> tuple[Float[NDArray[np.float32], "B k"], Int[NDArray[np.int64], "B k"]]:
    """Return scores as `retriever.scores` defines them, falling, and rows; FAISS returns squared distances for L2.

    Where the probed lists hold fewer than k documents, the rest are rows -1 with scores -inf.
    """
    values, rows = built.search(np.ascontiguousarray(queries, dtype=np.float32), k)
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
    """Return dimension D, codebooks M and bits of a product quantizer that FAISS can hold."""
    books, codewords, width = export.codebooks.shape
    assert codewords & (codewords - 1) == 0, f"FAISS needs 2**nbits codewords, got {codewords}"
    return books * width, books, codewords.bit_length() - 1


def set_codebooks(built: FaissIndex, export: ProductCodebooks) -> None:
    """Copy the codewords into an index that has a `pq`."""
    set_vector(built.pq.centroids, export.codebooks.numpy(), export.codebooks.numel())
    built.is_trained = True


def with_rotation(inner: FaissIndex, export: ProductCodebooks) -> FaissIndex:
    """Wrap a filled index so that queries are multiplied by the rotation first; return it as it is without one.

    `inner` must hold its codes already: IndexPreTransform copies `ntotal` and cannot add codes itself.
    """
    if export.rotation is None:
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

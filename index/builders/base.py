"""What an index builder is: arrays in, FAISS object out; no training, no re-assignment.

Shapes: n documents, D dimensions, M codes a document; codes are packed bytes, (n, code_size).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from index._faiss import load_faiss
from retriever.errors import InputError
from retriever.heads import FaissExport

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = ["FaissIndex", "IndexBuilder", "search_index", "set_vector", "with_rotation"]

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
    """Return scores as `retriever.scores` defines them, falling, and rows; FAISS returns squared distances for L2."""
    values, rows = built.search(np.ascontiguousarray(queries, dtype=np.float32), k)
    return (1 - values / 2 if built.metric_type == load_faiss().METRIC_L2 else values), rows


def set_vector(vector: Any, values: NDArray[np.generic], expected: int) -> None:
    """Copy an array into a C++ vector of FAISS, which itself checks no length."""
    flat = np.ascontiguousarray(values, dtype=np.float32).ravel()
    assert flat.size == expected, f"FAISS would read out of bounds: {flat.size} values for {expected}"
    load_faiss().copy_array_to_vector(flat, vector)


def with_rotation(inner: FaissIndex, rotation: NDArray[np.float32] | None) -> FaissIndex:
    """Wrap a filled index so that queries are rotated by y = A x first; return it as it is without a rotation.

    `inner` must hold its codes already: IndexPreTransform copies `ntotal` and cannot add codes itself.
    """
    if rotation is None:
        return inner
    faiss = load_faiss()
    dim = inner.d
    matrix = faiss.OPQMatrix(dim, 1, dim)
    set_vector(matrix.A, rotation, dim * dim)
    matrix.is_trained = True
    matrix.set_is_orthonormal()
    outer = faiss.IndexPreTransform(matrix, inner)
    outer.is_trained = True
    assert outer.ntotal == inner.ntotal, "the codes were added before wrapping"
    return outer

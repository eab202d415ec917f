"""Vectors with a number of few bits a dimension: what `sq8`, `sq4` and the graph over them share.

Shapes: n documents, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.additive import ROWS
from index.builders.base import FaissIndex, IndexBuilder, faiss_metric, set_vector, vector_dim
from retriever.heads import FaissExport, FlatVectors

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from numpy.typing import NDArray

__all__ = ["ScalarBuilder", "set_ranges", "vectors_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarBuilder(IndexBuilder):
    """Base of `sq8` and `sq4`: exhaustive search over numbers of few bits, each in its dimension's range.

    The ranges are measured: smallest and largest value of the very vectors that are stored. Nothing is trained.
    """

    carries: ClassVar[tuple[type[FaissExport], ...]] = (FlatVectors,)
    remedy: ClassVar[str] = "Choose --index.kind auto, or train with the head `none`."
    bits: ClassVar[int]

    @property
    def improvement(self) -> str:
        """More bits."""
        return "Choose --index.kind flat, or sq8 instead of sq4."

    def _fill(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        faiss = load_faiss()
        types = {8: faiss.ScalarQuantizer.QT_8bit, 4: faiss.ScalarQuantizer.QT_4bit}
        built = faiss.IndexScalarQuantizer(vector_dim(export), types[self.bits], faiss_metric(export))
        set_ranges(built, codes)
        for vectors in vectors_of(codes):
            built.add(vectors)
        return built


def vectors_of(codes: UInt8[NDArray[np.uint8], "n size"]) -> Iterator[Float[NDArray[np.float32], "rows D"]]:
    """Yield the float32 vectors whose bytes the codes are, some rows at a time."""
    for start in range(0, len(codes), ROWS):
        yield np.ascontiguousarray(codes[start : start + ROWS]).view("<f4")


def set_ranges(built: FaissIndex, codes: UInt8[NDArray[np.uint8], "n size"]) -> None:
    """Set smallest value and width of each dimension, as measured from the vectors, in an index with an `sq`."""
    low = np.full(built.d, np.inf, dtype=np.float32)
    high = -low
    for vectors in vectors_of(codes):
        low, high = np.minimum(low, vectors.min(0)), np.maximum(high, vectors.max(0))
    width = np.maximum(high - low, 0)
    set_vector(built.sq.trained, np.concatenate([low, width]), 2 * built.d)
    built.is_trained = True

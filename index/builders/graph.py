"""HNSW graphs over uncompressed vectors (arXiv:1603.09320): what `hnsw` and `hnsw_sq8` share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index.builders.base import FaissIndex, IndexBuilder
from index.builders.scalar import vectors_of
from retriever.errors import InputError
from retriever.heads import FaissExport, FlatVectors

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["GraphBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphBuilder(IndexBuilder):
    """Base of the graphs.

    FAISS adds the vectors one by one, so building takes minutes a million; with several threads the graph, and so
    what a search misses, differs from run to run.

    Attributes:
        hnsw_m: Links of a document in each layer, twice as many in the lowest.
        ef_construction: Candidates kept while a document is added; more give a better graph, slower.
        ef_search: Candidates kept by a search; more find more, slower. At least k are kept.
    """

    carries: ClassVar[tuple[type[FaissExport], ...]] = (FlatVectors,)
    remedy: ClassVar[str] = "Choose --index.kind auto, or train with the head `none`."

    hnsw_m: int = 32
    ef_construction: int = 200
    ef_search: int = 128

    def __post_init__(self) -> None:
        if self.hnsw_m < 2:
            raise InputError(f"hnsw_m must be at least 2, got {self.hnsw_m}.")
        for name, value in {"ef_construction": self.ef_construction, "ef_search": self.ef_search}.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")

    @property
    def improvement(self) -> str:
        """More candidates."""
        return f"Raise --index.ef_search, now {self.ef_search}, or choose --index.kind flat."

    def _fill(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        built = self._empty(export, codes)
        built.hnsw.efConstruction = self.ef_construction
        built.hnsw.efSearch = self.ef_search
        for vectors in vectors_of(codes):
            built.add(vectors)
        return built

    @abstractmethod
    def _empty(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return the index without documents, ready to take those of `codes`."""

"""`faiss.IndexHNSWSQ`: a graph over vectors of 8 bits a dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex, faiss_metric, vector_dim
from index.builders.graph import GraphBuilder
from index.builders.scalar import set_ranges
from retriever.heads import FaissExport

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["HNSWSQ8Builder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HNSWSQ8Builder(GraphBuilder):
    """Search through a graph of 8-bit vectors, D + 8 hnsw_m bytes and some more a document, on the CPU."""

    kind: ClassVar[str] = "hnsw_sq8"

    @property
    def approximation(self) -> str:
        """A graph, and rounded documents."""
        return (
            "A search follows a graph and sees only a part of the documents, rounded to 8 bits a dimension."
        )

    @property
    def least_overlap(self) -> float:
        """Well below what docs/forms.md measures on real and on random vectors."""
        return 0.8

    def _empty(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        faiss = load_faiss()
        built = faiss.IndexHNSWSQ(
            vector_dim(export), faiss.ScalarQuantizer.QT_8bit, self.hnsw_m, faiss_metric(export)
        )
        set_ranges(faiss.downcast_index(built.storage), codes)
        built.is_trained = True
        return built

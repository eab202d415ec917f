"""`faiss.IndexHNSWFlat`: a graph over uncompressed vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex, faiss_metric, vector_dim
from index.builders.graph import GraphBuilder
from retriever.heads import FaissExport

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["HNSWBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HNSWBuilder(GraphBuilder):
    """Search through a graph of float32 vectors, 4 D + 8 hnsw_m bytes and some more a document, on the CPU."""

    kind: ClassVar[str] = "hnsw"

    @property
    def approximation(self) -> str:
        """A graph."""
        return "A search follows a graph and sees only a part of the documents."

    @property
    def exact_scores(self) -> bool:
        """Those of the documents it sees are the model's."""
        return True

    @property
    def least_overlap(self) -> float:
        """Well below what docs/forms.md measures on real and on random vectors."""
        return 0.8

    def _empty(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        return load_faiss().IndexHNSWFlat(vector_dim(export), self.hnsw_m, faiss_metric(export))

"""`faiss.IndexFlatIP` (or `IndexFlatL2`) from uncompressed vectors: the dense model's index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex, IndexBuilder, vector_dim
from retriever.heads import FaissExport, FlatVectors

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["FlatBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatBuilder(IndexBuilder):
    """Exact search over float32 vectors; 4 D bytes a document."""

    kind: ClassVar[str] = "flat"
    carries: ClassVar[tuple[type[FaissExport], ...]] = (FlatVectors,)
    remedy: ClassVar[str] = "Choose --index.kind auto."
    gpu: ClassVar[bool] = True

    def _fill(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return the filled index; the codes are the float32 bytes."""
        faiss = load_faiss()
        built = (faiss.IndexFlatIP if export.metric == "inner_product" else faiss.IndexFlatL2)(
            vector_dim(export)
        )
        built.add_sa_codes(np.ascontiguousarray(codes))
        return built

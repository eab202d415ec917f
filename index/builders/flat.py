"""`faiss.IndexFlatIP` (or `IndexFlatL2`) from uncompressed vectors: the dense model's index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex, IndexBuilder, refuse
from retriever.heads import FaissExport, FlatVectors

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["FlatBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatBuilder(IndexBuilder):
    """Exact search over float32 vectors; 4 D bytes a document."""

    def check(self, export: FaissExport) -> None:
        """Raise InputError unless the head is `none`."""
        if not isinstance(export, FlatVectors):
            raise refuse("flat", export, "Choose --index.kind auto.")

    def build(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return the filled index; the codes are the float32 bytes."""
        self.check(export)
        assert isinstance(export, FlatVectors), "checked above"
        faiss = load_faiss()
        built = (faiss.IndexFlatIP if export.metric == "inner_product" else faiss.IndexFlatL2)(export.dim)
        built.add_sa_codes(np.ascontiguousarray(codes))
        return built

"""`faiss.IndexPQ`, behind a rotation if the head has one, from codebooks and codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex, IndexBuilder, faiss_metric, product_shape, set_codebooks
from retriever.heads import FaissExport, ProductCodebooks

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["PQBuilder", "fill_pq"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PQBuilder(IndexBuilder):
    """Exhaustive search over product-quantized codes, M nbits / 8 bytes a document, on the CPU."""

    kind: ClassVar[str] = "pq"
    carries: ClassVar[tuple[type[FaissExport], ...]] = (ProductCodebooks,)
    remedy: ClassVar[str] = "Choose --index.kind auto, or train with the head `pq`."

    def _fill(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        assert isinstance(export, ProductCodebooks), "checked above"
        return fill_pq(export, codes)


def fill_pq(export: ProductCodebooks, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
    """Return `IndexPQ` of codes without list numbers."""
    built = load_faiss().IndexPQ(*product_shape(export), faiss_metric(export))
    set_codebooks(built, export)
    built.add_sa_codes(np.ascontiguousarray(codes))
    return built

"""`faiss.IndexPQ`, behind a rotation if the head has one, from codebooks and codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from index._faiss import load_faiss
from index.builders.base import (
    FaissIndex,
    IndexBuilder,
    product_shape,
    refuse,
    set_codebooks,
    with_rotation,
)
from retriever.heads import CoarseProductCodebooks, FaissExport, ProductCodebooks

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["PQBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PQBuilder(IndexBuilder):
    """Exhaustive search over product-quantized codes, M nbits / 8 bytes a document, on the CPU."""

    def check(self, export: FaissExport) -> None:
        """Raise InputError unless the head is a product quantizer without lists."""
        if not isinstance(export, ProductCodebooks) or isinstance(export, CoarseProductCodebooks):
            raise refuse("pq", export, "Choose --index.kind auto, or train with the head `pq`.")

    def build(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return `IndexPQ`, or `IndexPreTransform(OPQMatrix, IndexPQ)` when there is a rotation."""
        self.check(export)
        assert isinstance(export, ProductCodebooks), "checked above"
        faiss = load_faiss()
        metric = faiss.METRIC_INNER_PRODUCT if export.metric == "inner_product" else faiss.METRIC_L2
        built = faiss.IndexPQ(*product_shape(export), metric)
        set_codebooks(built, export)
        built.add_sa_codes(np.ascontiguousarray(codes))
        return with_rotation(built, export)

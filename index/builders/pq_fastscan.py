"""`faiss.IndexPQFastScan`: a scan of 4-bit product-quantized codes in processor registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex
from index.builders.fastscan import FastScanBuilder
from index.builders.pq import fill_pq
from retriever.heads import FaissExport, ProductCodebooks

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["PQFastScanBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PQFastScanBuilder(FastScanBuilder):
    """Exhaustive search over 4-bit codes, M / 2 bytes a document, on the CPU."""

    kind: ClassVar[str] = "pq_fastscan"
    carries: ClassVar[tuple[type[FaissExport], ...]] = (ProductCodebooks,)
    remedy: ClassVar[str] = (
        "Choose --index.kind auto, train with the head `pq`, or choose ivfpq_fastscan for a head with lists."
    )

    def _scan(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        assert isinstance(export, ProductCodebooks), "checked above"
        return load_faiss().IndexPQFastScan(fill_pq(export, codes))

    def _second_stage(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        assert isinstance(export, ProductCodebooks), "checked above"
        return fill_pq(export, codes)

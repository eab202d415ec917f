"""`faiss.IndexResidualQuantizerFastScan`: a scan of 4-bit additive codes in processor registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.additive import search_type, set_additive_codebooks
from index.builders.base import FaissIndex, code_bits, faiss_metric, vector_dim
from index.builders.fastscan import FastScanBuilder, pack_blocks, refuse_l2
from index.builders.rq import fill_rq
from retriever.heads import AdditiveCodebooks, FaissExport

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["RQFastScanBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RQFastScanBuilder(FastScanBuilder):
    """Exhaustive search by inner product over 4-bit additive codes, M / 2 bytes a document, on the CPU."""

    kind: ClassVar[str] = "rq_fastscan"
    carries: ClassVar[tuple[type[FaissExport], ...]] = (AdditiveCodebooks,)
    remedy: ClassVar[str] = "Choose --index.kind auto."

    def _check(self, export: FaissExport) -> None:
        """Raise InputError unless the codebooks have 16 codewords and the metric is the inner product."""
        FastScanBuilder._check(self, export)
        refuse_l2(self.kind, export)

    def _scan(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return the index, to which FAISS has no conversion: it takes the blocks of a product quantizer's."""
        assert isinstance(export, AdditiveCodebooks), "checked above"
        books = len(export.codebooks)
        built = load_faiss().IndexResidualQuantizerFastScan(
            vector_dim(export), books, code_bits(export), faiss_metric(export), search_type(export)
        )
        set_additive_codebooks(built, export.codebooks.numpy())
        blocks = pack_blocks(codes, books)
        assert (blocks.M2, blocks.bbs) == (built.M2, built.bbs), "blocks of one layout"
        built.codes = blocks.codes
        built.ntotal, built.ntotal2 = blocks.ntotal, blocks.ntotal2
        return built

    def _second_stage(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        assert isinstance(export, AdditiveCodebooks), "checked above"
        return fill_rq(export, codes)

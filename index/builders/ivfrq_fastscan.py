"""`faiss.IndexIVFResidualQuantizerFastScan`: learned inverted lists of 4-bit additive codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.additive import decoded_lists, empty_lists
from index.builders.base import FaissIndex
from index.builders.fastscan import FastScanBuilder, pack_list_blocks, refuse_l2
from index.builders.lists import check_nprobe
from retriever.heads import CoarseAdditiveCodebooks, FaissExport

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["IVFRQFastScanBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IVFRQFastScanBuilder(FastScanBuilder):
    """Search by inner product over 4-bit additive codes in inverted lists, M / 2 + 8 bytes a document, on the CPU.

    Attributes:
        nprobe: Lists that a search probes unless it says otherwise; by default those that hold 20,000
            documents, at least the square root of all.
    """

    kind: ClassVar[str] = "ivfrq_fastscan"
    carries: ClassVar[tuple[type[FaissExport], ...]] = (CoarseAdditiveCodebooks,)
    remedy: ClassVar[str] = "Choose --index.kind auto."

    nprobe: int | None = None

    def __post_init__(self) -> None:
        FastScanBuilder.__post_init__(self)
        check_nprobe(self.nprobe)

    def _check(self, export: FaissExport) -> None:
        """Raise InputError unless the codebooks have 16 codewords and the metric is the inner product."""
        FastScanBuilder._check(self, export)
        refuse_l2(self.kind, export)

    def _scan(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return the index, to which FAISS has no conversion: it takes the lists of a product quantizer's."""
        assert isinstance(export, CoarseAdditiveCodebooks), "checked above"
        built = empty_lists(load_faiss().IndexIVFResidualQuantizerFastScan, export, self.nprobe, len(codes))
        blocks = pack_list_blocks(codes, len(export.codebooks), built.nlist)
        assert (blocks.M2, blocks.bbs) == (built.M2, built.bbs), "blocks of one layout"
        blocks.own_invlists = False
        built.replace_invlists(blocks.invlists, True)
        built.ntotal = blocks.ntotal
        return built

    def _second_stage(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        assert isinstance(export, CoarseAdditiveCodebooks), "checked above"
        return decoded_lists(export, codes)

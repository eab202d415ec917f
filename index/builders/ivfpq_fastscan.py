"""`faiss.IndexIVFPQFastScan`: learned inverted lists of 4-bit codes, scanned in processor registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.additive import decoded_lists
from index.builders.base import FaissIndex
from index.builders.fastscan import FastScanBuilder
from index.builders.ivfpq import fill_ivfpq
from index.builders.lists import check_nprobe, default_nprobe, learned_centroids
from retriever.heads import CoarseProductCodebooks, FaissExport

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["IVFPQFastScanBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IVFPQFastScanBuilder(FastScanBuilder):
    """Search over 4-bit residual codes in inverted lists, M / 2 + 8 bytes a document, on the CPU.

    Attributes:
        nprobe: Lists that a search probes unless it says otherwise; by default those that hold 20,000
            documents, at least the square root of all.
    """

    kind: ClassVar[str] = "ivfpq_fastscan"
    carries: ClassVar[tuple[type[FaissExport], ...]] = (CoarseProductCodebooks,)
    remedy: ClassVar[str] = (
        "Choose --index.kind auto, train with the head `ivfpq`, or choose pq_fastscan for a head without lists."
    )

    nprobe: int | None = None

    def __post_init__(self) -> None:
        FastScanBuilder.__post_init__(self)
        check_nprobe(self.nprobe)

    def _scan(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        assert isinstance(export, CoarseProductCodebooks), "checked above"
        plain = fill_ivfpq(export, learned_centroids(export), codes)
        built = load_faiss().IndexIVFPQFastScan(plain)
        plain.own_fields = False  # both point to one quantizer
        built.own_fields = True
        if export.metric == "l2":
            built.precompute_table()  # FAISS copies the table but not the mark that there is one
        built.nprobe = default_nprobe(self.nprobe, built.nlist, len(codes))
        return built

    def _second_stage(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        assert isinstance(export, CoarseProductCodebooks), "checked above"
        return decoded_lists(export, codes)

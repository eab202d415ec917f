"""4-bit FastScan: what its four families share.

FastScan sums look-up tables of 8-bit numbers in processor registers: several times as fast as a scan of the same
codes with float32 tables, and its scores are off by some percent of their spread. A second stage (`refine`) scores
the best of them again, exactly, from the same codes.

Lists of a FastScan index hold blocks of 32 interleaved documents. FAISS's `add_sa_codes` and `add_entries` write
beyond their ends, so codes are added to a plain 4-bit index, which FAISS then converts.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex, IndexBuilder, code_bits
from retriever.errors import InputError
from retriever.heads import AdditiveCodebooks, FaissExport, ProductCodebooks

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["FastScanBuilder", "pack_blocks", "pack_list_blocks", "refuse_l2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FastScanBuilder(IndexBuilder):
    """Base of the FastScan families.

    Attributes:
        refine: Score the best documents of the scan again, exactly, from the codes; the codes are then stored twice.
        k_factor: With `refine`: documents scored again, as a multiple of the k that a search asks for.
    """

    refine: bool = False
    k_factor: float = 4.0

    def __post_init__(self) -> None:
        if not self.k_factor >= 1:
            raise InputError(f"k_factor must be at least 1, got {self.k_factor}.")

    @property
    def approximation(self) -> str:
        """Tables of 8-bit numbers."""
        if self.refine:
            return "The documents scored exactly are chosen by sums of 8-bit table entries."
        return "Scores are sums of 8-bit table entries."

    @property
    def exact_scores(self) -> bool:
        """Those of the second stage are exact."""
        return self.refine

    @property
    def least_overlap(self) -> float:
        """Well below what docs/forms.md measures on real and on random vectors."""
        return 0.95 if self.refine else 0.8

    @property
    def improvement(self) -> str:
        """A second stage, or a longer short list."""
        return (
            f"Raise --index.k_factor, now {self.k_factor:g}."
            if self.refine
            else f"Set --index.refine true, or choose --index.kind {self.kind.removesuffix('_fastscan')}."
        )

    def _check(self, export: FaissExport) -> None:
        """Raise InputError unless the codebooks have 16 codewords."""
        assert isinstance(export, ProductCodebooks | AdditiveCodebooks), "checked above"
        if code_bits(export) != 4:
            raise InputError(
                f"an index of kind {self.kind!r} needs codebooks of 4 bits, got {code_bits(export)}. "
                f"Train with codebook_bits: 4, or choose --index.kind {self.kind.removesuffix('_fastscan')}."
            )

    def _fill(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return the FastScan index, or it and its second stage."""
        scan = self._scan(export, codes)
        if not self.refine:
            return scan
        built = load_faiss().IndexRefine(scan, self._second_stage(export, codes))
        built.k_factor = self.k_factor
        return built

    @abstractmethod
    def _scan(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return the filled FastScan index."""

    @abstractmethod
    def _second_stage(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return a flat index that scores the same codes in the same order exactly."""


def refuse_l2(kind: str, export: FaissExport) -> None:
    """Raise InputError for squared distances between additive codes, which FastScan cannot score."""
    if export.metric == "l2":
        raise InputError(
            f"an index of kind {kind!r} cannot carry metric 'l2': FastScan sums additive codes without the query's "
            f"norm, and rounds the documents' norms to one byte. Choose --index.kind {kind.removesuffix('_fastscan')}, "
            "or train with metric inner_product."
        )


def pack_blocks(codes: UInt8[NDArray[np.uint8], "n size"], books: int) -> FaissIndex:
    """Return a product quantizer's FastScan index of 4-bit codes, made for its blocks: its codewords are nothing."""
    faiss = load_faiss()
    plain = faiss.IndexPQ(books, books, 4)  # one dimension a codebook
    plain.is_trained = True
    plain.add_sa_codes(np.ascontiguousarray(codes))
    return faiss.IndexPQFastScan(plain)


def pack_list_blocks(codes: UInt8[NDArray[np.uint8], "n size"], books: int, nlist: int) -> FaissIndex:
    """Return the same with inverted lists, of codes behind their list numbers."""
    faiss = load_faiss()
    quantizer = faiss.IndexFlatIP(books)
    quantizer.add(np.zeros((nlist, books), dtype=np.float32))
    plain = faiss.IndexIVFPQ(quantizer, books, nlist, books, 4, faiss.METRIC_INNER_PRODUCT)
    plain.is_trained = True
    plain.add_sa_codes(np.ascontiguousarray(codes))
    return faiss.IndexIVFPQFastScan(plain)

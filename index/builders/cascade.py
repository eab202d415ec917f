"""A neural codec: FAISS makes a short list, `index.stages` lets the network decode and score it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex, IndexBuilder, inverted_file, num_lists
from index.builders.lists import check_nprobe, default_nprobe
from index.builders.repeated import fill_lists, fill_scan
from index.decoders import default_pairs, fit_decoders
from retriever.errors import InputError
from retriever.heads import CompressionHead, FaissExport, NeuralCodec

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["CascadeBuilder"]

MOST_UNKNOWNS = 1 << 15  # M K of the least squares, whose matrix of float64 takes 8.6 GB then


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeBuilder(IndexBuilder):
    """Search by stages: FAISS makes a short list by a linear decoder, pair tables shorten it, the network scores it.

    Attributes:
        shortlist: Documents that a search takes from FAISS, at least the k it asks for.
        rerank: With pair tables: documents of the short list that the network decodes, at least k.
        pairs: Tables of two codes, K K D float16 each; None: 2 M where the corpus is large enough, 0: none.
        fit_rows: Documents by which the linear decoders are fitted.
        list_codes: First codes of a document that name its inverted list, for a head without lists: K to their power.
        hnsw_lists: Find the lists to probe by a graph over their centroids, instead of comparing with all.
        nprobe: Lists that a search probes unless it says otherwise; by default those that hold 20,000
            documents, at least the square root of all.
    """

    kind: ClassVar[str] = "cascade"
    carries: ClassVar[tuple[type[FaissExport], ...]] = (NeuralCodec,)
    remedy: ClassVar[str] = "Choose --index.kind auto."

    shortlist: int = 1000
    rerank: int = 200
    pairs: int | None = None
    fit_rows: int = 262_144
    list_codes: int = 0
    hnsw_lists: bool = False
    nprobe: int | None = None

    def __post_init__(self) -> None:
        check_nprobe(self.nprobe)
        for name, least in (
            ("shortlist", 1),
            ("rerank", 1),
            ("fit_rows", 1),
            ("list_codes", 0),
            ("pairs", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}.")

    @property
    def approximation(self) -> str:
        """What a search approximates."""
        return "A linear decoder chooses the documents that the network decodes and scores."

    @property
    def exact_scores(self) -> bool:
        """The scores are of the head's own decoding."""
        return True

    @property
    def least_overlap(self) -> float:
        """A short list of 1000 leaves out little."""
        return 0.9

    @property
    def improvement(self) -> str:
        """What widens the search."""
        return "Raise --index.shortlist (and --index.rerank where there are pairs)."

    def prepare(self, head: CompressionHead, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissExport:
        """Return the head's export with linear decoders, fitted in closed form to what it decodes the codes to."""
        return fit_decoders(head, codes, rows=self.fit_rows, pairs=self.pairs)

    def extra_bytes(self, export: FaissExport, documents: int) -> int:
        """Return the bytes of the linear decoders."""
        assert isinstance(export, NeuralCodec), "checked by the builder"
        pairs = default_pairs(export, documents) if self.pairs is None else self.pairs
        first = 4 * export.num_codes * (1 << export.code_bits)
        return export.dim * (first + 2 * pairs * (1 << 2 * export.code_bits))

    def _check(self, export: FaissExport) -> None:
        assert isinstance(export, NeuralCodec), "checked above"
        if self.list_codes and export.centroids is not None:
            raise InputError(
                f"the head has {len(export.centroids)} inverted lists of its own, got list_codes={self.list_codes}. "
                "Choose list_codes 0."
            )
        if self.list_codes >= export.num_codes or self.list_codes * export.code_bits > 24:
            raise InputError(
                f"list_codes must leave a code, and make at most 2**24 lists; got {self.list_codes} of "
                f"{export.num_codes} codes of {export.code_bits} bits. Choose fewer."
            )
        unknowns = export.num_codes << export.code_bits
        if unknowns > MOST_UNKNOWNS:
            raise InputError(
                f"the linear decoder of {export.num_codes} codes of {export.code_bits} bits has {unknowns} codewords, "
                f"and at most {MOST_UNKNOWNS} can be solved for. Train with fewer or smaller codes."
            )
        lists = num_lists(export) or self.list_codes
        if not lists and (self.nprobe is not None or self.hnsw_lists):
            raise InputError(
                "nprobe and hnsw_lists need inverted lists, and this head has none. Choose list_codes 1, or leave "
                "them out."
            )

    def _metric(self, export: FaissExport) -> int:
        """The short list of distances is made of inner products too."""
        return int(load_faiss().METRIC_INNER_PRODUCT)

    def _fill(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        assert isinstance(export, NeuralCodec), "checked above"
        if export.centroids is None and not self.list_codes:
            return fill_scan(export, codes)
        built = fill_lists(export, codes, list_codes=self.list_codes, graph=self.hnsw_lists)
        lists = inverted_file(built)
        assert lists is not None, "filled above"
        lists.nprobe = default_nprobe(self.nprobe, lists.nlist, len(codes))
        return built

"""Additive codes without norms, scanned with tables that are made once a query.

FAISS's residual quantizers without norms decode every document that a search scores. In memory the same codes can lie
behind copies of the query (`index.builders.repeated`), with half the squared length of the decoded vector in further
codes: then a document is a sum of table entries.

Shapes: n documents, B queries, D dimensions, k results.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from index._faiss import load_faiss
from index.builders import FaissIndex, inverted_file, search_index
from index.builders.base import code_bits, vector_dim
from index.builders.repeated import fill_lists, fill_scan
from index.filters import search_parameters
from retriever.dual_encoder import load_head
from retriever.heads import AdditiveCodebooks, CoarseAdditiveCodebooks, CompressionHead, NeuralCodec

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = ["TableScan"]

EXACT_BITS = 24  # as exact as float32


class TableScan:
    """A second index of the codes of one without norms, which it answers for.

    Args:
        export: Additive codebooks of the metric l2, without a rotation.
        codes: Packed codes of all documents, (n, code_size).
        nprobe: Inverted lists that a search probes unless it says otherwise.
    """

    def __init__(
        self, export: AdditiveCodebooks, codes: UInt8[NDArray[np.uint8], "n size"], nprobe: int = 1
    ) -> None:
        codec = NeuralCodec(
            metric=export.metric,
            dim=vector_dim(export),
            num_codes=len(export.codebooks),
            code_bits=code_bits(export),
            centroids=export.centroids if isinstance(export, CoarseAdditiveCodebooks) else None,
            additive=export.codebooks,
        )
        fill = fill_scan if codec.centroids is None else fill_lists
        self._built: FaissIndex = fill(codec, codes, length_bits=EXACT_BITS)
        self.probe(nprobe)

    @classmethod
    def of(cls, folder: Path, built: FaissIndex, head: CompressionHead | None, most: int) -> TableScan | None:
        """Return that of an index folder, or None where it has norms, other codes, or more documents than `most`.

        The folder's head is read if it is not given.
        """
        faiss, lists = load_faiss(), inverted_file(built)
        quantizer = getattr(faiss.downcast_index(lists or built), "rq", None)
        decoding = quantizer is not None and quantizer.search_type == faiss.AdditiveQuantizer.ST_decompress
        if not decoding or built.ntotal > most:
            return None
        head = head or load_head(folder / "head")
        export = head.export()
        if not isinstance(export, AdditiveCodebooks) or export.rotation is not None:
            return None
        codes = np.memmap(folder / "codes.u8", dtype=np.uint8, mode="r").reshape(-1, head.code_size)
        return cls(export, codes, lists.nprobe if lists else 1)

    def probe(self, nprobe: int) -> None:
        """Probe so many inverted lists from now on."""
        if lists := inverted_file(self._built):
            lists.nprobe = nprobe

    def search(
        self, queries: Float[NDArray[np.float32], "B D"], k: int, nprobe: int | None = None
    ) -> tuple[Float[NDArray[np.float32], "B k"], Int[NDArray[np.int64], "B k"]]:
        """Return scores (B, k), falling, and rows (B, k), as `search_index` does for the index itself."""
        parameters = None if nprobe is None else search_parameters(self._built, nprobe=nprobe)
        scores, rows = search_index(self._built, queries, k, parameters)
        length = np.square(queries, dtype=np.float64).sum(1, keepdims=True)
        return (scores + (1 - length / 2)).astype(np.float32), rows

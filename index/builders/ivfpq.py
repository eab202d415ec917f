"""`faiss.IndexIVFPQ` with zero centroids: the form of a flat product quantizer that FAISS has on a GPU.

FAISS clones no `IndexPQ` to a GPU. With every coarse centroid zero, residuals are the vectors themselves, so
`IndexIVFPQ` gives the scores of `IndexPQ` when all lists are probed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex, IndexBuilder, refuse, set_vector, with_rotation
from retriever.errors import InputError
from retriever.heads import FaissExport, ProductCodebooks

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["IVFPQBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IVFPQBuilder(IndexBuilder):
    """Exhaustive search over product-quantized codes in inverted lists.

    Attributes:
        nlist: Lists over which the codes are spread in turn; more lists occupy a GPU better. All are probed.
    """

    nlist: int = 1

    def __post_init__(self) -> None:
        if self.nlist < 1:
            raise InputError(f"nlist must be at least 1, got {self.nlist}.")

    def check(self, export: FaissExport) -> None:
        """Raise InputError unless the head is a product quantizer."""
        if not isinstance(export, ProductCodebooks):
            raise refuse("ivfpq", export, "Choose --index.kind auto, or train with the head `pq`.")

    def build(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return `IndexIVFPQ` (behind a rotation if there is one) with `nprobe` = `nlist`."""
        self.check(export)
        assert isinstance(export, ProductCodebooks), "checked above"
        faiss = load_faiss()
        books, codewords, width = export.codebooks.shape
        assert codewords & (codewords - 1) == 0, f"FAISS needs 2**nbits codewords, got {codewords}"
        inner_product = export.metric == "inner_product"
        dim, nbits = books * width, codewords.bit_length() - 1
        quantizer = (faiss.IndexFlatIP if inner_product else faiss.IndexFlatL2)(dim)
        quantizer.add(np.zeros((self.nlist, dim), dtype=np.float32))
        metric = faiss.METRIC_INNER_PRODUCT if inner_product else faiss.METRIC_L2
        built = faiss.IndexIVFPQ(quantizer, dim, self.nlist, books, nbits, metric)
        built.own_fields = True  # the index frees its quantizer, also after this function returns
        quantizer.this.disown()
        set_vector(built.pq.centroids, export.codebooks.numpy(), books * codewords * width)
        built.by_residual = True
        built.nprobe = self.nlist
        built.is_trained = True
        built.add_sa_codes(prefix_lists(np.arange(len(codes)) % self.nlist, codes, self.nlist))
        if not inner_product:
            built.precompute_table()
        assert built.metric_type == metric, (
            "FAISS pull request 4527: the constructor must not change the metric"
        )
        assert built.quantizer.ntotal == built.nlist, "FAISS does not check this itself"
        return with_rotation(built, None if export.rotation is None else export.rotation.numpy())


def prefix_lists(
    lists: NDArray[np.int64], codes: UInt8[NDArray[np.uint8], "n size"], nlist: int
) -> UInt8[NDArray[np.uint8], "n total"]:
    """Return rows as `IndexIVF.add_sa_codes` takes them: list number (little-endian, bytes of nlist - 1), code."""
    width = ((nlist - 1).bit_length() + 7) // 8
    prefix = lists.astype("<u8").view(np.uint8).reshape(len(codes), 8)[:, :width]
    return np.ascontiguousarray(np.hstack([prefix, codes]))

"""`faiss.IndexIVFPQ`: learned inverted lists, or a flat product quantizer in the form that FAISS has on a GPU.

FAISS clones no `IndexPQ` to a GPU. With every coarse centroid zero, residuals are the vectors themselves, so
`IndexIVFPQ` gives the scores of `IndexPQ` when all lists are probed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex, IndexBuilder, faiss_metric, product_shape, set_codebooks
from index.builders.lists import (
    check_nprobe,
    coarse_quantizer,
    default_nprobe,
    learned_centroids,
    take_quantizer,
)
from retriever.errors import InputError
from retriever.heads import CoarseProductCodebooks, FaissExport, ProductCodebooks, pack_list_numbers

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from numpy.typing import NDArray

__all__ = ["IVFPQBuilder", "fill_ivfpq"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IVFPQBuilder(IndexBuilder):
    """Search over product-quantized codes in inverted lists.

    Attributes:
        nlist: For a head without lists: lists over which the codes are spread in turn; more lists occupy a GPU
            better. All are probed.
        nprobe: For a head with lists: lists that a search probes unless it says otherwise; by default those
            that hold 20,000 documents, at least the square root of all.
        on_disk: Keep the inverted lists in a file beside the index; see `index.on_disk`.
    """

    kind: ClassVar[str] = "ivfpq"
    carries: ClassVar[tuple[type[FaissExport], ...]] = (ProductCodebooks, CoarseProductCodebooks)
    remedy: ClassVar[str] = "Choose --index.kind auto, or train with the head `pq` or `ivfpq`."
    gpu: ClassVar[bool] = True

    nlist: int = 1
    nprobe: int | None = None
    on_disk: bool = False

    def __post_init__(self) -> None:
        if self.nlist < 1:
            raise InputError(f"nlist must be at least 1, got {self.nlist}.")
        check_nprobe(self.nprobe)

    def _check(self, export: FaissExport) -> None:
        """Raise InputError unless the options fit a head with lists, or one without."""
        learned = isinstance(export, CoarseProductCodebooks)
        if learned and self.nlist != 1:
            raise InputError(f"the head has its own lists, so nlist cannot be set; got {self.nlist}.")
        if not learned and self.nprobe is not None:
            raise InputError(
                f"the head has no lists, so all are probed and nprobe cannot be set; got {self.nprobe}. "
                "Train with the head `ivfpq`."
            )

    def probes(self, export: FaissExport, documents: int) -> int:
        """Return the lists that a search of so many documents probes unless it says otherwise."""
        if isinstance(export, CoarseProductCodebooks):
            return default_nprobe(self.nprobe, len(export.centroids), documents)
        return self.nlist

    def _fill(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return `IndexIVFPQ`. Learned lists hold the codes as the head assigned them."""
        assert isinstance(export, ProductCodebooks), "checked above"
        if isinstance(export, CoarseProductCodebooks):
            built = fill_ivfpq(export, learned_centroids(export), codes)
        else:
            zeros = np.zeros((self.nlist, product_shape(export)[0]), dtype=np.float32)
            lists = pack_list_numbers(np.arange(len(codes)) % self.nlist, self.nlist)
            built = fill_ivfpq(export, zeros, np.hstack([lists, codes]))
        built.nprobe = self.probes(export, len(codes))
        return built


def fill_ivfpq(
    export: ProductCodebooks,
    centroids: Float[NDArray[np.float32], "J D"],
    codes: UInt8[NDArray[np.uint8], "n size"],
) -> FaissIndex:
    """Return `IndexIVFPQ` of residual codes, each row behind its list number, nothing assigned again."""
    dim, books, nbits = product_shape(export)
    quantizer = coarse_quantizer(centroids, export.metric)
    built = load_faiss().IndexIVFPQ(quantizer, dim, len(centroids), books, nbits, faiss_metric(export))
    take_quantizer(built, quantizer)
    set_codebooks(built, export)
    built.by_residual = True
    built.add_sa_codes(np.ascontiguousarray(codes))
    if export.metric == "l2":
        built.precompute_table()  # after the codebooks are set: FAISS does not notice a stale table
    return built

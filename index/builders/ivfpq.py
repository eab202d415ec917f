"""`faiss.IndexIVFPQ`: learned inverted lists, or a flat product quantizer in the form that FAISS has on a GPU.

FAISS clones no `IndexPQ` to a GPU. With every coarse centroid zero, residuals are the vectors themselves, so
`IndexIVFPQ` gives the scores of `IndexPQ` when all lists are probed.
"""

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
from retriever.errors import InputError
from retriever.heads import CoarseProductCodebooks, FaissExport, ProductCodebooks, pack_list_numbers

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["IVFPQBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IVFPQBuilder(IndexBuilder):
    """Search over product-quantized codes in inverted lists.

    Attributes:
        nlist: For a head without lists: lists over which the codes are spread in turn; more lists occupy a GPU
            better. All are probed.
        nprobe: For a head with lists: lists that a search probes unless it says otherwise; by default the square
            root of their number.
    """

    nlist: int = 1
    nprobe: int | None = None

    def __post_init__(self) -> None:
        if self.nlist < 1:
            raise InputError(f"nlist must be at least 1, got {self.nlist}.")
        if self.nprobe is not None and self.nprobe < 1:
            raise InputError(f"nprobe must be at least 1, got {self.nprobe}.")

    def check(self, export: FaissExport) -> None:
        """Raise InputError unless the head is a product quantizer, with lists or without, and the options fit it."""
        if not isinstance(export, ProductCodebooks):
            raise refuse("ivfpq", export, "Choose --index.kind auto, or train with the head `pq` or `ivfpq`.")
        learned = isinstance(export, CoarseProductCodebooks)
        if learned and self.nlist != 1:
            raise InputError(f"the head has its own lists, so nlist cannot be set; got {self.nlist}.")
        if not learned and self.nprobe is not None:
            raise InputError(
                f"the head has no lists, so all are probed and nprobe cannot be set; got {self.nprobe}. "
                "Train with the head `ivfpq`."
            )

    def build(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        """Return `IndexIVFPQ`, behind a rotation if there is one.

        Learned lists hold the codes as the head assigned them: nothing is assigned again.
        """
        self.check(export)
        assert isinstance(export, ProductCodebooks), "checked above"
        faiss = load_faiss()
        dim, books, nbits = product_shape(export)
        if isinstance(export, CoarseProductCodebooks):
            centroids = np.ascontiguousarray(export.centroids.numpy())
            nprobe = min(self.nprobe or round(len(centroids) ** 0.5), len(centroids))
        else:
            centroids = np.zeros((self.nlist, dim), dtype=np.float32)
            lists = pack_list_numbers(np.arange(len(codes)) % self.nlist, self.nlist)
            codes = np.hstack([lists, codes])
            nprobe = self.nlist
        inner_product = export.metric == "inner_product"
        # the coarse metric is the index's own: FastScan and the GPU add the coarse distance as it is returned
        quantizer = (faiss.IndexFlatIP if inner_product else faiss.IndexFlatL2)(dim)
        quantizer.add(centroids)
        metric = faiss.METRIC_INNER_PRODUCT if inner_product else faiss.METRIC_L2
        built = faiss.IndexIVFPQ(quantizer, dim, len(centroids), books, nbits, metric)
        built.own_fields = True  # the index frees its quantizer, also after this function returns
        quantizer.this.disown()
        set_codebooks(built, export)
        built.by_residual = True
        built.nprobe = nprobe
        built.add_sa_codes(np.ascontiguousarray(codes))
        if not inner_product:
            built.precompute_table()
        assert built.metric_type == metric, (
            "FAISS pull request 4527: the constructor must not change the metric"
        )
        assert built.quantizer.ntotal == built.nlist, "FAISS does not check this itself"
        return with_rotation(built, export)

"""`faiss.IndexIVFResidualQuantizer` from centroids, additive codebooks of the residuals, and codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.additive import AdditiveBuilder, Norms, empty_lists, with_norms
from index.builders.base import FaissIndex, split_lists
from index.builders.lists import check_nprobe
from retriever.heads import CoarseAdditiveCodebooks, FaissExport, pack_list_numbers

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["IVFRQBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IVFRQBuilder(AdditiveBuilder):
    """Search over additive codes in inverted lists, on the CPU.

    With norms or inner products FAISS computes a table of M K D products for every probed list; without norms, the
    default, it decodes what it scores.

    Attributes:
        nprobe: Lists that a search probes unless it says otherwise; by default the square root of their
            number, without norms at least those that hold 20,000 documents.
    """

    kind: ClassVar[str] = "ivfrq"
    carries: ClassVar[tuple[type[FaissExport], ...]] = (CoarseAdditiveCodebooks,)
    remedy: ClassVar[str] = "Choose --index.kind auto."
    usual_norms: ClassVar[Norms] = "none"

    nprobe: int | None = None

    def __post_init__(self) -> None:
        super(IVFRQBuilder, self).__post_init__()
        check_nprobe(self.nprobe)

    def _fill(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        assert isinstance(export, CoarseAdditiveCodebooks), "checked above"
        norms = self.norms or self.usual_norms
        tables = norms != "none" or export.metric == "inner_product"  # for every list: few should be probed
        documents = None if tables else len(codes)
        built = empty_lists(load_faiss().IndexIVFResidualQuantizer, export, self.nprobe, documents, norms)
        lists, residuals = split_lists(export, codes)
        prefix = pack_list_numbers(lists, built.nlist)
        built.add_sa_codes(np.hstack([prefix, with_norms(built, export, residuals)]))
        return built

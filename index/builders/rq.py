"""`faiss.IndexResidualQuantizer` from additive codebooks and codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.additive import (
    AdditiveBuilder,
    Norms,
    search_type,
    set_additive_codebooks,
    with_norms,
)
from index.builders.base import FaissIndex, code_bits, faiss_metric, vector_dim
from retriever.heads import AdditiveCodebooks, FaissExport

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["RQBuilder", "fill_rq"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RQBuilder(AdditiveBuilder):
    """Exhaustive search over additive codes, M nbits / 8 bytes a document and 4 or 1 more for L2, on the CPU."""

    kind: ClassVar[str] = "rq"
    carries: ClassVar[tuple[type[FaissExport], ...]] = (AdditiveCodebooks,)
    remedy: ClassVar[str] = "Choose --index.kind auto."

    def _fill(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        assert isinstance(export, AdditiveCodebooks), "checked above"
        return fill_rq(export, codes, self.norms or self.usual_norms)


def fill_rq(
    export: AdditiveCodebooks, codes: UInt8[NDArray[np.uint8], "n size"], norms: Norms = "float32"
) -> FaissIndex:
    """Return `IndexResidualQuantizer` of codes without list numbers."""
    built = load_faiss().IndexResidualQuantizer(
        vector_dim(export),
        len(export.codebooks),
        code_bits(export),
        faiss_metric(export),
        search_type(export, norms),
    )
    set_additive_codebooks(built, export.codebooks.numpy())
    built.add_sa_codes(with_norms(built, export, codes))
    return built

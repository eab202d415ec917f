"""`faiss.IndexIVFFlat` from learned centroids and uncompressed vectors, each in the list that the head gave it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex, IndexBuilder, faiss_metric, vector_dim
from index.builders.lists import (
    check_nprobe,
    coarse_quantizer,
    default_nprobe,
    learned_centroids,
    take_quantizer,
)
from retriever.heads import CoarseFlatVectors, FaissExport

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["IVFFlatBuilder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IVFFlatBuilder(IndexBuilder):
    """Search over float32 vectors in inverted lists, 4 D + 8 bytes a document.

    Attributes:
        nprobe: Lists that a search probes unless it says otherwise; by default those that hold 20,000
            documents, at least the square root of all.
    """

    kind: ClassVar[str] = "ivfflat"
    carries: ClassVar[tuple[type[FaissExport], ...]] = (CoarseFlatVectors,)
    remedy: ClassVar[str] = "Choose --index.kind auto, or train with the head `ivfflat`."
    gpu: ClassVar[bool] = True

    nprobe: int | None = None

    def __post_init__(self) -> None:
        check_nprobe(self.nprobe)

    def _fill(self, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"]) -> FaissIndex:
        centroids = learned_centroids(export)
        quantizer = coarse_quantizer(centroids, export.metric)
        built = load_faiss().IndexIVFFlat(quantizer, vector_dim(export), len(centroids), faiss_metric(export))
        take_quantizer(built, quantizer)
        built.is_trained = True
        built.add_sa_codes(np.ascontiguousarray(codes))
        built.nprobe = default_nprobe(self.nprobe, built.nlist, len(codes))
        return built

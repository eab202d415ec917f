"""Inverted lists from learned centroids: the coarse quantizer, and how many lists a search probes.

Shapes: J lists, D dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from index._faiss import load_faiss
from index.builders.base import FaissIndex
from retriever.errors import InputError
from retriever.heads import CoarseAdditiveCodebooks, CoarseFlatVectors, CoarseProductCodebooks, FaissExport

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray

PROBED = 20_000  # documents: milliseconds of a search, and small corpora lose nothing to their lists
MOST_BY_DEFAULT = 2048  # lists

__all__ = ["check_nprobe", "coarse_quantizer", "default_nprobe", "learned_centroids", "take_quantizer"]


def check_nprobe(nprobe: int | None) -> None:
    """Raise InputError if no list would be probed."""
    if nprobe is not None and nprobe < 1:
        raise InputError(f"nprobe must be at least 1, got {nprobe}.")


def default_nprobe(nprobe: int | None, num_lists: int, documents: int | None) -> int:
    """Return the lists to probe, at most all: what was asked for, or those in which `PROBED` documents lie on average.

    By default they are at least the square root of all lists, and no more than a GPU probes. Without the number of
    documents they are the square root: for forms in which a list costs more than the documents in it.
    """
    root = round(num_lists**0.5)
    enough = root if documents is None else -(-num_lists * PROBED // max(documents, 1))
    return min(nprobe or max(root, min(enough, MOST_BY_DEFAULT)), num_lists)


def learned_centroids(export: FaissExport) -> Float[NDArray[np.float32], "J D"]:
    """Return the centroids of an export with lists."""
    listed = CoarseFlatVectors | CoarseProductCodebooks | CoarseAdditiveCodebooks
    assert isinstance(export, listed), "checked by the builder"
    return np.ascontiguousarray(export.centroids.numpy(), dtype=np.float32)


def coarse_quantizer(centroids: Float[NDArray[np.float32], "J D"], metric: str) -> FaissIndex:
    """Return the index of centroids, with the metric of the whole index.

    FastScan, residual quantizers and the GPU add the coarse distance as it is returned: one of another metric gives
    wrong scores, and FAISS accepts it.
    """
    faiss = load_faiss()
    quantizer = (faiss.IndexFlatIP if metric == "inner_product" else faiss.IndexFlatL2)(centroids.shape[1])
    quantizer.add(centroids)
    return quantizer


def take_quantizer(built: FaissIndex, quantizer: FaissIndex) -> None:
    """Let an inverted file free its quantizer, also after the function that built both returned."""
    assert quantizer.ntotal == built.nlist, "FAISS does not check this itself"
    assert quantizer.metric_type == built.metric_type, "FAISS does not check this itself"
    built.own_fields = True
    quantizer.this.disown()

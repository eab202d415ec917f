"""Search parameters of a call, and search among chosen documents, for every form of index.

FAISS takes a selector of rows in flat, scalar-quantized, graph and most inverted indexes. Flat product and residual
quantizers, plain or FastScan, take none: there the chosen codes are decoded, and scored exactly.

Shapes: B queries, D dimensions, k results, n chosen rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from index._faiss import load_faiss
from index.builders import FaissIndex, inverted_file, search_index
from retriever.scores import Metric, score_matrix

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["score_decoded", "search_among", "search_parameters"]

PIECE = 65_536  # rows decoded at once


def search_parameters(built: FaissIndex, *, nprobe: int | None = None, selector: Any = None) -> Any:
    """Return `faiss.SearchParameters` for an index, nested as it is, or None if it takes no selector.

    Args:
        built: The index.
        nprobe: Inverted lists probed; by default the index's own.
        selector: A `faiss.IDSelector` of rows.
    """
    faiss = load_faiss()
    chosen = {} if selector is None else {"sel": selector}
    if isinstance(built, faiss.IndexPreTransform):
        inner = search_parameters(faiss.downcast_index(built.index), nprobe=nprobe, selector=selector)
        return inner and faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(built, faiss.IndexRefine):
        base = search_parameters(faiss.downcast_index(built.base_index), nprobe=nprobe, selector=selector)
        return base and faiss.IndexRefineSearchParameters(k_factor=built.k_factor, base_index_params=base)
    if hasattr(faiss, "GpuIndexIVF") and isinstance(built, faiss.GpuIndexIVF):
        return None if chosen else faiss.SearchParametersIVF(nprobe=nprobe or built.nprobe)
    if isinstance(built, faiss.IndexIVF):
        if isinstance(built, faiss.IndexIVFAdditiveQuantizerFastScan):
            return None
        if selector is not None and isinstance(built, faiss.IndexIVFAdditiveQuantizer):
            return None
        return faiss.SearchParametersIVF(nprobe=nprobe or built.nprobe, **chosen)
    if isinstance(built, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=built.hnsw.efSearch, **chosen)
    if isinstance(built, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        return faiss.SearchParameters(**chosen)
    return None


def search_among(
    built: FaissIndex,
    queries: Float[NDArray[np.float32], "B D"],
    k: int,
    rows: Int[NDArray[np.int64], " n"],
    *,
    nprobe: int | None = None,
) -> tuple[Float[NDArray[np.float32], "B k"], Int[NDArray[np.int64], "B k"]]:
    """Return scores (B, k), falling, and rows (B, k) of the best of the chosen rows, as `search_index` does."""
    faiss = load_faiss()
    if not len(rows):
        return np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
    selector = faiss.IDSelectorBatch(rows)
    parameters = search_parameters(built, nprobe=nprobe, selector=selector)
    if parameters is not None:
        return search_index(built, queries, k, parameters)
    lists = inverted_file(built)
    if lists is not None and lists.direct_map.no():
        lists.make_direct_map()  # lets FAISS find a row in the lists
    metric: Metric = "l2" if built.metric_type == faiss.METRIC_L2 else "inner_product"
    return score_decoded(
        lambda piece: torch.from_numpy(built.reconstruct_batch(piece)), queries, k, rows, metric=metric
    )


def score_decoded(
    decode: Callable[[Int[NDArray[np.int64], " p"]], Float[Tensor, "p D"]],
    queries: Float[NDArray[np.float32], "B D"],
    k: int,
    rows: Int[NDArray[np.int64], " n"],
    *,
    metric: Metric,
) -> tuple[Float[NDArray[np.float32], "B k"], Int[NDArray[np.int64], "B k"]]:
    """Return scores (B, k), falling, and rows (B, k) of the best of the rows, by the vectors that `decode` returns."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    best = np.full((len(queries), k), -1, np.int64)
    for start in range(0, len(rows), PIECE):
        piece = rows[start : start + PIECE]
        values = score_matrix(torch.tensor(queries), decode(piece), metric).numpy()
        values = np.hstack([scores, values])
        candidates = np.hstack([best, np.broadcast_to(piece, (len(queries), len(piece)))])
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(values, order, axis=1)
        best = np.take_along_axis(candidates, order, axis=1)
    return scores, best

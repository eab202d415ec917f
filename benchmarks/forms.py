"""How near each form of index comes to the model: overlap@20 and score differences of docs/forms.md, and search time.

Vectors are those of `indexing_time.py`: random mixtures of two vectors of real texts plus noise. Queries are mixtures
of their own. With --random both have no structure. FAISS trains the quantizers here, in the place
of a head; each form is then built by Endex from their codebooks and codes, and compared with the scores of the
decoded codes in float64. All lists are probed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import common
import numpy as np
import torch
from indexing_time import embed_real, mixtures
from torch.nn import functional as F
from tqdm.auto import tqdm

from index._faiss import load_faiss
from index.builders import BUILDERS, probing_all, search_index
from index.builders.additive import Norms
from index.builders.base import num_lists
from index.tables import TableScan
from retriever.heads import (
    AdditiveCodebooks,
    CoarseAdditiveCodebooks,
    CoarseProductCodebooks,
    FaissExport,
    FlatVectors,
    ProductCodebooks,
    pack_list_numbers,
)
from retriever.scores import Metric, score_matrix

TOP = 20
FASTSCAN = [("{}", {}), ("{}_fastscan", {}), ("{}_fastscan", {"refine": True})]
WITH_NORMS = [
    *FASTSCAN,
    *(("{}", {"norms": norms}) for norms in get_args(Norms)),
    ("{}", {"norms": "none", "tables": True}),  # as a Searcher scans them
]
FORMS = {
    "flat": [(kind, {}) for kind in ("flat", "sq8", "sq4", "hnsw", "hnsw_sq8")],
    **{
        family: [(kind.format(family), options) for kind, options in forms]
        for family, forms in (
            ("pq", FASTSCAN),
            ("ivfpq", FASTSCAN),
            ("rq", WITH_NORMS),
            ("ivfrq", WITH_NORMS),
        )
    },
}


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--vectors", type=int, default=50_000, help="vectors indexed")
    parser.add_argument("--queries", type=int, default=200, help="queries searched")
    parser.add_argument("--texts", type=int, default=2_000, help="real texts embedded")
    parser.add_argument(
        "--codebooks", type=int, default=64, help="M of 4 bits; additive codes have a quarter"
    )
    parser.add_argument("--lists", type=int, default=128, help="inverted lists")
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--random", type=int, help="take random unit vectors of so many dimensions instead")
    options = parser.parse_args()
    if options.quick:
        options.vectors, options.texts = 5_000, 300
    torch.manual_seed(options.seed)
    x = vectors(options)
    documents, queries = x[: options.vectors], x[options.vectors :]
    rows = []
    for metric in get_args(Metric):
        for family, export, codes, decoded in tqdm(exports(documents, metric, options), desc=metric, total=5):
            exact = score_matrix(
                torch.from_numpy(queries).double(), torch.from_numpy(decoded).double(), metric
            )
            for kind, choice in FORMS[family]:
                if metric == "l2" and kind in ("rq_fastscan", "ivfrq_fastscan"):
                    continue
                if metric == "inner_product" and "norms" in choice:
                    continue
                rows.append(compare(kind, choice, export, codes, queries, exact.numpy()))
    common.print_table(f"{len(documents):,} x {documents.shape[1]} vectors, {len(queries)} queries", rows)
    common.write_result(options.json, options, rows)


def vectors(options: Any) -> np.ndarray:
    """Return documents and then queries, unit vectors, float32."""
    count = options.vectors + options.queries
    if options.random:
        return F.normalize(torch.randn(count, options.random)).numpy()
    return mixtures(embed_real(options)[0], count, options.seed).numpy()


def exports(
    x: np.ndarray, metric: Metric, options: Any
) -> Iterator[tuple[str, FaissExport, np.ndarray, np.ndarray]]:
    """Yield family, export, codes (n, size) and decoded vectors (n, D) of quantizers that FAISS trains."""
    faiss = load_faiss()
    yield "flat", FlatVectors(dim=x.shape[1], metric=metric), x.view(np.uint8), x
    coarse = faiss.Kmeans(x.shape[1], options.lists, niter=10, seed=options.seed, max_points_per_centroid=256)
    coarse.cp.min_points_per_centroid = 1
    coarse.train(x)
    lists = coarse.index.search(x, 1)[1][:, 0]
    base, numbers = coarse.centroids[lists], pack_list_numbers(lists, options.lists)
    centroids = torch.from_numpy(coarse.centroids)
    for in_lists, part in ((False, x), (True, x - base)):
        for additive in (False, True):
            books, codes, decoded = quantize(part, additive, options)
            arrays = {"codebooks": torch.from_numpy(books), "metric": metric}
            if in_lists:
                kind = CoarseAdditiveCodebooks if additive else CoarseProductCodebooks
                export: FaissExport = kind(**arrays, centroids=centroids)
                codes, decoded = np.hstack([numbers, codes]), decoded + base
            else:
                export = (AdditiveCodebooks if additive else ProductCodebooks)(**arrays)
            yield ("ivf" if in_lists else "") + ("rq" if additive else "pq"), export, codes, decoded


def quantize(x: np.ndarray, additive: bool, options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return 4-bit codebooks, codes and decoded vectors."""
    faiss, dim = load_faiss(), x.shape[1]
    if additive:
        quantizer = faiss.ResidualQuantizer(dim, options.codebooks // 4, 4)
        quantizer.max_beam_size = 1  # as a head encodes: the nearest codeword of each step
        quantizer.train(x[:10_000])
        books = faiss.vector_to_array(quantizer.codebooks).reshape(-1, 16, dim)
    else:
        quantizer = faiss.ProductQuantizer(dim, options.codebooks, 4)
        quantizer.cp.seed = options.seed
        quantizer.train(x[:10_000])
        books = faiss.vector_to_array(quantizer.centroids).reshape(options.codebooks, 16, -1)
    codes = quantizer.compute_codes(x)
    return books, codes, quantizer.decode(codes)


def compare(
    kind: str,
    options: dict[str, Any],
    export: FaissExport,
    codes: np.ndarray,
    queries: np.ndarray,
    exact: np.ndarray,
) -> dict[str, Any]:
    """Return how near a form's results are to exact scores (q, n), and milliseconds of a query."""
    built = BUILDERS[kind](**{name: value for name, value in options.items() if name != "tables"}).build(
        export, codes
    )
    search = partial(search_index, built)
    if "tables" in options:
        assert isinstance(export, AdditiveCodebooks), "tables are of additive codes"
        search = TableScan(export, codes, num_lists(export)).search
    with probing_all(built):
        start = time.perf_counter()
        scores, rows = search(queries, TOP)
        seconds = common.seconds_since(start)
    found = np.take_along_axis(exact, rows, axis=1)
    best = -np.sort(-exact, axis=1)[:, TOP - 1 : TOP]
    overlap = found >= best - 1e-5
    return {
        "kind": " ".join(
            [kind, *(name if value is True else f"{name} {value}" for name, value in options.items())]
        ),
        "metric": export.metric,
        "overlap@20": float(overlap.mean()),
        "of the worst query": float(overlap.mean(1).min()),
        "largest difference": float(np.abs(scores - found).max()),
        "ms a query": 1000 * seconds / len(queries),
    }


if __name__ == "__main__":
    main()

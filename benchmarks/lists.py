"""Inverted lists of free centroids beside those of two codebooks (NO-IMI, GNO-IMI): how well they part vectors.

Lists are fitted to `learn`, as a head's warm start does it, and all vectors of `base` are put into them. MSE is the
mean squared distance of a vector of `base` to its centroid. R@1 at p % is the share of queries whose true nearest
neighbour is seen when the lists with the nearest centroids are opened until p % of `base` have been seen: the same
number of vectors for every kind of list. Free centroids need as many vectors to learn from as there are lists; sizes
with fewer are left out.

Seconds are the processor's, of one thread, so that other work on the machine does not count as much.
"""

from __future__ import annotations

import time
from typing import Any

import common
import torch
from torch import Tensor

from index import FaissFit
from index._faiss import load_faiss
from retriever.heads.cells import Cells, build_coarse
from retriever.vector_files import VectorFile
from retriever.vectors import nearest_rows

SHARES = (0.001, 0.01, 0.05)  # of `base`, seen by a query
STRUCTURES = ("free", "no_imi", "gno_imi")


def main() -> None:
    """Fit, fill and search every kind of list at every size."""
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--base", required=True, help="vector file that is searched")
    parser.add_argument("--learn", required=True, help="vector file from which lists are learned")
    parser.add_argument("--queries", required=True, help="vector file of queries")
    parser.add_argument(
        "--lists", type=int, nargs="+", default=[1024, 4096], help="numbers of lists, squares"
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[50_000], help="first rows of `learn` that are used"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_faiss().omp_set_num_threads(1)
    base = VectorFile(options.base)
    count = 10_000 if options.quick else len(base)
    x, learn, queries = (
        torch.from_numpy(VectorFile(path).vectors(0, rows)).float()
        for path, rows in ((options.base, count), (options.learn, max(options.rows)), (options.queries, 1000))
    )
    rows = torch.arange(count).numpy()
    nearest = torch.from_numpy(nearest_rows(queries.numpy(), base, rows, "l2", normalize=False))
    results: list[dict[str, Any]] = []
    for lists in [256] if options.quick else options.lists:
        for size in options.rows:
            for structure in STRUCTURES:
                if structure != "free" or size >= lists:
                    found = measure(structure, lists, learn[:size], x, queries, nearest, options.seed)
                    results.append(
                        {"lists": structure, "J": lists, "fitted on": min(size, len(learn)), **found}
                    )
    common.print_table(f"{count:,} vectors of {x.shape[1]} dimensions, {len(queries):,} queries", results)
    common.write_result(options.json, options, results)


@torch.no_grad()
def measure(
    structure: Any, lists: int, learn: Tensor, x: Tensor, queries: Tensor, nearest: Tensor, seed: int
) -> dict[str, Any]:
    """Return size, seconds, error and recall of one kind of list."""
    coarse = build_coarse(lists, x.shape[1], estimator="codeword", assignment="live", structure=structure)
    start = time.process_time()
    if isinstance(coarse, Cells):
        coarse.fit(learn, FaissFit(), seed)
    else:
        kmeans = load_faiss().Kmeans(x.shape[1], lists, niter=25, seed=seed, min_points_per_centroid=1)
        kmeans.train(learn.numpy())
        coarse.start(torch.from_numpy(kmeans.centroids)[None])
    fitted = time.process_time()
    places = torch.cat([coarse.encode(part[:, None]) for part in x.split(4096)])
    assigned = time.process_time()
    error = (x - coarse.select(places).squeeze(1)).square().sum(1).mean().item()
    sizes = torch.bincount(places[:, 0], minlength=lists)
    order = torch.cdist(queries.double(), coarse.codewords[0].double()).argsort(1)  # (B, J)
    seen = sizes[order].cumsum(1) - sizes[order]  # before each list is opened
    rank = (order == places[nearest]).int().argmax(1, keepdim=True)
    needed = seen.gather(1, rank).squeeze(1)
    return {
        "numbers": sum(p.numel() for p in coarse.parameters() if p.requires_grad),
        "fit (s)": fitted - start,
        "assign (s)": assigned - fitted,
        "empty lists": (sizes == 0).double().mean().item(),
        "MSE": error,
        **{f"R@1 at {100 * share:g} %": (needed < share * len(x)).double().mean().item() for share in SHARES},
    }


if __name__ == "__main__":
    main()

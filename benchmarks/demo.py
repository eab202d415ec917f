"""The whole path on real text: train, export, search, beside the usual way.

Systems, on the same held-out queries, of the same seed:

  dense, before training   the pretrained encoder, float32 vectors, IndexFlatIP
  dense, fine-tuned        the same after contrastive training (configs/dense.yaml, 80 steps of 32 pairs)
  fine-tuned + FAISS OPQ   the usual way: OPQ + PQ trained by FAISS on all of those vectors, then added; searched by
                           inner product, as the vectors were trained, and by L2
  Endex                    the default recipe (configs/default.yaml, 20 steps of 32 queries) from those towers,
                           its codes copied into FAISS

`index seconds` is what turns vectors or codes into a searchable index: FAISS train + add, or, for Endex, copying.
All quantizers may see all documents without labels (FAISS trains on them; Endex takes its warm start from them). What
holds for documents that nobody saw, and FAISS's residual codes, which take minutes to fit, are in docs/results.md.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from methods import innermost

from index import IndexConfig, Searcher, export_index
from index._faiss import load_faiss
from launch.pycode import build_pycode
from retriever import DualEncoder, RetrievalData, embed_documents, embed_queries, read_data
from retriever.folder import write_json
from retriever.heads import IVFResidualQuantizerConfig
from retriever.scores import Metric
from training import Experiment, Trainer, evaluate_index, load_experiment, measure

COLUMNS = ("ndcg@10", "mrr@10", "recall@100")
STEPS = {"dense": 80, "default": 20}  # of 32 pairs, by recipe


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument(
        "--data", type=Path, help="BEIR folder; by default pairs made from the installed packages"
    )
    parser.add_argument("--documents", type=int, default=8_000, help="documents of the pairs that are made")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run")
    parser.add_argument("--split", default="test", help="judged queries that are compared")
    options = parser.parse_args()
    started = time.perf_counter()
    if options.out.exists():
        if not (options.out / "demo").is_file() and any(options.out.iterdir()):
            raise SystemExit(f"{options.out} exists and was not made by this command. Choose another --out.")
        shutil.rmtree(options.out)
    options.out.mkdir(parents=True)
    (options.out / "demo").write_text("made by benchmarks/demo.py, which replaces this folder\n")
    source = options.data or make_pairs(options.out / "data", 2_000 if options.quick else options.documents)
    data = read_data(source, options.split)
    recipes = [
        recipe(name, source, options.out, 12 if options.quick else steps, options.seed)
        for name, steps in STEPS.items()
    ]
    rows = run_systems(*recipes, data, options.out)
    title = f"{len(data.qrels):,} held-out queries, {len(data.documents):,} documents, seed {options.seed}"
    common.print_table(title, [{name: value for name, value in row.items()} for row in rows])
    show_hits(Searcher(options.out / "index"), data)
    write_json(options.out / "results.json", rows)  # type: ignore[arg-type]
    common.write_result(options.json, options, rows, seconds=common.seconds_since(started), data=title)
    minutes = common.seconds_since(started) / 60
    print(f"\nall of it took {minutes:.1f} minutes; the table is in {options.out / 'results.json'}")


def make_pairs(folder: Path, documents: int) -> Path:
    """Build docstring -> code pairs from the installed packages."""
    print(f"making pairs from the installed Python packages: {build_pycode(folder, max_documents=documents)}")
    return folder


def recipe(name: str, source: Path, out: Path, steps: int, seed: int) -> Experiment:
    """Return a recipe of configs/, of so many steps of 32 pairs on this data."""
    experiment = load_experiment(Path(f"configs/{name}.yaml"))
    return replace(
        experiment,
        output=str(out / name),
        data=replace(experiment.data, source=str(source)),
        optimization=replace(experiment.optimization, steps=steps, batch_size=32),
        evaluation=replace(experiment.evaluation, queries=300, documents=2000),
        seed=seed,
    )


def run_systems(dense: Experiment, endex: Experiment, data: RetrievalData, out: Path) -> list[dict[str, Any]]:
    """Train and measure all systems."""
    precision = dense.optimization.precision
    print("1/4 dense, before training", flush=True)
    before = dense.model.build(dense.head)
    rows = [dense_row("dense, before training", *vectors(before, data, precision), data)]
    print("2/4 dense, fine-tuned", flush=True)
    start = Trainer(dense).fit().last
    x, q = vectors(DualEncoder.load(start), data, precision)
    rows.append(dense_row("dense, fine-tuned", x, q, data))
    head = innermost(endex.head)
    assert isinstance(head, IVFResidualQuantizerConfig), "the default recipe has residual codes in lists"
    print("3/4 the usual way: FAISS OPQ on those vectors", flush=True)
    rows += post_hoc_rows(x, q, data, head.num_codebooks)
    print("4/4 Endex: codes that learn to rank, then export", flush=True)
    endex = replace(endex, model=replace(endex.model, encoder=str(start / "encoder")))
    exported = export_index(
        Trainer(endex).fit().last,
        data.documents.values(),
        out / "index",
        config=IndexConfig(),
        precision=precision,
    )
    metrics, _ = evaluate_index(Searcher(out / "index"), data, precision=precision)
    rows.append(row("Endex", head.num_codebooks, metrics, exported.build_seconds))
    return rows


def vectors(model: DualEncoder, data: RetrievalData, precision: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors of all documents and of the judged queries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    documents = embed_documents(model, list(data.documents.values()), precision=precision)
    return documents, embed_queries(model, [data.queries[name] for name in data.qrels], precision=precision)


def dense_row(system: str, x: torch.Tensor, q: torch.Tensor, data: RetrievalData) -> dict[str, Any]:
    """Measure exact search."""
    start = time.perf_counter()
    flat = load_faiss().IndexFlatIP(x.shape[1])
    flat.add(x.numpy())
    seconds = common.seconds_since(start)
    return row(system, 4 * x.shape[1], search(flat, q, data), seconds)


def post_hoc_rows(x: torch.Tensor, q: torch.Tensor, data: RetrievalData, size: int) -> list[dict[str, Any]]:
    """Measure FAISS's own OPQ + PQ of the same bytes, trained on the vectors that are then indexed."""
    factory, rows = f"OPQ{size},PQ{size}", []
    built = common.faiss_quantizer(x.shape[1], factory, "l2", seed=1234)  # FAISS's own default seed
    start = time.perf_counter()
    built.train(x.numpy())
    built.add(x.numpy())
    seconds = common.seconds_since(start)
    metrics: dict[str, Metric] = {"": "inner_product", ", L2": "l2"}
    for suffix, metric in metrics.items():  # of the same codes
        common.set_metric(built, metric)
        rows.append(row(f"fine-tuned + FAISS {factory}{suffix}", size, search(built, q, data), seconds))
    return rows


def search(built: Any, q: torch.Tensor, data: RetrievalData) -> dict[str, float]:
    """Return the measures of a FAISS index."""
    ids = np.array(list(data.documents), dtype=object)
    scores, found = built.search(q.numpy(), min(100, built.ntotal))
    scores = -scores if built.metric_type == load_faiss().METRIC_L2 else scores
    results = {
        name: dict(zip(ids[hits], map(float, values), strict=True))
        for name, hits, values in zip(data.qrels, found, scores, strict=True)
    }
    return measure(data.qrels, results)


def row(system: str, size: int, metrics: dict[str, float], seconds: float) -> dict[str, Any]:
    """Return one line of the table."""
    return {
        "system": system,
        "bytes_per_document": size,
        **{name: round(metrics[name], 4) for name in COLUMNS},
        "index_seconds": round(seconds, 4),
    }


def show_hits(searcher: Searcher, data: RetrievalData, queries: int = 3, k: int = 3) -> None:
    """Print the first hits of some queries, the right ones marked."""
    names = sorted(data.qrels)[:queries]
    scores, found = searcher.search([data.queries[name] for name in names], k)
    for name, ids, values in zip(names, found, scores, strict=True):
        print(f"\n{data.queries[name]}")
        for document, score in zip(ids, values, strict=True):
            mark = "*" if data.qrels[name].get(document, 0) > 0 else " "
            text = " ".join(f"{data.documents[document].title}  {data.documents[document].text}".split())
            print(f"  {mark} {score:.3f}  {text[:100]}")


if __name__ == "__main__":
    main()

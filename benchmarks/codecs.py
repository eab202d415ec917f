"""Codecs on a set of vectors: error, recall, and what they cost, at equal bytes.

  codecs   FAISS's OPQ, RQ and LSQ, fitted on the training vectors, beside Endex's heads, trained on the same vectors by
           `Trainer` as `endex train` does. MSE is the mean squared distance of a vector of `base` to what its code
           stands for, in the units of the file; R@k the share of held-out queries whose true nearest neighbour is
           among the first k, all vectors of `base` decoded and compared by L2.
  search   CNT, a network to fewer dimensions trained on the same vectors (INRP), in front of PQ and of HNSW, beside
           both without it: recall, seconds to build, queries a second with the network on the query. k = 100. PQ has
           the rotation of OPQ, plain PQ none, as in CNT's paper; behind a network both are fitted afterwards.

No vector of `base` and no query is in any training. Seconds are those of the processor, of one thread, so that other
work on the machine does not count as much. `--options published` gives the neural heads the sizes of their papers,
which want a GPU, and what a card trains in minutes; the default is what one core can train in the time stated beside
each row.
Results are kept in --out, and a command that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import common
import numpy as np
import torch
from torch import Tensor

from index import FaissFit
from index._faiss import load_faiss
from index.builders import HNSWBuilder, PQBuilder, search_index
from retriever import DualEncoder, DualEncoderConfig
from retriever.folder import read_json, write_json
from retriever.heads import HEADS, FlatVectors
from retriever.vector_files import VectorFile
from retriever.vector_input import VectorInput
from retriever.vectors import named_files, read_vector_qrels
from training import Experiment, Trainer
from training.experiment import DataConfig, EvaluationConfig, OptimizationConfig, TrackingConfig
from training.losses import LOSSES

K = (1, 10, 100)
DEPTH = 100  # results that a timed search asks for
PIECE = 4096  # vectors encoded and decoded at once
FIT = FaissFit()  # starts of the heads
FAISS = {"FAISS OPQ": "OPQ{0},PQ{0}", "FAISS RQ": "RQ{0}x8", "FAISS LSQ": "LSQ{0}x8"}
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an Endex head is trained here, and as published.

    Attributes:
        head: Name in `HEADS`.
        options: Of its configuration, beside `num_codebooks`.
        published: Options that replace those with `--options published`.
        epochs: Passes over the training vectors: small, `--options published`.
        batch_size: Vectors a step, for the same two.
        head_lr: Peak learning rate.
        schedule: Fall of the learning rate.
        optimization: Further settings.
        multi_rate: Train the longest code only; a shorter one is its first codewords.
    """

    head: str
    options: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    epochs: tuple[float, float] = (10, 10)
    batch_size: tuple[int, int] = (1024, 1024)
    head_lr: float = 1e-3
    schedule: str = "cosine"
    optimization: Mapping[str, Any] = field(default_factory=dict)
    multi_rate: bool = False


RECIPES = {
    "pq": Recipe(head="pq", options={"distortion_weight": 1.0}, epochs=(6, 6), head_lr=3e-4),
    "rq": Recipe(head="rq", options={"distortion_weight": 1.0, "beam": 5}, epochs=(6, 6), head_lr=3e-4),
    "unq": Recipe(
        head="unq",
        options={"hidden": 512, "start_steps": 500},
        published={"hidden": 1024, "start_steps": 1000},
        epochs=(15, 300),
        batch_size=(512, 1024),
        optimization={"max_grad_norm": 10.0},
    ),
    "qinco": Recipe(
        head="qinco",
        options={"num_blocks": 1, "hidden": 64, "restart_window": 200.0},
        published={"num_blocks": 2, "hidden": 256},
        epochs=(4, 40),  # published: about 200, of 500,000 vectors
        batch_size=(256, 1024),
        head_lr=3e-3,
        optimization={"warmup": 0.02},
        multi_rate=True,
    ),
    "qinco2": Recipe(
        head="qinco2",
        options={"candidates": 4, "beam": 1, "eval_candidates": 16, "eval_beam": 8, "restart_window": 200.0},
        published={"candidates": 16, "beam": 32, "eval_candidates": 32, "eval_beam": 64},
        epochs=(6, 30),  # published: 60, of 10 million vectors
        batch_size=(256, 1024),
        head_lr=3e-3,  # published: 8e-4, with batches of 1,024
        schedule="quarter_cosine",
        optimization={"warmup": 0.05},
        multi_rate=True,
    ),
}
CNT = {"x2": {"expansion": 4, "tokens": 8}, "x4": {"expansion": 3, "tokens": 12}}
CNT_RECIPE = Recipe(
    head="cnt",
    epochs=(20, 400),  # published: 2,400
    batch_size=(512, 1024),
    schedule="linear",
    optimization={"warmup": 0.05},
)
FORMS = ("PQ", "plain PQ", "HNSW")
SEARCH = (*FORMS, *(f"CNT {name} + {form}" for name in CNT for form in FORMS))
SYSTEMS = (*FAISS, *RECIPES, *SEARCH)
MINUTES = {  # of one core at 50,000 training vectors, 100,000 of base and 8 bytes; twice at 16. FAISS, rq and HNSW are
    # measured, the others estimated from the time of a step
    "FAISS OPQ": 1.6,
    "FAISS RQ": 1.4,
    "FAISS LSQ": 8.2,  # four times at 16
    "pq": 1.0,
    "rq": 2.2,
    "unq": 4.0,
    "qinco": 10.0,
    "qinco2": 9.0,
    "HNSW": 1.0,
    "CNT x2 + PQ": 6.0,
    "CNT x4 + PQ": 4.0,
}


def _key(settings: object) -> str:
    return hashlib.blake2b(repr(settings).encode(), digest_size=3).hexdigest()


class Codec(Protocol):
    """Vectors of the file -> codes -> vectors of the space that is searched."""

    def encode(self, x: np.ndarray) -> Any:
        """Return codes."""
        ...

    def decode(self, codes: Any) -> np.ndarray:
        """Return what codes stand for."""
        ...


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of vector files; see docs/vectors.md"
    )
    parser.add_argument("--bytes", type=int, nargs="+", default=(8, 16), help="bytes of a code")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument(
        "--options", default="small", choices=("small", "published"), help="of the neural heads"
    )
    parser.add_argument("--budget", type=float, default=1.0, help="factor on the epochs of Endex's heads")
    parser.add_argument("--threads", type=int, default=1, help="of torch and FAISS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/codecs"), help="folder of the results")
    parser.add_argument("--cached", action="store_true", help="only show what is there; name what is missing")
    options = parser.parse_args()
    unknown = set(options.systems) - set(SYSTEMS)
    if unknown:
        parser.error(f"there is no system {', '.join(sorted(unknown))}. Choose of {', '.join(SYSTEMS)}.")
    if options.quick:
        options.bytes, options.budget, options.out = (8,), 0.0, options.out / "quick"
    torch.set_num_threads(options.threads)
    load_faiss().omp_set_num_threads(options.threads)
    study = Study(options)
    rows = study.rows()
    if rows:
        show(rows, study)
    common.write_result(options.json, options, rows, vectors=study.sizes, missing=study.missing)


class Study:
    """One vector set, and the results of all systems on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source: Path = options.data
        if options.quick:
            self.source = cut(options.data, options.out / "data")
        files = {name: VectorFile(path) for name, path in named_files(self.source).items()}
        self.base, self.learn, self.queries = (
            files[name].vectors(0, len(files[name])) for name in ("base", "learn", "query")
        )
        self.sizes = {name: [len(file), file.dim] for name, file in files.items()}
        qrels = read_vector_qrels(self.source)
        self.truth = np.array([int(next(iter(qrels[str(query)]))) for query in range(len(self.queries))])
        self.tower = VectorInput.standardizing(torch.from_numpy(self.learn))
        self.out: Path = options.out / f"{self.source.name}-{options.options}-{options.seed}"
        self.missing: list[str] = []  # cells that --cached leaves out

    def rows(self) -> list[Result]:
        """Return the rows of all systems and sizes; those that are not kept are made, and their time is told first."""
        cells = [
            (system, size, run)
            for size in self.options.bytes
            for system, run in self._systems(size)
            if not ("HNSW" in system and size != self.options.bytes[0])
        ]
        left = [cell for cell in cells if not self._path(*cell[:2]).is_file()]
        minutes = sum(self.minutes(system, size) for system, size, _ in left)
        print(
            f"{len(cells) - len(left)} of {len(cells)} cells are there; the others take about {minutes:.0f} minutes"
        )
        rows = []
        for system, size, run in cells:
            path = self._path(system, size)
            if (system, size, run) in left and self.options.cached:
                self.missing.append(f"{system}, {size} bytes")
                continue
            if (system, size, run) in left:
                print(f"{system}, {size} bytes, about {self.minutes(system, size):.1f} minutes", flush=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, run())
            row = {"system": system, "bytes": size, **read_json(path)}
            rows.append(row | {"bytes": 4 * row["dimensions"]} if "HNSW" in system else row)  # and its links
        return rows

    def minutes(self, system: str, size: int) -> float:
        """Return the expected minutes of a cell, from what one core took."""
        share = len(self.learn) / 50_000 if system in (*FAISS, *RECIPES) else len(self.base) / 100_000
        factor = self.options.budget if system in RECIPES or "CNT" in system else 1.0
        return MINUTES.get(system, 1.0) * size / 8 * share * max(0.05, factor)

    def _systems(self, size: int) -> list[tuple[str, Callable[[], Result]]]:
        """Return the chosen systems."""
        made: dict[str, Callable[[], Result]] = {
            name: lambda factory=factory: self._faiss(factory.format(size)) for name, factory in FAISS.items()
        }
        for name, recipe in RECIPES.items():
            made[name] = lambda recipe=recipe: self._head(recipe, size)
        for cnt in (None, *CNT):
            before = f"CNT {cnt} + " if cnt else ""
            made[f"{before}PQ"] = lambda cnt=cnt: self._pq(cnt, size)
            made[f"{before}plain PQ"] = lambda cnt=cnt: self._pq(cnt, size, rotation="none")
            made[f"{before}HNSW"] = lambda cnt=cnt: self._hnsw(cnt)
        return [(name, run) for name, run in made.items() if name in self.options.systems]

    def _path(self, system: str, size: int) -> Path:
        """Return where a cell is kept; one of other settings is another cell."""
        recipe = CNT_RECIPE if "CNT" in system else RECIPES.get(system.lower())
        longest = max(self.options.bytes) if recipe and recipe.multi_rate else None
        settings = (self._settings(recipe), longest) if recipe else None
        return self.out / f"{system.replace(' ', '_')}-{size}-{_key(settings)}.json"

    def _settings(self, recipe: Recipe) -> tuple[Any, ...]:
        """Return what a recipe's result depends on, beside the options of the run."""
        published = self.options.options == "published"
        chosen = (recipe.epochs[published] * self.options.budget, recipe.batch_size[published])
        given = {**recipe.options, **(recipe.published if published else {})}
        return (recipe.head, given, *chosen, recipe.head_lr, recipe.schedule, dict(recipe.optimization))

    def _faiss(self, factory: str) -> Result:
        """Fit one of FAISS's quantizers."""
        built = load_faiss().index_factory(self.base.shape[1], factory)
        start = time.process_time()
        built.train(self.learn)
        seconds = time.process_time() - start
        return {
            "vectors_seen": len(self.learn),
            "train_seconds": seconds,
            **self._measure(FaissCodec(built)),
        }

    def _head(self, recipe: Recipe, size: int) -> Result:
        """Train a head and measure its codes."""
        trained = max(self.options.bytes) if recipe.multi_rate else size
        model, about = self._train(recipe, {"num_codebooks": trained})
        if trained != size:
            model.head = model.head.truncated(size).eval()  # type: ignore[operator]
        return {**about, **self._measure(HeadCodec(model))}

    def _measure(self, codec: Codec) -> Result:
        """Return error, recall, and the times of encoding and decoding."""
        start = time.process_time()
        codes = codec.encode(self.base)
        encoded = time.process_time()
        decoded = codec.decode(codes)
        done = time.process_time()
        error = np.square(decoded.astype(np.float64) - self.base).sum(1).mean()
        return {
            "mse": error,
            **self._recall(self.queries, decoded),
            "encode_us": 1e6 * (encoded - start) / len(self.base),
            "decode_us": 1e6 * (done - encoded) / len(self.base),
        }

    def _recall(self, queries: np.ndarray, decoded: np.ndarray) -> Result:
        """Return R@k; of equally near vectors the one with the lower row is the nearer."""
        ranks = []
        x = torch.from_numpy(decoded)
        squares = x.square().sum(1)
        for q, truth in zip(
            torch.from_numpy(queries).split(100), torch.from_numpy(self.truth).split(100), strict=True
        ):
            distances = squares - 2 * q @ x.T
            own = distances.gather(1, truth[:, None])
            tied = (distances == own) & (torch.arange(len(x)) < truth[:, None])
            ranks.append(((distances < own) | tied).sum(1))
        found = torch.cat(ranks)
        return {f"r@{k}": (found < k).double().mean().item() for k in K}

    def _train(
        self, recipe: Recipe, options: Mapping[str, Any], loss: str = "reconstruction"
    ) -> tuple[DualEncoder, Result]:
        """Train a head as `endex train` does, or take what was trained; return the model and what it took."""
        settings = self._settings(recipe)
        name = f"{recipe.head}-{_key((settings, sorted(options.items())))}"
        given, epochs, batch_size = {**settings[1], **options}, *settings[2:4]
        experiment = self._experiment(recipe, HEADS[recipe.head](**given), name, loss, epochs, batch_size)
        folder = Path(experiment.output)
        if not (folder / "about.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            start = time.process_time()
            report = Trainer(experiment, fit=FIT, progress=False).fit()
            seen = report.steps * experiment.optimization.batch_size
            about = {"options": given, "epochs": experiment.optimization.epochs, "vectors_seen": seen}
            write_json(folder / "about.json", {**about, "train_seconds": time.process_time() - start})
        model = DualEncoder.load(folder / "last").to(self.options.device)
        parameters = sum(parameter.numel() for parameter in model.head.parameters())
        return model, {**read_json(folder / "about.json"), "parameters": parameters}

    def _experiment(
        self, recipe: Recipe, head: Any, name: str, loss: str, epochs: float, batch_size: int
    ) -> Experiment:
        options = self.options
        return Experiment(
            output=str(self.out / "runs" / name),
            model=DualEncoderConfig(encoder="vectors"),
            head=head,
            loss=LOSSES[loss](
                **({"weight": 0.0} if loss == "reconstruction" else {})
            ),  # heads have their own
            data=DataConfig(source=str(self.source)),
            optimization=OptimizationConfig(
                epochs=max(epochs, 1e-3),  # at least one step
                batch_size=min(batch_size, len(self.learn) // 2),
                head_lr=recipe.head_lr,
                schedule=recipe.schedule,  # type: ignore[arg-type]
                dense_warmup=0.0,
                bucket_batches=1,
                **recipe.optimization,
            ),
            evaluation=EvaluationConfig(queries=50, documents=500, metric="compressed/recall@1"),
            tracking=TrackingConfig(every=50),
            seed=options.seed,
        )

    def _pq(self, cnt: str | None, size: int, rotation: str = "opq") -> Result:
        """Return a PQ, searched by its tables: the head `pq`, or one fitted on what a network makes of the vectors."""
        network, about = self._network(cnt)
        if cnt is None and rotation == "opq":
            model, about = self._train(RECIPES["pq"], {"num_codebooks": size})
            head = model.head.cpu()
        else:
            y = torch.from_numpy(network(self.learn))
            head = HEADS["pq"](num_codebooks=size, rotation=rotation).build(y.shape[1])  # type: ignore[call-arg]
            start = time.process_time()
            head.warm_start(y, FIT, self.options.seed)
            about["fit_seconds"] = time.process_time() - start
        start = time.process_time()
        rows = torch.from_numpy(network(self.base)).split(PIECE)
        codes = np.concatenate([head.pack(head.encode(part)) for part in rows])
        built = PQBuilder().build(head.export(), codes)
        about["build_seconds"] = time.process_time() - start
        return {**about, "dimensions": head.dim, **self._search(built, network)}

    def _hnsw(self, cnt: str | None) -> Result:
        """Return a graph of what the network makes of the vectors, as float32."""
        network, about = self._network(cnt)
        start = time.process_time()
        base = network(self.base)
        built = HNSWBuilder().build(FlatVectors(dim=base.shape[1], metric="l2"), base.view(np.uint8))
        about["build_seconds"] = time.process_time() - start
        return {**about, "dimensions": base.shape[1], **self._search(built, network)}

    def _network(self, cnt: str | None) -> tuple[Callable[[np.ndarray], np.ndarray], Result]:
        """Return what maps vectors of the file before they are indexed: a trained CNT, or the identity."""
        if cnt is None:
            return self._standard, {}
        model, about = self._train(CNT_RECIPE, CNT[cnt], loss="inrp")

        def mapped(x: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                rows = [part.to(model.device) for part in torch.from_numpy(x).split(PIECE)]
                parts = [model.head.map_queries(model.encode_queries({"vectors": part})) for part in rows]
            found: np.ndarray = torch.cat(parts).cpu().numpy()
            return found

        return mapped, about

    def _search(self, built: Any, network: Callable[[np.ndarray], np.ndarray]) -> Result:
        """Return R@k of a search, and queries a second: the best of three rounds."""
        seconds = []
        for _ in range(3):
            start = time.process_time()
            _, rows = search_index(built, network(self.queries), DEPTH)
            seconds.append(time.process_time() - start)
        hit = rows == self.truth[:, None]
        return {
            **{f"r@{k}": float(hit[:, :k].any(1).mean()) for k in K},
            "queries_a_second": len(self.queries) / min(seconds),
        }

    def _standard(self, x: np.ndarray) -> np.ndarray:
        """Return vectors as Endex's tower has them: centred, and of mean squared length 1."""
        with torch.no_grad():
            found: np.ndarray = self.tower(torch.from_numpy(x)).numpy()
        return found


class FaissCodec:
    """A fitted index of FAISS, of vectors as they are in the file: LSQ's regularization is made for such lengths."""

    def __init__(self, built: Any) -> None:
        self.built = built

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Return packed codes."""
        codes: np.ndarray = self.built.sa_encode(x)
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return vectors in the units of the file."""
        x: np.ndarray = self.built.sa_decode(codes)
        return x


class HeadCodec:
    """A trained model on vectors."""

    def __init__(self, model: DualEncoder) -> None:
        self.model = model

    def encode(self, x: np.ndarray) -> Tensor:
        """Return codes."""
        model, device = self.model, self.model.device
        rows = torch.from_numpy(x).split(PIECE)
        return torch.cat(
            [model.compress(model.encode_documents({"vectors": part.to(device)})) for part in rows]
        )

    def decode(self, codes: Tensor) -> np.ndarray:
        """Return vectors in the units of the file."""
        with torch.no_grad():
            parts = [self.model.head.decode(part) for part in codes.split(PIECE)]
        return restore(torch.cat(parts), self.model.query_encoder.backbone)  # type: ignore[arg-type]


def restore(y: Tensor, tower: VectorInput) -> np.ndarray:
    """Return vectors in the units of the file."""
    found: np.ndarray = (y.cpu() * tower.scale.cpu() + tower.mean.cpu()).numpy()
    return found


def cut(source: Path, folder: Path) -> Path:
    """Write a small part of a vector set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"base": 600, "learn": 600, "query": 50}.items():
        file = VectorFile(named_files(source)[name])
        np.save(folder / f"{name}.npy", file.vectors(0, min(rows, len(file))))
    return folder


def show(rows: Sequence[Result], study: Study) -> None:
    """Print both tables."""
    about = ", ".join(f"{n:,} {name}" for name, (n, _) in study.sizes.items() if name != "groundtruth")
    columns = {
        "codecs": (
            "system",
            "bytes",
            "mse",
            *(f"r@{k}" for k in K),
            "vectors_seen",
            "train_seconds",
            "encode_us",
        ),
        "search": (
            "system",
            "bytes",
            "dimensions",
            *(f"r@{k}" for k in K),
            "build_seconds",
            "queries_a_second",
        ),
    }
    for title, names in columns.items():
        found = [row for row in rows if names[-1] in row]
        if found:
            table = [{name: row.get(name) for name in names} for row in found]
            common.print_table(f"{title}: {study.source.name}, {about}", table)


if __name__ == "__main__":
    main()

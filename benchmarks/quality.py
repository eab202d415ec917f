"""How much of a dense model's quality a few bytes keep: Endex's default recipe beside FAISS's quantizers, post hoc.

For each data folder and seed, from one encoder: a dense start is trained; from its weights the dense model trains on
(the control), and so does the recipe, with the same pairs and steps. FAISS's quantizers are fitted on the control's
vectors. A size is the true bytes of a code, of FAISS's additive quantizers with the norm (one byte).

  zero-shot            the encoder as it came
  FAISS PQ, OPQ, RQ, LSQ   searched by L2, which is better for compressed unit vectors than the inner product
  FAISS ITQ, RaBitQ    binary codes: a bit a component after ITQ's rotation; RaBitQ's of fewer components, beside its 8
                       bytes of factors (so not at 8 bytes)
  FAISS RQ, decoded    the same without norms: search decodes what it scores, which is exact, and slower
  ..., reduced, lists  of as many dimensions as the recipes keep (residual codes of 16 bytes: 128, of the recipe 192),
                       and in as many inverted lists
  ..., wide beam       the same fit, its codes chosen with as wide a beam as the recipe's (FAISS's is 5); also of all
                       dimensions
  endex                the recipe, exported to FAISS and searched there; others by the names of their files
  endex, closed corpus the recipe with the options for a corpus that is complete when it is trained: more components,
                       codewords fitted together to the documents, whatever others need (fitted only)
  Gaussian bound       what an ideal code of the size would do with the control's vectors, were they Gaussian with the
                       covariance that the reading may know: reverse water-filling and its test channel (Cover & Thomas,
                       2006, sections 10.3.3 and 13.3), searched by L2; a code beats it only by knowing more than that.
                       `lists` adds the bits of a list's number

Where fewer documents may be fitted on than the recipe has lists, recipes and FAISS's rows get fewer lists, a power of
two, with four documents each at least; a line says so.

With --no_queries there are no pairs either: the encoder as it came is start and control, and the recipe makes queries
of the documents (`data.labels` pseudo).

Two readings, never mixed:
  blind    documents judged in the evaluated split are in nobody's training or fitting; they are only indexed.
  fitted   everybody may see them without labels.

`file_bytes` is all that a search needs beside the query tower, a document: codes, ids, codebooks, centroids and what is
in front of them, as they are saved (FAISS saves all principal components, also those that are not kept).
`kept` is nDCG@10 as a share of the control's; for `endex, uncompressed` that of the towers as the recipe leaves them.
`gain` is the mean difference of nDCG@10 to the best of FAISS's rows of the same size, its 95 % interval over queries
and its two-sided p (paired, normal); `gain, without lists` that to the best of those that are a code alone. The
summary has means over seeds, and the sample deviation of them.
Results are kept in --out, and a command that was stopped goes on where it was. --systems chooses what is computed; of
the other systems a command shows what is there.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import common
import numpy as np
import torch
from methods import Result, Study, innermost, shorten, study_parser
from torch import Tensor

from index import IndexConfig
from index._faiss import load_faiss
from launch.plot import plot_sizes
from retriever import DualEncoderConfig
from retriever.heads import HeadConfig, NoCompressionConfig, PCAConfig, ResidualQuantizerConfig
from training import Experiment, load_experiment

ENDEX, CLOSED = "endex", "endex, closed corpus"
DENSE, TOWERS, ZERO = "dense control", "endex, uncompressed", "zero-shot"
BOUND = "Gaussian bound"
RECIPES = (Path("configs/default.yaml"), Path("configs/ivfpq.yaml"))
COMPONENTS = {8: 64, 16: 96, 32: 192, 64: 384}  # kept of a vector by bytes, as docs/results.md recommends
COMPONENTS_ADDITIVE = {8: 96, 16: 192, 32: 256, 64: 384}
COMPONENTS_CLOSED = {8: 256, 16: 384, 32: 384, 64: 384}  # the same, where all documents are in the fit
COMPONENTS_POST_HOC = {8: 96, 16: 128, 32: 256, 64: 384}  # principal ones, in front of FAISS's residual codes
MEASURES = ("ndcg@10", "mrr@10", "recall@10", "recall@100")
SHOWN = ("system", "bytes", *MEASURES, "kept", "gain", "p", "gain, without lists", "file_bytes")
BEAM = ";beam="  # in a name: FAISS's factory, and the beam of the documents
DOCUMENTS_A_LIST = 4  # at least, where the recipe's lists are more than the documents
FACTORS = 8  # bytes of a RaBitQ code that are no bits of components
WITHOUT_LISTS = ", without lists"  # of the rivals: those that are a code and nothing else
GOALS = {8: 0.90, 16: 0.97, 32: 0.99}


def main() -> None:
    options = parse(__doc__)
    rows: list[Result] = []
    started, studies = time.monotonic(), len(options.data) * len(options.seeds)
    for number, source in enumerate(source for source in options.data for _ in options.seeds):
        seed = options.seeds[number % len(options.seeds)]
        study = QualityStudy(source, seeded(options, seed))
        for reading in options.readings:
            rows += [{**row, "seed": seed} for row in study.table(reading)]
        left = (time.monotonic() - started) / (number + 1) * (studies - number - 1)
        print(f"{number + 1} of {studies} done, about {left / 60:.0f} minutes left", flush=True)
    for row in rows:
        row.pop("per_query", None)
    summary = summarize(rows)
    for reading in options.readings:
        common.print_table(
            f"{reading}, {len(options.seeds)} seeds", [row for row in summary if row["reading"] == reading]
        )
    draw(options.plot, summary)
    common.write_result(options.json, options, rows, summary=summary, goals=GOALS)


def parse(description: str | None) -> argparse.Namespace:
    """Return the options of this benchmark."""
    parser = quality_parser(description, out="runs/quality")
    parser.add_argument("--systems", nargs="+", help="names of the rows that are computed; by default all")
    parser.add_argument("--plot", type=Path, help="folder for nDCG@10 against bytes, a PNG a set and reading")
    return parse_study(parser)


def quality_parser(description: str | None, *, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options that a `QualityStudy` reads; the defaults are those of docs/results.md."""
    parser = study_parser(description, start_steps=200, steps=128, out=out)
    parser.set_defaults(lr=5e-5, documents=8000, queries=1500)
    parser.add_argument(
        "--recipes", type=Path, nargs="+", default=RECIPES, help="what is trained; the first is `endex`"
    )
    parser.add_argument(
        "--components",
        type=int,
        help="kept by recipes of residual codes; by default so many as go with --bytes",
    )
    parser.add_argument("--no_queries", action="store_true", help="train on the documents alone")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="seeds of training and fitting; by default --seed"
    )
    return parser


def parse_study(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options of the command line, checked; with --quick those of a quick run."""
    options = parser.parse_args()
    options.seeds = options.seeds or (options.seed,)
    if options.quick:
        shorten(options)
        options.documents, options.seeds = 1500, options.seeds[:1]
    if unknown := set(options.bytes) - set(COMPONENTS):
        parser.error(f"--bytes must be of {', '.join(map(str, COMPONENTS))}, got {min(unknown)}.")
    return options


def seeded(options: argparse.Namespace, seed: int) -> argparse.Namespace:
    """Return the options of one seed, whose runs have a folder of their own."""
    folder = options.out / f"{'no-queries' if options.no_queries else 'seed'}-{seed}"
    return argparse.Namespace(**{**vars(options), "seed": seed, "out": folder})


class QualityStudy(Study):
    """All systems on one data set, from one seed."""

    def __init__(self, source: Path, options: argparse.Namespace) -> None:
        super().__init__(source, options)
        self.lists = self._lists()

    def _lists(self) -> int:
        """Return the lists of the recipe; fewer where the blind reading leaves fewer documents to fit them on."""
        wanted: int = innermost(self._recipe(ENDEX).head).num_lists  # type: ignore[attr-defined]
        known = sum(self._known("blind"))
        if known >= wanted:
            return wanted
        fewer = 1 << (max(known // DOCUMENTS_A_LIST, 1).bit_length() - 1)
        print(f"{self.name}: {known:,} documents to fit on, so {fewer:,} lists in the place of {wanted:,}")
        return fewer

    def table(self, reading: str) -> list[Result]:
        """Return and print the rows of a reading."""
        if self.options.no_queries:
            control = start = self._untrained("start")
        else:
            start = self._fit(self._dense("start", self.options.encoder))
            control = self._fit(self._dense("control", str(start / "encoder")))
        vectors = self._vectors(control)
        cells = [(ZERO, 0, self._zero_shot), (DENSE, 0, lambda: self._dense_row(vectors))]
        chosen = self.options.systems
        cells += [
            (name, size, run)
            for size in self.options.bytes
            for name, run in self._systems(reading, size, start, vectors)
            if chosen is None or name in chosen or self._cell_path(reading, name, size).is_file()
        ]
        missing = sum(not self._cell_path(reading, name, size).is_file() for name, size, _ in cells)
        print(f"{self.name}, {reading}: {missing} of {len(cells)} rows to compute", flush=True)
        rows = [self._cell(reading, *cell) for cell in cells]
        self._compare(rows)
        title = f"{self.name}, {reading}: {len(self.data.qrels):,} queries, {len(self.data.documents):,} documents"
        common.print_table(
            f"{title}, seed {self.options.seed}", [{name: row.get(name) for name in SHOWN} for row in rows]
        )
        return rows

    def _systems(
        self, reading: str, size: int, start: Path, vectors: dict[str, Tensor]
    ) -> list[tuple[str, Callable[[], Result]]]:
        dim = vectors["documents"].shape[1]
        systems: list[tuple[str, Callable[[], Result]]] = [
            (name, lambda factory=factory: self._post_hoc(factory, "l2", vectors, reading))  # type: ignore[misc]
            for name, factory in self._factories(size, dim).items()
        ]
        last = self.out / reading / f"{ENDEX}-{size}" / "run" / "last"
        closed = reading == "fitted" and isinstance(self._recipe(CLOSED).head, PCAConfig)
        trained = [name for name in self._recipes() if name != CLOSED or closed]
        return [
            *systems,
            *((name, lambda name=name: self._joint(name, reading, size, start)) for name in trained),  # type: ignore[misc]
            (TOWERS, lambda: self._dense_row(self._vectors(last))),
            (BOUND, lambda: self._gaussian_bound(8 * size, vectors, reading)),
            (
                f"{BOUND}, lists",
                lambda: self._gaussian_bound(8 * size + math.log2(self.lists), vectors, reading),
            ),
        ]

    def _factories(self, size: int, dim: int) -> dict[str, str]:
        """Return FAISS's systems of a size: their factory strings by the names of their rows."""
        kept, lists = COMPONENTS[size], self.lists
        additive = additive_factory(size, lists)
        factories = {
            "FAISS PQ": f"PQ{size}",
            "FAISS OPQ": f"OPQ{size},PQ{size}",
            "FAISS OPQ, reduced": f"OPQ{size}_{kept},PQ{size}",
            "FAISS RQ": f"RQ{size - 1}x8_Nqint8",
            "FAISS OPQ, reduced, lists": f"OPQ{size}_{kept},IVF{lists},PQ{size}",
            "FAISS RQ, decoded": f"RQ{size}x8",
            "FAISS RQ, reduced, lists": additive,
            "FAISS LSQ": f"LSQ{size - 1}x8_Nqint8",
        }
        if 8 * size <= dim:  # a bit a component
            factories["FAISS ITQ"] = f"ITQ{8 * size},LSH"
        if beam := getattr(innermost(self._recipe(ENDEX).head), "eval_beam", None):
            factories["FAISS RQ, reduced, lists, wide beam"] = f"{additive}{BEAM}{beam}"
            factories["FAISS RQ, lists, wide beam"] = f"IVF{lists},RQ{size}x8{BEAM}{beam}"
        if FACTORS < size <= dim // 8 + FACTORS:
            factories["FAISS RaBitQ"] = f"PCAR{8 * (size - FACTORS)},RaBitQ"
        return factories

    def _fit_post_hoc(self, name: str, x: np.ndarray, reading: str) -> Any:
        """Return FAISS's index; where a beam is named, it is that in which the documents' codes are chosen."""
        factory, _, beam = name.partition(BEAM)
        if not beam:
            return super()._fit_post_hoc(factory, x, reading)
        faiss = load_faiss()
        built = faiss.clone_index(self._fitted(factory, x, reading))
        faiss.downcast_index(faiss.extract_index_ivf(built)).rq.max_beam_size = int(beam)
        built.reset()
        built.add(x)
        return built

    def _recipes(self) -> dict[str, Path]:
        """Return the recipes by the names of their rows."""
        first, *others = self.options.recipes
        return {ENDEX: first, CLOSED: first} | {f"{ENDEX}, {path.stem}": path for path in others}

    def _recipe(self, method: str) -> Any:
        return load_experiment(self._recipes()[method])

    def _head(self, method: str, size: int) -> HeadConfig:
        head = super()._head(method, size)
        if method != CLOSED:
            return head
        kept = self.options.components or COMPONENTS_CLOSED[size]
        known = replace(innermost(head), leave_one_out=False, refit=True)  # type: ignore[call-arg]
        return replace(head, components=kept, inner=known)  # type: ignore[call-arg]

    def _sized(self, head: HeadConfig, size: int) -> HeadConfig:
        if isinstance(head, PCAConfig):
            wanted = self.options.components or COMPONENTS_ADDITIVE[size]
            kept = wanted if _is_additive(head) else COMPONENTS[size]
            return replace(head, components=kept, inner=self._sized(head.inner, size))  # type: ignore[arg-type]
        if hasattr(head, "num_lists"):
            head = replace(head, num_lists=min(head.num_lists, self.lists))  # type: ignore[call-arg]
        if _is_additive(head):
            return replace(head, num_codebooks=size)  # type: ignore[call-arg]
        return super()._sized(head, size)

    def _index(self, head: HeadConfig) -> IndexConfig:
        if not _is_additive(head):
            return super()._index(head)
        return IndexConfig(kind="ivfrq" if hasattr(innermost(head), "num_lists") else "rq", norms="none")

    def _from_start(self, recipe: Experiment, folder: Path, encoder: str, reading: str) -> Experiment:
        experiment = super()._from_start(recipe, folder, encoder, reading)
        if not self.options.no_queries:
            return experiment
        return replace(experiment, data=replace(experiment.data, labels="pseudo"))

    def _untrained(self, name: str) -> Path:
        """Return the folder of the encoder as it came, where one that was trained under a name would be."""
        folder = self.out / name / "run" / "last"
        if not folder.is_dir():
            model = self._recipe(ENDEX).model
            config = DualEncoderConfig(
                encoder=self.options.encoder,
                query_max_length=model.query_max_length,
                document_max_length=model.document_max_length,
            )
            folder.parent.mkdir(parents=True, exist_ok=True)
            config.build(NoCompressionConfig()).save(folder)
        return folder

    def _zero_shot(self) -> Result:
        """Return the row of the encoder as it came."""
        return self._dense_row(self._vectors(self._untrained("zero-shot")))

    def _gaussian_bound(self, bits: float, vectors: dict[str, Tensor], reading: str) -> Result:
        """Return the row of vectors that went through the test channel of a Gaussian source at so many bits."""
        x = vectors["documents"].double()
        known = self._known(reading)
        mean = x[known].mean(0)
        variances, directions = torch.linalg.eigh(torch.cov(x[known].T))
        variances.clamp_(min=1e-12)
        low, high = 0.0, float(variances.max())
        for _ in range(60):  # the water level: the distortion of every component that has more variance
            level = (low + high) / 2
            rate = 0.5 * (variances / level).log2().clamp(min=0).sum()
            low, high = (level, high) if rate > bits else (low, level)
        kept = (1 - level / variances).clamp(min=0)
        noise = torch.randn(
            x.shape, generator=torch.Generator().manual_seed(self.options.seed), dtype=x.dtype
        )
        y = kept * ((x - mean) @ directions) + (level * kept).sqrt() * noise
        return self._search_exactly(y @ directions.T + mean, vectors["queries"])

    def _search_exactly(
        self, documents: Tensor, queries: Tensor, names: Sequence[str] | None = None
    ) -> Result:
        """Return the measures of decoded documents by L2; all of them, or those of `names`."""
        x, q = (rows.detach().float().contiguous().numpy() for rows in (documents, queries))
        flat = load_faiss().IndexFlatL2(x.shape[1])
        flat.add(x)
        return self._measured(self._run(flat, q, names))

    def _compare(self, rows: Sequence[Result]) -> None:
        """Add what a row keeps of the control, and how far Endex is from the best of FAISS of its size."""
        control = next(row for row in rows if row["system"] == DENSE)
        for row in rows:
            row["kept"] = row["ndcg@10"] / control["ndcg@10"]
            if row["system"] not in self._recipes():
                continue
            rivals = [r for r in rows if r["bytes"] == row["bytes"] and r["system"].startswith("FAISS")]
            flat = [rival for rival in rivals if ", lists" not in rival["system"]]
            for suffix, some in (("", rivals), (WITHOUT_LISTS, flat)):
                if some:
                    best = max(some, key=lambda rival: rival["ndcg@10"])
                    row |= {name + suffix: value for name, value in self._gain(row, best).items()}

    def _gain(self, row: Result, rival: Result) -> Result:
        """Return how far a row is ahead of a rival, by query."""
        own, other = row["per_query"], rival["per_query"]
        difference = np.array([own.get(n, 0.0) - other.get(n, 0.0) for n in self.data.qrels])
        error = difference.std() / math.sqrt(len(difference))
        return {
            "best_rival": rival["system"],
            "difference": float(difference.mean()),
            "gain": f"{difference.mean():+.3f} ± {1.96 * error:.3f}",
            "p": math.erfc(abs(difference.mean()) / error / math.sqrt(2)) if error else 1.0,
        }


def additive_factory(size: int, lists: int) -> str:
    """Return FAISS's factory string of components, lists and residual codes without norms."""
    return f"PCA{COMPONENTS_POST_HOC[size]},IVF{lists},RQ{size}x8"


def _is_additive(head: HeadConfig) -> bool:
    return isinstance(innermost(head), ResidualQuantizerConfig)


def summarize(rows: Sequence[Result]) -> list[Result]:
    """Return one row a set, reading, system and size: means over seeds."""
    keys = ("data", "reading", "system", "bytes")
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    summary = []
    for key, group in groups.items():
        values = [row["ndcg@10"] for row in group]
        line: Result = dict(zip(keys, key, strict=True))
        line |= {name: mean(row[name] for row in group) for name in MEASURES}
        line["deviation"] = stdev(values) if len(values) > 1 else None
        line["kept"] = mean(row["kept"] for row in group)
        for suffix in ("", WITHOUT_LISTS):
            differences = [row[f"difference{suffix}"] for row in group if f"difference{suffix}" in row]
            line[f"gain{suffix}"] = mean(differences) if differences else None
            line[f"largest p{suffix}"] = max(
                (row[f"p{suffix}"] for row in group if f"p{suffix}" in row), default=None
            )
        summary.append(line)
    return summary


def draw(folder: Path | None, summary: Sequence[Result]) -> None:
    """Draw nDCG@10 against bytes, a file for each set and reading."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for data, reading in dict.fromkeys((row["data"], row["reading"]) for row in summary):
        found = [row for row in summary if (row["data"], row["reading"]) == (data, reading)]
        levels = {row["system"]: row["ndcg@10"] for row in found if not row["bytes"]}
        curves: dict[str, dict[int, float]] = {}
        for row in found:
            if row["bytes"] and row["system"] != TOWERS:
                curves.setdefault(row["system"], {})[row["bytes"]] = row["ndcg@10"]
        own = [name for name in curves if name.startswith(ENDEX)]
        plot_sizes(folder / f"{data}-{reading}.png", curves, levels, "nDCG@10", thick=own)


if __name__ == "__main__":
    main()

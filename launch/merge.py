"""`endex merge DIR... --out DIR [--remove FILE] [--update]`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from index import IndexConfig, merge_indexes
from launch.arguments import parse, verb_parser
from launch.export import describe_report
from retriever import InputError

__all__ = ["run"]


def run(words: list[str]) -> int:
    """Join shards and indexes of one model; add, remove and replace documents; change the form of an index."""
    parser = verb_parser(
        "merge",
        "Join index and shard folders of one model into an index, without encoding anything again. One folder is "
        "enough: to leave documents out, or to get another form of index.",
    )
    parser.add_argument(
        "folders", type=str, nargs="+", help="Index and shard folders, in the order of their documents."
    )
    parser.add_argument("--out", type=str, required=True, help="Index folder to write.")
    parser.add_class_arguments(IndexConfig, "index")
    parser.add_argument(
        "--remove", type=str | None, default=None, help="File of document ids to leave out, one a line."
    )
    parser.add_argument(
        "--update", action="store_true", help="Where an id occurs again, keep the last document."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing index folder.")
    options = parse(parser, words)
    report = merge_indexes(
        [Path(folder) for folder in options.folders],
        Path(options.out),
        config=options.index,
        remove=_read_ids(Path(options.remove)) if options.remove else (),
        update=options.update,
        overwrite=options.overwrite,
    )
    if options.json:
        print(json.dumps({"out": options.out, **asdict(report)}))
        return 0
    print(describe_report(options.out, report))
    return 0


def _read_ids(path: Path) -> set[str]:
    try:
        return {line for line in path.read_text(encoding="utf-8").split("\n") if line}
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read: {error}. Give a file of document ids, one a line."
        ) from None

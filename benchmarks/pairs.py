"""Training pairs of a given number as a BEIR folder, for benchmarks that time training."""

from __future__ import annotations

import json
from itertools import cycle, islice
from pathlib import Path

from launch.pycode import build_pycode
from retriever import Document, read_data

__all__ = ["write_pairs"]


def write_pairs(source: Path | None, count: int, folder: Path) -> list[tuple[str, Document]]:
    """Write `count` training pairs of a BEIR folder; return query and document of each.

    No document comes twice, unless there are fewer: then all come again, under other names.

    Args:
        source: BEIR folder; by default one made from this machine's Python packages.
        count: Pairs wanted.
        folder: Where to write.
    """
    if source is None:
        source = folder.with_name("pycode")
        build_pycode(source)
    data = read_data(source, "train")
    first: dict[str, str] = {}  # document -> query
    for query, relevant in data.qrels.items():
        first.setdefault(next(iter(relevant)), query)
    (folder / "qrels").mkdir(parents=True)
    pairs, rows = [], islice(cycle(first.items()), count)
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "queries.jsonl").open("w") as queries:
        for number, (name, query) in enumerate(rows):
            document = data.documents[name]
            pairs.append((data.queries[query], document))
            text = {"_id": f"d{number}", "title": document.title, "text": document.text}
            corpus.write(json.dumps(text) + "\n")
            queries.write(json.dumps({"_id": f"q{number}", "text": data.queries[query]}) + "\n")
    for split, part in (("train", count), ("dev", min(4, count))):
        lines = "".join(f"q{number}\td{number}\t1\n" for number in range(part))
        (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    return pairs

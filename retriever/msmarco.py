"""MS MARCO's own files: tab-separated collection, queries, judgements and triples.

A folder holds `collection.tsv[.gz]` (passage id, text), `queries.*.tsv[.gz]` (query id, text), `qrels.SPLIT.tsv[.gz]`
(query id, 0, passage id, relevance) and, optionally, `qidpidtriples.SPLIT*.tsv[.gz]` (query id, id of a relevant
passage, id of another), which gives negatives, and judgements where there are no others. Or the source is one file of
triples of texts, `triples*.tsv[.gz]` (query, relevant passage, other passage); equal texts are then one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retriever.data import identifier_hash
from retriever.errors import InputError
from retriever.text_lines import numbered_lines

__all__ = [
    "collection_file",
    "is_msmarco",
    "is_text_triples",
    "judgements",
    "keep_negative",
    "negatives",
    "query_rows",
    "text_triples",
    "tsv_rows",
]

NEGATIVES_KEPT = 100  # of a query: the published triples have up to a thousand, in all 270 million
Rows = Iterator[tuple[str, dict[str, Any]]]


def is_msmarco(source: str | Path) -> bool:
    """Whether a source is a folder of MS MARCO's files."""
    folder = Path(source)
    beir = any((folder / f"corpus.jsonl{end}").is_file() for end in ("", ".gz"))
    return not beir and collection_file(folder) is not None


def is_text_triples(source: str | Path) -> bool:
    """Whether a source is a file of triples of texts."""
    path = Path(source)
    return path.is_file() and path.name.startswith("triples") and path.name.endswith((".tsv", ".tsv.gz"))


def collection_file(folder: Path) -> Path | None:
    """Return the file of the passages, or None."""
    found = _files(folder, "collection.tsv")
    return found[0] if found else None


def tsv_rows(path: Path, start: int = 0, stop: int | None = None) -> Rows:
    """Yield the rows of passages or queries, from row `start` to before `stop`, as those of `corpus.jsonl`."""
    for number, (where, (name, text)) in enumerate(_fields(path, 2)):
        if stop is not None and number >= stop:
            return
        if number >= start:
            yield where, {"_id": name, "text": text}


def query_rows(folder: Path) -> Rows:
    """Yield the queries of all files; those of one file may be a part of another's.

    Raises:
        InputError: If there are none.
    """
    if not (paths := _files(folder, "queries.*.tsv")):
        raise InputError(f"{folder} has no queries.*.tsv. Put MS MARCO's queries into it.")
    seen: set[str] = set()
    for path in paths:
        for where, row in tsv_rows(path):
            if row["_id"] not in seen:
                seen.add(row["_id"])
                yield where, row


def judgements(folder: Path, split: str) -> Iterator[tuple[str, str, str, int]]:
    """Yield place, query id, passage id and relevance.

    Raises:
        InputError: If the split has neither judgements nor triples, or a line is faulty.
    """
    if paths := _files(folder, f"qrels.{split}.tsv"):
        for where, (query, _, passage, relevance) in _fields(paths[0], 4):
            if not relevance.lstrip("-").isdecimal():
                raise InputError(
                    f"{where}: the relevance must be a whole number, got {relevance!r}. Correct the line."
                )
            yield where, query, passage, int(relevance)
        return
    if not (paths := _files(folder, f"qidpidtriples.{split}*.tsv")):
        raise InputError(
            f"{folder} has neither qrels.{split}.tsv nor qidpidtriples.{split}*.tsv. Choose another split."
        )
    for path in paths:
        for where, (query, passage, _) in _fields(path, 3):
            yield where, query, passage, 1


def negatives(folder: Path) -> dict[str, list[str]]:
    """Return the first 100 other passages of each query in the triples of all splits; empty without triples."""
    found: dict[str, list[str]] = {}
    for path in _files(folder, "qidpidtriples.*.tsv"):
        for _, (query, _, other) in _fields(path, 3):
            keep_negative(found, query, sys.intern(other))
    return found


def text_triples(path: Path) -> Iterator[tuple[tuple[str, str], tuple[str, str], tuple[str, str]]]:
    """Yield query, relevant passage and other passage of each line: a name made of the text, and the text."""
    for _, (query, passage, other) in _fields(path, 3):
        yield _named("q", query), _named("d", passage), _named("d", other)


def keep_negative(found: dict[str, list[str]], query: str, other: str) -> None:
    """Add a passage to the negatives of a query, as long as they are few."""
    known = found.setdefault(query, [])
    if len(known) < NEGATIVES_KEPT and other not in known:
        known.append(other)


def _named(kind: str, text: str) -> tuple[str, str]:
    return f"{kind}{identifier_hash(text):016x}", text


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted([*folder.glob(pattern), *folder.glob(f"{pattern}.gz")]) if folder.is_dir() else []


def _fields(path: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    """Yield place and fields of every line.

    Raises:
        InputError: If a line has another number of fields, or the file cannot be read.
    """
    for number, line in numbered_lines(path):
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != count:
            raise InputError(
                f"{path}:{number}: expected {count} fields between tabs, got {len(fields)}. Correct the line."
            )
        yield f"{path}:{number}", fields

"""Reading data folders in the BEIR layout, and the same tables from Hub data sets.

A folder holds `corpus.jsonl[.gz]` (`_id`, `title`, `text`), `queries.jsonl[.gz]` (`_id`, `text`),
`qrels/SPLIT.tsv` (`query-id`, `corpus-id`, `score`), and optionally `negatives.jsonl[.gz]`
(`query-id`, `negatives`: document ids). Every error names the file and the line.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retriever.data import Document, Query
from retriever.errors import InputError
from retriever.hub import hub_rows
from retriever.id_set import IdSet
from retriever.msmarco import collection_file, is_msmarco, judgements, query_rows, tsv_rows
from retriever.msmarco import negatives as msmarco_negatives
from retriever.text_lines import numbered_lines, open_file

__all__ = [
    "Qrels",
    "RetrievalData",
    "count_documents",
    "read_corpus",
    "read_negatives",
    "read_qrels",
    "read_queries",
    "read_scores",
    "table_file",
]

Qrels = dict[str, dict[str, int]]
"""Query id -> document id -> relevance (above 0 is relevant)."""


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """Documents and queries by id, judgements of one split, given negatives, and a teacher's scores, by query id."""

    documents: Mapping[str, Document]
    queries: Mapping[str, Query]
    qrels: Qrels
    negatives: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


def read_corpus(source: str | Path, start: int = 0, stop: int | None = None) -> Iterator[Document]:
    """Yield the documents of a BEIR folder, a `.jsonl[.gz]` file or a Hub data set, one at a time.

    Memory: 8 bytes a document.

    Args:
        source: The corpus.
        start: Documents passed over at the beginning; they are not parsed.
        stop: Number of the document to stop before; None for all.

    Raises:
        InputError: At the first line that is not a document, or has an id for the second time; and at the end if there
            was no document. Documents without title and text, which public sets have, are a warning.
    """
    seen, empty, blank = IdSet(), True, 0
    for where, row in _rows(source, "corpus", start, stop):
        document = Document(
            _text(row, "_id", where), _text(row, "title", where, default=""), _text(row, "text", where)
        )
        if not (document.title.strip() or document.text.strip()):
            blank, last = blank + 1, where
        if not seen.add(document.id) and _occurs(source, document.id, start, where):
            raise InputError(
                f"{where}: the document id {document.id!r} occurs a second time. Make the ids unique."
            )
        empty = False
        yield document
    if blank:
        warnings.warn(
            f"{blank} of the documents have neither title nor text, the last of them {last}: each is encoded as it is.",
            stacklevel=2,
        )
    if empty and not start:
        raise InputError(f"{source} holds no documents. Give a corpus with at least one document.")


def count_documents(source: str | Path) -> int:
    """Return the number of documents of a corpus; lines are counted, not parsed.

    Raises:
        InputError: If the source is not there, cannot be read, or is empty.
    """
    path = table_file(source, "corpus")
    if path is None:
        count = sum(1 for _ in hub_rows(str(source), "corpus", None))
    else:
        try:
            with open_file(path, "rb") as file:
                count = sum(1 for line in file if line.strip())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{path}: unreadable ({error}). Write the file again.") from None
    if not count:
        raise InputError(f"{source} holds no documents. Give a corpus with at least one document.")
    return count


def _occurs(source: str | Path, identifier: str, start: int, before: str) -> bool:
    """Whether a document of the corpus, before the place `before`, has an id."""
    for where, row in _rows(source, "corpus", start):
        if where == before:
            return False
        if str(row.get("_id")) == identifier:
            return True
    return False


def read_queries(source: str | Path) -> dict[str, str]:
    """Return the queries of a BEIR folder, file or Hub data set by id.

    Raises:
        InputError: If a line is not a query, an id repeats, or there is none.
    """
    queries: dict[str, str] = {}
    for where, row in _rows(source, "queries"):
        identifier, text = _text(row, "_id", where), _text(row, "text", where)
        if not text.strip():
            raise InputError(f"{where}: the query {identifier!r} is empty. Remove the line.")
        if identifier in queries:
            raise InputError(
                f"{where}: the query id {identifier!r} occurs a second time. Make the ids unique."
            )
        queries[identifier] = text
    if not queries:
        raise InputError(f"{source} holds no queries. Give at least one query.")
    return queries


def read_qrels(
    source: str | Path,
    split: str,
    *,
    queries: Iterable[str] | None = None,
    documents: Iterable[str] | None = None,
) -> Qrels:
    """Return the judgements of a split.

    Args:
        source: BEIR folder or Hub data set.
        split: Name of the file under `qrels/`, or of the Hub split.
        queries: Known query ids; an unknown one in the judgements is an error.
        documents: Known document ids; an unknown one in the judgements is an error.

    Raises:
        InputError: If a line is malformed or names an unknown query or document, or the split is empty.
    """
    known_queries = None if queries is None else set(queries)
    known_documents = documents if documents is None or isinstance(documents, Mapping) else set(documents)
    qrels: Qrels = {}
    for where, query, document, score in _judgements(source, split):
        if known_queries is not None and query not in known_queries:
            raise InputError(
                f"{where}: the query {query!r} is not among the queries. Add it or remove the line."
            )
        if known_documents is not None and document not in known_documents:
            raise InputError(
                f"{where}: the document {document!r} is not in the corpus. Add it or remove the line."
            )
        qrels.setdefault(query, {})[document] = score
    if not any(score > 0 for judged in qrels.values() for score in judged.values()):
        raise InputError(f"{source} has no relevant document in split {split!r}. Choose another split.")
    return qrels


def read_negatives(source: str | Path, documents: Iterable[str]) -> dict[str, list[str]]:
    """Return the given negatives of a BEIR folder by query id; empty if it has no `negatives.jsonl`.

    Raises:
        InputError: If a line is malformed or names an unknown document.
    """
    folder = Path(source)
    if not (folder.is_dir() and _find(folder, "negatives")):
        return msmarco_negatives(folder)
    known = documents if isinstance(documents, Mapping) else set(documents)
    negatives: dict[str, list[str]] = {}
    for where, row in _rows(source, "negatives"):
        ids = row.get("negatives")
        if not isinstance(ids, list):
            raise InputError(
                f"{where}: 'negatives' must be a list of document ids, got {ids!r}. Correct the line."
            )
        names = [str(value) if isinstance(value, int) else value for value in ids]
        for name in names:
            if not isinstance(name, str) or name not in known:
                raise InputError(f"{where}: the document {name!r} is not in the corpus. Remove it.")
        negatives[_text(row, "query-id", where)] = names
    return negatives


def read_scores(source: str | Path, documents: Mapping[str, Document]) -> dict[str, dict[str, float]]:
    """Return a teacher's scores by query and document, from the same file as the given negatives.

    Raises:
        InputError: If there is no such file, or a line has not one finite score for every document that it names.
    """
    if not (Path(source).is_dir() and _find(Path(source), "negatives")):
        raise InputError(
            f"{source} has no negatives.jsonl with scores. Write it: endex mine --teacher MODEL."
        )
    found: dict[str, dict[str, float]] = {}
    for where, row in _rows(source, "negatives"):
        scores: dict[str, float] = {}
        for names, values in (("negatives", "scores"), ("positives", "positive_scores")):
            ids, numbers = row.get(names), row.get(values)
            if not isinstance(ids, list) or not isinstance(numbers, list) or len(ids) != len(numbers):
                raise InputError(f"{where}: {values!r} must be a list with a score for each of {names!r}.")
            for name, number in zip(map(str, ids), numbers, strict=True):
                if name not in documents:
                    raise InputError(f"{where}: the document {name!r} is not in the corpus. Remove it.")
                if not isinstance(number, int | float) or not math.isfinite(number):
                    raise InputError(f"{where}: {values!r} must hold finite numbers, got {number!r}.")
                scores[name] = float(number)
        found[_text(row, "query-id", where)] = scores
    return found


def read_data(
    source: str | Path, split: str, *, documents: Mapping[str, Document] | None = None
) -> RetrievalData:
    """Return everything that training or evaluation on one split needs, in memory.

    Args:
        source: BEIR folder or Hub data set.
        split: Split of the judgements.
        documents: The corpus, where it is open already.
    """
    if documents is None:
        documents = {document.id: document for document in read_corpus(source)}
    queries = read_queries(source)
    qrels = read_qrels(source, split, queries=queries, documents=documents)
    return RetrievalData(documents, queries, qrels, read_negatives(source, documents))


def _find(folder: Path, name: str) -> Path | None:
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.is_file():
            return path
    return None


def _rows(
    source: str | Path, name: str, start: int = 0, stop: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a table of a folder, a file or a Hub data set, from row `start` to before `stop`."""
    if name == "queries" and is_msmarco(source):
        yield from query_rows(Path(source))
        return
    path = table_file(source, name)
    if path is None:
        yield from hub_rows(str(source), name, None, start, stop)
    elif ".tsv" in path.suffixes:
        yield from tsv_rows(path, start, stop)
    else:
        yield from _json_lines(path, start, stop)


def table_file(source: str | Path, name: str) -> Path | None:
    """Return the file of a table of a folder, or None for a Hub data set."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir() or _is_datasets_folder(path):
        return None
    if name == "corpus" and is_msmarco(path):
        return collection_file(path)
    if (found := _find(path, name)) is None:
        raise InputError(f"{path} has no {name}.jsonl or {name}.jsonl.gz. Give a folder in the BEIR layout.")
    return found


def _json_lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = 0
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        rows += 1
        if rows <= start:
            continue
        if stop is not None and rows > stop:
            return
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: not JSON ({error}). Correct or remove the line: one JSON object a line."
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f"{path}:{number}: expected a JSON object, got {type(row).__name__}. Correct the line."
            )
        yield f"{path}:{number}", row


def _text(row: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if key in ("_id", "query-id") and isinstance(value, int):
        value = str(value)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str) or (
        key in ("_id", "query-id") and (not value or any(c in value for c in "\t\r\n "))
    ):
        raise InputError(
            f"{where}: {key!r} must be a text{' without spaces' if 'id' in key else ''}, got {value!r}. "
            "Correct the line."
        )
    return value


def _judgements(source: str | Path, split: str) -> Iterator[tuple[str, str, str, int]]:
    path = Path(source)
    if is_msmarco(path):
        yield from judgements(path, split)
        return
    if path.is_dir() and not _is_datasets_folder(path):
        yield from _tsv_judgements(path, split)
        return
    for where, row in hub_rows(str(source), "qrels", split):
        query, document = row.get("query-id"), row.get("corpus-id")
        if query is None or document is None:
            raise InputError(
                f"{where}: judgements need the columns query-id, corpus-id, score; got {sorted(row)}."
            )
        score = row.get("score", 1)
        if not isinstance(score, int | float) or score != int(score):
            raise InputError(f"{where}: the score must be a whole number, got {score!r}. Correct the row.")
        yield where, str(query), str(document), int(score)


def _tsv_judgements(folder: Path, split: str) -> Iterator[tuple[str, str, str, int]]:
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        present = sorted(p.stem for p in (folder / "qrels").glob("*.tsv"))
        raise InputError(
            f"{folder} has no qrels/{split}.tsv. Choose a split: {', '.join(present) or 'there is none'}."
        )
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                fields = line.rstrip("\r\n").split("\t")
                if number == 1 and fields[:1] in (["query-id"], ["query_id"]):
                    continue
                if len(fields) != 3 or not re.fullmatch(r"-?[0-9]+", fields[2]):
                    raise InputError(
                        f"{path}:{number}: expected query-id<TAB>corpus-id<TAB>score, got {line.rstrip()!r}. "
                        "Correct the line."
                    )
                yield f"{path}:{number}", fields[0], fields[1], int(fields[2])
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{number + 1}: unreadable ({error}). Write the file again as UTF-8."
        ) from None


def _is_datasets_folder(folder: Path) -> bool:
    """Whether a local folder is a Hub-style data set (README.md with `configs:`) instead of the BEIR layout."""
    card = folder / "README.md"
    beir = _find(folder, "corpus") is not None and any((folder / "qrels").glob("*.tsv"))
    return not beir and card.is_file() and "configs:" in card.read_text(encoding="utf-8")

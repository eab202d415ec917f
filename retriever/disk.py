"""A corpus that stays on disk: documents by id without holding their texts.

Of `corpus.jsonl` the byte offset of every line is kept, of a Hub data set its Arrow table is mapped into memory (its
map-style form). Ids are found by their 64-bit hashes. Offsets and hashes lie in a cache folder, memory-mapped and
shared by the processes of a machine: 24 bytes a document on disk, and as much memory as the system spares.

Shapes: n documents.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from retriever.beir import read_corpus, table_file
from retriever.data import Document, document_key, identifier_hash
from retriever.errors import InputError
from retriever.folder import publish_folder
from retriever.hub import load_hub_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "DiskDocuments",
    "JoinedDocuments",
    "NamedDocuments",
    "document_ids",
    "document_keys",
    "document_rows",
    "joined_name",
    "open_documents",
]

ARRAYS = ("offsets", "hashes", "order")


class Table(ABC):
    """Rows of a corpus on disk.

    Attributes:
        source: What `read_corpus` reads the same rows from.
    """

    source: str | Path

    @abstractmethod
    def version(self) -> str:
        """Return a text that changes when the rows do."""

    @abstractmethod
    def offsets(self) -> Iterator[int]:
        """Yield where each row begins, 0 where rows are found by number."""

    @abstractmethod
    def read(self, row: int, offset: int) -> dict[str, Any]:
        """Return a row."""


class TextLines(Table):
    """A .jsonl file, or MS MARCO's collection.tsv, one document a line."""

    def __init__(self, path: Path) -> None:
        self.source = self.path = path
        with path.open("rb") as file:
            empty = not path.stat().st_size
            self._bytes = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def version(self) -> str:
        """Return path, size and time of the last change."""
        state = self.path.stat()
        return f"{self.path.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"

    def offsets(self) -> Iterator[int]:
        """Yield the first byte of every line that is not blank."""
        with self.path.open("rb") as file:
            start = 0
            for line in file:
                if line.strip():
                    yield start
                start += len(line)

    def read(self, row: int, offset: int) -> dict[str, Any]:
        """Return the document of the line at an offset."""
        end = self._bytes.find(b"\n", offset)
        line = self._bytes[offset : end if end >= 0 else None]
        if self.path.suffix == ".tsv":
            name, _, text = line.decode().rstrip("\r").partition("\t")
            return {"_id": name, "text": text}
        return json.loads(line)  # type: ignore[no-any-return]


class HubTable(Table):
    """The corpus of a Hub data set in its map-style form: an Arrow table in the cache of `datasets`."""

    def __init__(self, name: str) -> None:
        self.source = name
        self._rows = load_hub_table(name, "corpus")

    def version(self) -> str:
        """Return the table's fingerprint."""
        return f"{self.source}\n{self._rows._fingerprint}"

    def offsets(self) -> Iterator[int]:
        """Yield zeros."""
        return (0 for _ in range(len(self._rows)))

    def read(self, row: int, offset: int) -> dict[str, Any]:
        """Return a row by its number."""
        return dict(self._rows[row])


class DiskDocuments(Mapping[str, Document]):
    """Documents of a corpus by id, in the corpus' order, read when they are asked for.

    Args:
        table: Where they are.
        cache: Folder for offsets and hashes, made when they are not there.

    Raises:
        InputError: Where `read_corpus` raises it.
    """

    def __init__(self, table: Table, cache: Path) -> None:
        self._table = table
        key = hashlib.blake2b(table.version().encode(), digest_size=12).hexdigest()
        folder = cache / key
        if not folder.is_dir():
            _write_arrays(table, folder)
        self._offsets, self._hashes, self._order = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS
        )
        self.rows = Rows(len(self._offsets), self.document)
        self.ids = Rows(len(self._offsets), lambda row: self.document(row).id)

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self._candidates(name))

    def __getitem__(self, name: str) -> Document:
        for row in self._candidates(name):
            document = self.document(row)
            if document.id == name:
                return document
        raise KeyError(name)

    def keys_by_row(self) -> NDArray[np.int64]:
        """Return `document_key` of every id, (n,), from the hashes."""
        keys = np.empty(len(self), np.int64)
        keys[self._order] = (self._hashes >> np.uint64(1)) | np.uint64(1)
        return keys

    def document(self, row: int) -> Document:
        """Return the document of a row."""
        found = self._table.read(row, int(self._offsets[row]))
        return Document(str(found["_id"]), found.get("title") or "", found["text"])

    def _candidates(self, name: str) -> list[int]:
        """Return the rows whose ids have the hash of a name: one, and among 10^9 documents perhaps ever two."""
        key = np.uint64(identifier_hash(name))
        first = int(np.searchsorted(self._hashes, key))
        rows = []
        while first < len(self._hashes) and self._hashes[first] == key:
            rows.append(int(self._order[first]))
            first += 1
        return rows


class Rows(Sequence[Any]):
    """Values by row number, made when they are asked for."""

    def __init__(self, length: int, make: Callable[[int], Any]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, row: int) -> Any: ...
    @overload
    def __getitem__(self, row: slice) -> list[Any]: ...
    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return [self._make(number) for number in range(*row.indices(self._length))]
        return self._make(range(self._length)[row])


class NamedDocuments(Mapping[str, Document]):
    """Documents of one of several corpora, under names that begin with its number: "0:ID", "1:ID" ...

    Args:
        number: Number of the corpus.
        documents: The corpus.
    """

    def __init__(self, number: int, documents: Mapping[str, Document]) -> None:
        self._documents, self._prefix = documents, joined_name(number, "")
        ids, rows = document_ids(documents), document_rows(documents)
        self.ids = Rows(len(ids), lambda row: self._prefix + ids[row])
        self.rows = Rows(len(rows), lambda row: self._named(rows[row]))

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[str]:
        return (self._prefix + name for name in self._documents)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.startswith(self._prefix) and self._own(name) in self._documents

    def __getitem__(self, name: str) -> Document:
        if not name.startswith(self._prefix):
            raise KeyError(name)
        return self._named(self._documents[self._own(name)])

    def _own(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    def _named(self, document: Document) -> Document:
        return replace(document, id=self._prefix + document.id)


class JoinedDocuments(Mapping[str, Document]):
    """Documents of several corpora.

    Args:
        parts: The corpora, numbered as they come.
    """

    def __init__(self, parts: Sequence[NamedDocuments]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))
        self.ids = Rows(self._ends[-1], lambda row: self._at(row, lambda part: part.ids))
        self.rows = Rows(self._ends[-1], lambda row: self._at(row, lambda part: part.rows))

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._parts)

    def __contains__(self, name: object) -> bool:
        return any(name in part for part in self._parts)

    def __getitem__(self, name: str) -> Document:
        number = name.partition(":")[0]
        if not number.isdecimal() or int(number) >= len(self._parts):
            raise KeyError(name)
        return self._parts[int(number)][name]

    def _at(self, row: int, values: Callable[[NamedDocuments], Rows]) -> Any:
        number = bisect(self._ends, row)
        return values(self._parts[number])[row - (self._ends[number - 1] if number else 0)]


ROWS = (DiskDocuments, NamedDocuments, JoinedDocuments)  # give documents by row


def joined_name(number: int, name: str) -> str:
    """Return the name of a query or document of one of several sets."""
    return f"{number}:{name}"


def open_documents(source: str | Path, cache: Path | None = None) -> DiskDocuments:
    """Return the documents of a BEIR folder, a .jsonl file or a Hub data set, without reading them into memory.

    Args:
        source: The corpus.
        cache: Folder for offsets and hashes; by default $ENDEX_CACHE, or endex in the user's cache folder.

    Raises:
        InputError: If the corpus is compressed, is not there, or holds what is no document.
    """
    path = table_file(source, "corpus")
    if path is not None and path.suffix == ".gz":
        raise InputError(
            f"{path} is compressed and cannot be read from the middle. Unpack it: gunzip -k {path}."
        )
    table: Table = HubTable(str(source)) if path is None else TextLines(path)
    return DiskDocuments(table, cache or _default_cache())


def document_ids(documents: Mapping[str, Document]) -> Sequence[str]:
    """Return ids by row; of a corpus on disk without reading it."""
    return documents.ids if isinstance(documents, ROWS) else list(documents)


def document_rows(documents: Mapping[str, Document]) -> Sequence[Document]:
    """Return documents by row; of a corpus on disk without reading it."""
    return documents.rows if isinstance(documents, ROWS) else list(documents.values())


def document_keys(documents: Mapping[str, Document]) -> NDArray[np.int64]:
    """Return `document_key` of every id, (n,), by row; of a corpus on disk without reading it."""
    if isinstance(documents, DiskDocuments):
        return documents.keys_by_row()
    return np.fromiter(map(document_key, documents), np.int64, len(documents))


def _default_cache() -> Path:
    if "ENDEX_CACHE" in os.environ:
        return Path(os.environ["ENDEX_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "endex" / "documents"


def _write_arrays(table: Table, folder: Path) -> None:
    """Write offsets, sorted hashes and their rows; another process may do the same, and one of them stays."""
    offsets = np.fromiter(table.offsets(), np.uint64)
    hashes = np.fromiter((identifier_hash(document.id) for document in read_corpus(table.source)), np.uint64)
    order = hashes.argsort(kind="stable")
    arrays: dict[str, NDArray[np.uint64]] = dict(
        zip(ARRAYS, (offsets, hashes[order], order.astype(np.uint64)), strict=True)
    )
    try:
        with publish_folder(folder, "offsets") as path:
            for name, array in arrays.items():
                np.save(path / f"{name}.npy", array)
    except (InputError, OSError):
        if not folder.is_dir():
            raise

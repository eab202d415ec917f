"""Vector files as retrieval data: a vector is a document, a query, or both.

A source is a vector file (`retriever.vector_files`), or a folder with `base.*` and, if it has them, `learn.*`
(training vectors), `query.*` and `groundtruth.*` (rows of `base`, nearest first; only the first column is used).
`NAME_base.*`, as INRIA names them, is `base.*` too. An .hdf5 file without a data set's name is a folder if it has
ann-benchmarks' `train`, `test` and `neighbors`.

Shapes: n vectors, D dimensions, B queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from retriever.beir import Qrels, RetrievalData
from retriever.data import Document
from retriever.errors import InputError
from retriever.scores import Metric, score_matrix
from retriever.vector_files import HDF5, SUFFIXES, VectorFile, hdf5_names, split_dataset

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import NDArray

__all__ = [
    "count_vectors",
    "is_vectors",
    "named_files",
    "read_vector_data",
    "read_vector_documents",
    "read_vector_qrels",
    "read_vector_queries",
]

PARTS = ("base", "learn", "query", "groundtruth")
ANN_BENCHMARKS = {"base": "train", "query": "test", "groundtruth": "neighbors"}  # their data set names
PIECE = 4096  # vectors read at once
HELD_OUT = 1000  # queries taken from a file that comes without any; at most a tenth of it
T = TypeVar("T")


class VectorTable(Mapping[str, T], Generic[T]):
    """Rows of a vector file by their number, read when they are asked for.

    Args:
        file: The vectors.
        make: Row number and vector -> value.
        rows: Rows that belong to it; all by default.
    """

    def __init__(
        self,
        file: VectorFile,
        make: Callable[[str, Float[NDArray[np.float32], " D"]], T],
        rows: Int[NDArray[np.int64], " n"] | None = None,
    ) -> None:
        self.file = file
        self._make = make
        self._rows = range(len(file)) if rows is None else rows
        self._known = self._rows if rows is None else {*rows.tolist()}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return (str(row) for row in self._rows)

    def __getitem__(self, name: str) -> T:
        row = int(name) if name.isdecimal() else -1
        if row not in self._known:
            raise KeyError(name)
        return self._make(name, self.file.vectors(row, row + 1)[0])


def is_vectors(source: str | Path) -> bool:
    """Whether a source is a vector file or a folder of them."""
    file, _ = split_dataset(str(source))
    return file.suffix in SUFFIXES or (file.is_dir() and _part(file, "base") is not None)


def count_vectors(source: str | Path) -> int:
    """Return the vectors of `base.*`, or of a file."""
    return len(VectorFile(named_files(source)["base"]))


def read_vector_documents(source: str | Path, start: int = 0, stop: int | None = None) -> Iterator[Document]:
    """Yield the vectors of `base.*`, or of a file, as documents named by their row; see `read_corpus`."""
    file = VectorFile(named_files(source)["base"])
    stop = len(file) if stop is None else min(stop, len(file))
    for first in range(start, stop, PIECE):
        for row, vector in enumerate(file.vectors(first, min(first + PIECE, stop)), start=first):
            yield _document(str(row), vector)


def read_vector_queries(source: str | Path) -> Mapping[str, Float[NDArray[np.float32], " D"]]:
    """Return the vectors of `query.*`, or of a file, by row."""
    parts = named_files(source)
    if "query" not in parts and Path(source).is_dir():
        raise InputError(f"{source} has no query.*. Give a folder that has it, or a vector file.")
    return VectorTable(VectorFile(parts.get("query", parts["base"])), _vector)


def read_vector_qrels(source: str | Path, *, metric: Metric = "l2", normalize: bool = False) -> Qrels:
    """Return the true nearest neighbour of every query in `base.*`: recall@k is then R@k of the ANN literature.

    It is read from `groundtruth.*`, else found by comparing with every vector.

    Args:
        source: Folder of vector files.
        metric: By which neighbours are found where they are not given.
        normalize: Compare unit vectors, where neighbours are not given.

    Raises:
        InputError: If there are no queries, or what is given does not fit them.
    """
    parts = named_files(source)
    if "query" not in parts:
        raise InputError(f"{source} has no queries. Give a folder with base.* and query.*.")
    base, queries = VectorFile(parts["base"]), VectorFile(parts["query"])
    _check_dims(base, queries)
    if "groundtruth" in parts:
        nearest = _given_neighbours(VectorFile(parts["groundtruth"]), queries, base)
    else:
        rows = np.arange(len(base))
        nearest = nearest_rows(queries.vectors(0, len(queries)), base, rows, metric, normalize)
    return {str(query): {str(row): 1} for query, row in enumerate(nearest.tolist())}


def read_vector_data(
    source: str | Path, split: str, *, metric: Metric = "l2", normalize: bool = False
) -> RetrievalData:
    """Return vectors as training or evaluation takes them.

    Split "train": each vector of `learn.*`, else of `base.*`, is a query whose relevant document is itself. Any other
    split: `query.*` against `base.*`, see `read_vector_qrels`. Of a file without queries, up to 1,000 rows, evenly
    spaced, are kept out of the training; they are the queries, and the other rows the documents.

    Args:
        source: Folder of vector files, or one file.
        split: "train", or another name for the evaluation.
        metric: By which neighbours are found where they are not given.
        normalize: Compare unit vectors, where neighbours are not given.

    Raises:
        InputError: If files do not fit together or cannot be read.
    """
    parts = named_files(source)
    if "query" not in parts and (split != "train" or "learn" not in parts):
        return _held_out(VectorFile(parts["base"]), split, metric, normalize)
    if split == "train":
        learn = VectorFile(parts.get("learn", parts["base"]))
        return _itself(learn, np.arange(len(learn)))
    base = VectorFile(parts["base"])
    qrels = read_vector_qrels(source, metric=metric, normalize=normalize)
    return RetrievalData(VectorTable(base, _document), read_vector_queries(source), qrels)


def nearest_rows(
    queries: Float[NDArray[np.float32], "B D"],
    base: VectorFile,
    rows: Int[NDArray[np.int64], " n"],
    metric: Metric,
    normalize: bool,
) -> Int[NDArray[np.int64], " B"]:
    """Return the row of `base`, among `rows`, that scores best with each query; the first of equal ones."""
    q = torch.from_numpy(queries).double()  # squared lengths cancel in float32
    q = F.normalize(q, dim=-1) if normalize else q
    best = torch.full((len(q),), float("-inf"), dtype=q.dtype)
    nearest = torch.zeros(len(q), dtype=torch.int64)
    for first in range(0, len(base), PIECE):
        piece = rows[(rows >= first) & (rows < first + PIECE)]
        if not len(piece):
            continue
        x = torch.from_numpy(base.vectors(first, first + PIECE)[piece - first]).double()
        scores = score_matrix(q, F.normalize(x, dim=-1) if normalize else x, metric).max(1)
        better = scores.values > best
        best = torch.where(better, scores.values, best)
        nearest = torch.where(better, torch.from_numpy(piece)[scores.indices], nearest)
    return nearest.numpy()


def _held_out(file: VectorFile, split: str, metric: Metric, normalize: bool) -> RetrievalData:
    count = min(HELD_OUT, len(file) // 10)
    if not count:
        raise InputError(f"{file.path} has {len(file)} vectors, too few to train and evaluate on.")
    held = np.linspace(0, len(file) - 1, count).astype(np.int64)
    others = np.setdiff1d(np.arange(len(file)), held)
    if split == "train":
        return _itself(file, others)
    queries = VectorTable(file, _vector, held)
    vectors = np.concatenate([file.vectors(row, row + 1) for row in held.tolist()])
    nearest = nearest_rows(vectors, file, others, metric, normalize).tolist()
    qrels = {name: {str(row): 1} for name, row in zip(queries, nearest, strict=True)}
    return RetrievalData(VectorTable(file, _document, others), queries, qrels)


def _itself(file: VectorFile, rows: Int[NDArray[np.int64], " n"]) -> RetrievalData:
    qrels = {str(row): {str(row): 1} for row in rows.tolist()}
    return RetrievalData(VectorTable(file, _document, rows), VectorTable(file, _vector, rows), qrels)


def _document(name: str, vector: Float[NDArray[np.float32], " D"]) -> Document:
    return Document(name, "", "", vector)


def _vector(name: str, vector: Float[NDArray[np.float32], " D"]) -> Float[NDArray[np.float32], " D"]:
    return vector


def _given_neighbours(
    truth: VectorFile, queries: VectorFile, base: VectorFile
) -> Int[NDArray[np.int64], " B"]:
    nearest = truth.numbers()[:, 0]
    if len(nearest) != len(queries):
        raise InputError(
            f"{truth.path} has {len(nearest)} rows for the {len(queries)} queries of {queries.path}. Give one a query."
        )
    wrong = nearest[(nearest < 0) | (nearest >= len(base))]
    if len(wrong):
        raise InputError(f"{truth.path} names row {wrong[0]}, but {base.path} has {len(base)} vectors.")
    return nearest


def _check_dims(base: VectorFile, other: VectorFile) -> None:
    if base.dim != other.dim:
        raise InputError(
            f"{other.path} has {other.dim} dimensions and {base.path} {base.dim}. Give vectors of one kind."
        )


def named_files(source: str | Path) -> dict[str, str]:
    """Return the files of a source by name: base, and those of learn, query and groundtruth that it has."""
    file, dataset = split_dataset(str(source))
    if file.is_dir():
        found = {name: _part(file, name) for name in PARTS}
        parts = {name: str(path) for name, path in found.items() if path}
        if "base" not in parts:
            raise InputError(f"{file} has no base.*. Give a folder of vector files: {', '.join(SUFFIXES)}.")
        learn = parts.get("learn")
        if learn:
            _check_dims(VectorFile(parts["base"]), VectorFile(learn))
        return parts
    if file.suffix in HDF5 and not dataset and file.is_file():
        names = hdf5_names(file)
        if {"train", "test"} <= names:
            return {part: f"{file}:{name}" for part, name in ANN_BENCHMARKS.items() if name in names}
    return {"base": str(source)}


def _part(folder: Path, name: str) -> Path | None:
    """Return the vector file `NAME.*` or `..._NAME.*` of a folder."""
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in SUFFIXES and (path.stem == name or path.stem.endswith(f"_{name}"))
    )
    if len(found) > 1:
        raise InputError(f"{folder} has {found[0].name} and {found[1].name} for {name}. Keep one.")
    return found[0] if found else None

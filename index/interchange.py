"""Learned codebooks and codes for other engines: an index folder as streams, and a neutral bundle of its arrays.

A bundle holds everything that an engine needs that takes codebooks and codes; `index.decoded` writes vectors for
engines that do not. Memory: the codebooks, one block and 8 bytes a document; an uncompressed index is read whole.

A head that maps (CNT) compares queries and documents in a space of its own. What is written is then in that space, and
`head/` beside it holds the map that a query must pass through before it is compared.

Shapes: n documents, D dimensions of the head's space, M codes a document, K = 2**nbits codewords, S = D // M, J
inverted lists.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from index._faiss import load_faiss
from index.builders.base import num_lists
from index.lines import Lines
from retriever import Document, InputError
from retriever.dual_encoder import load_head
from retriever.folder import check_folder, publish_folder
from retriever.heads import (
    AdditiveCodebooks,
    CoarseAdditiveCodebooks,
    CoarseProductCodebooks,
    FaissExport,
    FlatVectors,
    NeuralCodec,
    ProductCodebooks,
)
from retriever.scores import Metric

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "BLOCK",
    "HEAD",
    "Bundle",
    "CodeSource",
    "ConvertReport",
    "decode",
    "read_arrays",
    "read_bundle",
    "write_bundle",
]

FORMAT = "endex-bundle-1"
ARRAYS = "arrays.safetensors"
HEAD = "head"  # folder of the head, where queries must pass through it
BLOCK = 4096  # documents decoded at once


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """What was written and what it costs.

    Attributes:
        ntotal: Documents n.
        dim: Dimensions D, those of the head's space where it maps.
        metric: "inner_product" or "l2": the score that ranks as the index does; cosine does not.
        bytes_before: Of a document in the index.
        bytes_after: Of a document in what was written, without ids and texts.
        rounding: Largest change of a number by writing it as float16; 0 in float32.
        lossless: Whether what was written gives the index's scores, within `rounding` and float32's own.
        note: What the reader must know to use it.
    """

    ntotal: int
    dim: int
    metric: Metric
    bytes_before: int
    bytes_after: int
    rounding: float
    lossless: bool
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Codebooks and codes as plain arrays; `decode` says what they mean.

    Attributes:
        metric: Score contract of `retriever.scores`.
        nbits: log2 K.
        additive: Whether codewords have all D dimensions and are added, instead of S that are put side by side.
        orthonormal: Whether the rotation is; one that is not carries inner products only.
        codebooks: (M, K, S), or (M, K, D) if additive.
        rotation: A of y = A x; codebooks and centroids are behind it. None: there is none.
        centroids: One of each inverted list; codes are then of what is left of a vector without it (`by_residual`).
        codes: Codewords of each document, uint8, or uint16 where nbits is more than 8.
        lists: List of each document; None where there are none.
        ids: Document ids, in the order of the codes.
    """

    metric: Metric
    nbits: int
    additive: bool
    orthonormal: bool
    codebooks: Float[NDArray[np.float32], "M K S"]
    rotation: Float[NDArray[np.float32], "D D"] | None
    centroids: Float[NDArray[np.float32], "J D"] | None
    codes: Int[NDArray[Any], "n M"]
    lists: Int[NDArray[np.int32], " n"] | None
    ids: Lines

    @property
    def by_residual(self) -> bool:
        """Whether codes are of residuals to the centroids."""
        return self.centroids is not None

    def decode(self, start: int, stop: int) -> Float[NDArray[np.float32], "n D"]:
        """Return the vectors of documents `start` to `stop`, before the rotation: those (mapped) queries score with."""
        lists = None if self.lists is None else self.lists[start:stop]
        found = decode(self.codebooks, self.centroids, self.codes[start:stop], lists, additive=self.additive)
        return found if self.rotation is None else found @ self.rotation


def decode(
    codebooks: Float[NDArray[np.float32], "M K S"],
    centroids: Float[NDArray[np.float32], "J D"] | None,
    codes: Int[NDArray[Any], "n M"],
    lists: Int[NDArray[Any], " n"] | None,
    *,
    additive: bool,
) -> Float[NDArray[np.float32], "n D"]:
    """Return what codes stand for, behind the rotation: codewords side by side (or added), plus the list's centroid."""
    words = codebooks[np.arange(len(codebooks)), codes.astype(np.int64)]  # (n, M, S)
    found = words.sum(axis=1) if additive else words.reshape(len(codes), -1)
    return found if centroids is None or lists is None else found + centroids[lists]


class CodeSource:
    """An index folder as a stream of ids, codes, vectors and texts.

    Args:
        folder: What `endex export` or `endex merge` wrote.

    Raises:
        InputError: If the folder is damaged, or holds neither codes nor uncompressed vectors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = check_folder(folder, "index", full=False)
        self.head = load_head(folder / "head").eval()
        self.export: FaissExport = self.head.export()
        self.ids = Lines(folder / "docid")
        self.has_texts = (folder / "documents.jsonl").is_file()
        if type(self.export) is not FlatVectors and not (folder / "codes.u8").is_file():
            raise InputError(f"{folder} holds no codes, so it cannot be converted. Export its corpus again.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def about(self) -> dict[str, Any]:
        """What a manifest says about where something came from."""
        return {"model": self.manifest["model"], "ntotal": len(self), "dim": self.head.out_dim}

    @property
    def query_note(self) -> str:
        """What a query needs before it is compared, for a report's note; empty where it needs nothing."""
        return f"; pass queries through {HEAD}/ first (docs/engines.md)" if self.head.config.maps else ""

    def copy_query_map(self, out: Path) -> None:
        """Copy the head into a folder if queries must pass through it."""
        if self.head.config.maps:
            shutil.copytree(self.folder / "head", out / HEAD)

    @property
    def arrays(self) -> dict[str, Float[NDArray[np.float32], "..."]]:
        """Codebooks, and rotation and centroids where the head has them."""
        export = self.export
        found: dict[str, Tensor | None] = {}
        if isinstance(export, ProductCodebooks | AdditiveCodebooks):
            found = {"codebooks": export.codebooks, "rotation": export.rotation}
        if isinstance(export, CoarseProductCodebooks | CoarseAdditiveCodebooks | NeuralCodec):
            found["centroids"] = export.centroids
        return {name: value.numpy().astype(np.float32) for name, value in found.items() if value is not None}

    def split_codes(
        self,
    ) -> Iterator[tuple[Int[NDArray[np.int64], " n"] | None, Int[NDArray[np.int64], "n M"]]]:
        """Yield list numbers (None where there are no lists) and codes, block by block."""
        learned = num_lists(self.export) > 0
        for packed in self._packed():
            codes = self.head.unpack(packed).numpy()
            yield (codes[:, 0], codes[:, 1:]) if learned else (None, codes)

    def vectors(self) -> Iterator[Float[NDArray[np.float32], "n D"]]:
        """Yield the vectors that documents are scored by, block by block, in the space of (mapped) queries."""
        if type(self.export) is FlatVectors:
            built = load_faiss().read_index(str(self.folder / "index"))
            for start in range(0, len(self), BLOCK):
                yield built.reconstruct_n(start, min(BLOCK, len(self) - start))
            return
        for packed in self._packed():
            with torch.no_grad():
                yield self.head.decode(self.head.unpack(packed)).float().numpy()

    def _packed(self) -> Iterator[UInt8[NDArray[np.uint8], "n size"]]:
        """Yield rows of `codes.u8`; read, not mapped, so that no page stays in memory."""
        with (self.folder / "codes.u8").open("rb") as file:
            while content := file.read(BLOCK * self.head.code_size):
                yield np.frombuffer(bytearray(content), dtype=np.uint8).reshape(-1, self.head.code_size)

    def documents(self) -> Iterator[list[Document]]:
        """Yield stored texts, block by block."""
        with (self.folder / "documents.jsonl").open("rb") as lines:
            for start in range(0, len(self), BLOCK):
                rows = [json.loads(next(lines)) for _ in range(min(BLOCK, len(self) - start))]
                yield [Document(row["_id"], row["title"], row["text"]) for row in rows]


# --- bundle ---


def write_bundle(folder: Path, out: Path, *, overwrite: bool = False) -> ConvertReport:
    """Write codebooks and codes of an index folder as a bundle folder.

    It holds `arrays.safetensors` (`codebooks`, `codes`, and where the head has them `rotation`, `centroids`, `lists`;
    `format`, `metric`, `nbits`, `additive`, `orthonormal`, `by_residual` in its metadata), `docid` (one id a line),
    `manifest.json`, and `head/` where queries must pass through it. `Bundle` says what each is.

    Args:
        folder: Index folder.
        out: Folder to write.
        overwrite: Replace an existing one.

    Raises:
        InputError: If the index is damaged or has no codebooks, or `out` exists.
    """
    source = CodeSource(folder)
    export = source.export
    if not isinstance(export, ProductCodebooks | AdditiveCodebooks):
        raise InputError(
            f"{folder} holds {type(export).__name__}, which has no codebooks to hand over. Write its vectors: "
            "--to npy, parquet or lance."
        )
    books, codewords = export.codebooks.shape[:2]
    nbits = (codewords - 1).bit_length()
    learned = isinstance(export, CoarseProductCodebooks | CoarseAdditiveCodebooks)
    code_type = "U8" if nbits <= 8 else "U16"
    streams = {
        "codes": _Stream(code_type, (len(source), books), (codes for _, codes in source.split_codes()))
    }
    if learned:
        lists = (numbers for numbers, _ in source.split_codes() if numbers is not None)
        streams["lists"] = _Stream("I32", (len(source),), lists)
    for name in ("codebooks", "rotation", "centroids"):
        value = source.arrays.get(name)
        if value is not None:
            streams[name] = _Stream("F32", value.shape, iter([value]))
    metadata = {
        "format": FORMAT,
        "metric": export.metric,
        "nbits": str(nbits),
        "additive": str(isinstance(export, AdditiveCodebooks)).lower(),
        "orthonormal": str(export.orthonormal).lower(),
        "by_residual": str(learned).lower(),
    }
    with publish_folder(out, "bundle", overwrite=overwrite, about=source.about) as temporary:
        _write_safetensors(temporary / ARRAYS, streams, metadata)
        shutil.copyfile(folder / "docid", temporary / "docid")
        source.copy_query_map(temporary)
    return ConvertReport(
        ntotal=len(source),
        dim=source.head.out_dim,
        metric=export.metric,
        bytes_before=source.head.code_size,
        bytes_after=books * (1 if nbits <= 8 else 2) + 4 * learned,
        rounding=0.0,
        lossless=True,
        note=f"codebooks and codes as they are, one code an entry{source.query_note}",
    )


@dataclass(frozen=True, slots=True)
class _Stream:
    """An array of known shape that comes in pieces."""

    kind: str  # of safetensors
    shape: tuple[int, ...]
    pieces: Iterator[NDArray[Any]]


TYPES = {"F32": "<f4", "I32": "<i4", "U16": "<u2", "U8": "<u1"}


def _write_safetensors(path: Path, streams: dict[str, _Stream], metadata: dict[str, str]) -> None:
    """Write arrays piece by piece; `safetensors` itself wants them whole in memory.

    Layout: length of the header (8 bytes, little-endian), header (JSON, padded to 8 bytes), arrays one after another
    (github.com/huggingface/safetensors, "Format").
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, stream in streams.items():
        start, end = end, end + np.dtype(TYPES[stream.kind]).itemsize * math.prod(stream.shape)
        header[name] = {"dtype": stream.kind, "shape": list(stream.shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for stream in streams.values():
            file.writelines(piece.astype(TYPES[stream.kind]).tobytes() for piece in stream.pieces)
        assert file.tell() == 8 + len(content) + end, "the pieces fill the shapes that the header states"


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the metadata and the arrays of a safetensors file.

    Raises:
        InputError: If it is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}. Write it again.") from None


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle back, checked; its arrays are read into memory.

    Raises:
        InputError: If it is not a bundle, is damaged, or its arrays contradict each other.
    """
    check_folder(folder, "bundle")
    path = folder / ARRAYS
    metadata, arrays = read_arrays(path)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} must be of format {FORMAT}, got {metadata.get('format')}. Write it again.")
    bundle = Bundle(
        metric=metadata["metric"],
        nbits=int(metadata["nbits"]),
        additive=metadata["additive"] == "true",
        orthonormal=metadata["orthonormal"] == "true",
        codebooks=arrays["codebooks"],
        rotation=arrays.get("rotation"),
        centroids=arrays.get("centroids"),
        codes=arrays["codes"],
        lists=arrays.get("lists"),
        ids=Lines(folder / "docid"),
    )
    if wrong := _contradictions(bundle):
        raise InputError(
            f"{path} contradicts itself: {', '.join(wrong)} do not fit the rest. Write it again."
        )
    return bundle


def _contradictions(bundle: Bundle) -> list[str]:
    """Return the names of arrays that do not fit the others."""
    books, codewords, width = bundle.codebooks.shape
    dim, count = width if bundle.additive else books * width, len(bundle.codes)
    wrong = []
    if bundle.codes.shape != (count, books) or (count and int(bundle.codes.max()) >= codewords):
        wrong.append("codes")
    if bundle.rotation is not None and bundle.rotation.shape != (dim, dim):
        wrong.append("rotation")
    if bundle.centroids is not None and bundle.centroids.shape[1:] != (dim,):
        wrong.append("centroids")
    if bundle.lists is not None and bundle.centroids is not None:
        inside = 0 <= bundle.lists.min(initial=0) <= bundle.lists.max(initial=0) < len(bundle.centroids)
        if bundle.lists.shape != (count,) or not inside:
            wrong.append("lists")
    elif (bundle.lists is None) != (bundle.centroids is None):
        wrong.append("lists")
    if len(bundle.ids) != count:
        wrong.append("docid")
    return wrong

"""Corpus -> codes on disk: streamed, by shards, resumable.

A corpus is cut into blocks of 4,096 documents by their place in it; a block is encoded by itself, so its bytes do not
depend on the shard or the interruption that it falls in. After every block the files are flushed and their sizes noted:
a stopped encoding goes on after its last whole block. Memory: 8 bytes a document.

Shapes: n documents, D dimensions; codes are packed bytes, (n, code_size).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from retriever import Document, DualEncoder, InputError, Precision, embed_documents
from retriever.folder import read_json, write_json

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["EncodedCorpus", "Shard", "count_blocks", "encode_corpus"]

BLOCK = 4096  # documents sorted by length and encoded together
SAMPLE = 256  # vectors kept for the parity check and the reconstruction error
CPU_BATCH = (
    16  # documents a forward pass in fp32 on a CPU, where the number changes the last bits of a vector
)
STATE = "encoding.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `number` (from 1) of `count` contiguous parts of a corpus, cut between blocks."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise InputError(
                f"a shard is I/N with I from 1 to N, got {self.number}/{self.count}. Count the shards from 1."
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that `I/N` means.

        Raises:
            InputError: If it has another form.
        """
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal()):
            raise InputError(f"a shard is I/N, for example 3/8, got {text!r}.")
        return cls(int(number), int(count))

    def rows(self, total: int) -> tuple[int, int]:
        """Return the first row and the row after the last one of `total` documents.

        Raises:
            InputError: If there are more shards than blocks.
        """
        blocks = count_blocks(total)
        if self.count > blocks:
            raise InputError(
                f"{total} documents make {blocks} blocks of {BLOCK}, too few for {self.count} shards. "
                f"Use at most {blocks} shards."
            )
        edges = [min(total, blocks * part // self.count * BLOCK) for part in (self.number - 1, self.number)]
        return edges[0], edges[1]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def count_blocks(total: int) -> int:
    """Return the blocks of `total` documents: as many shards are possible."""
    return -(-total // BLOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedCorpus:
    """What encoding leaves: files in `folder`, and measurements.

    Attributes:
        folder: Holds `codes.u8`, `docid`, and, unless left out, `documents.jsonl` with `documents.offsets`.
        ntotal: Documents n.
        sample: Some uncompressed vectors.
        embed_seconds: Texts to vectors.
        assign_seconds: Vectors to codes.
    """

    folder: Path
    ntotal: int
    sample: Float[Tensor, "s D"]
    embed_seconds: float
    assign_seconds: float

    @property
    def files(self) -> list[str]:
        """Names of the files that belong into an index folder."""
        return [name for name in FILES if (self.folder / name).is_file()]


FILES = ("codes.u8", "docid", "documents.jsonl", "documents.offsets")


def encode_corpus(
    model: DualEncoder,
    documents: Iterable[Document],
    folder: Path,
    *,
    batch_size: int = 64,
    precision: Precision = "fp32",
    store_texts: bool = True,
    progress: bool = True,
    total: int | None = None,
    description: dict[str, Any] | None = None,
) -> EncodedCorpus:
    """Write codes, ids and (unless left out) texts of a corpus into `folder`, or go on where that was stopped.

    Args:
        model: Towers and head.
        documents: The documents, in index order. Those that `folder` holds already are passed over.
        folder: Folder to write into; made if it is not there.
        batch_size: Documents a forward pass; in fp32 on a CPU always 16, so that the bytes do not depend on it.
        precision: Arithmetic of the tower.
        store_texts: Keep the texts, where documents are texts, beside the codes, so that search can show them.
        progress: Show a bar with documents a second and the time left.
        total: Number of documents, for the bar.
        description: What is encoded and how; the beginning of another encoding is refused.

    Raises:
        InputError: If there is no document, `folder` holds the beginning of something else, or another process
            writes there.
    """
    device, store_texts = model.device, store_texts and not model.takes_vectors
    if precision == "fp32" and device.type == "cpu":
        batch_size = CPU_BATCH
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in FILES if store_texts or not name.startswith("documents.")]
    with (
        _only_writer(folder),
        _removing_empty(folder),
        tqdm(desc="encode", unit="doc", disable=not progress, total=total) as bar,
    ):
        state = _resume(folder, names, {**(description or {}), "store_texts": store_texts})
        remaining = _after(_blocks(iter(documents)), folder, state)
        bar.update(state["rows"])
        with _appending(folder, names) as files:
            for block in remaining:
                start = time.perf_counter()
                vectors = embed_documents(model, block, batch_size=batch_size, precision=precision)
                embedded = time.perf_counter()
                files["codes.u8"].write(model.head.pack(model.compress(vectors.to(device))).tobytes())
                state["assign_seconds"] += time.perf_counter() - embedded
                state["embed_seconds"] += embedded - start
                files["docid"].writelines(f"{document.id}\n".encode() for document in block)
                if store_texts:
                    _store(block, files["documents.jsonl"], files["documents.offsets"])
                if not state["rows"]:
                    save_file({"sample": vectors[:SAMPLE].contiguous()}, folder / "sample.safetensors")
                state["rows"] += len(block)
                state["digest"] = _digest(state["digest"], block)
                _note(folder, state, files)
                bar.update(len(block))
        if not state["rows"]:
            raise InputError("the corpus holds no documents. Give a corpus with at least one document.")
    return EncodedCorpus(
        folder=folder,
        ntotal=state["rows"],
        sample=load_file(folder / "sample.safetensors")["sample"],
        embed_seconds=state["embed_seconds"],
        assign_seconds=state["assign_seconds"],
    )


def _store(documents: Iterable[Document], lines: Any, offsets: Any) -> None:
    """Append documents as JSON lines, and the byte offset of every line as little-endian uint64."""
    position = lines.tell()
    for document in documents:
        line = json.dumps(
            {"_id": document.id, "title": document.title, "text": document.text}, ensure_ascii=False
        )
        offsets.write(position.to_bytes(8, "little"))
        position += lines.write(line.encode() + b"\n")


def _blocks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while block := list(islice(documents, BLOCK)):
        yield block


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, which ends with the process that holds it."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing {folder}. Wait for it, or stop it.") from None
        yield


@contextmanager
def _removing_empty(folder: Path) -> Iterator[None]:
    """Remove the folder after an error before its first whole block."""
    try:
        yield
    except BaseException:
        if not (folder / STATE).is_file():
            shutil.rmtree(folder)
        raise


def _resume(folder: Path, names: list[str], description: dict[str, Any]) -> dict[str, Any]:
    """Return the state after the last whole block, and cut the files there."""
    fresh: dict[str, Any] = {
        "description": description,
        "rows": 0,
        "digest": "",
        "embed_seconds": 0.0,
        "assign_seconds": 0.0,
        "sizes": dict.fromkeys(names, 0),
    }
    state = read_json(folder / STATE) if (folder / STATE).is_file() else fresh
    before = state["description"]
    for key in {**before, **description}:
        if before.get(key) != description.get(key):
            raise InputError(
                f"{folder} holds the beginning of another encoding: its {key} is {before.get(key)!r}, here it is "
                f"{description.get(key)!r}. Delete the folder, or write to another one."
            )
    for name, size in state["sizes"].items():
        with (folder / name).open("ab") as file:
            if file.tell() < size:
                raise InputError(
                    f"{folder / name} has {file.tell()} bytes instead of {size}. Delete {folder} and begin again."
                )
            file.truncate(size)
    return state


@contextmanager
def _appending(folder: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    files = {name: (folder / name).open("ab") for name in names}
    try:
        yield files
    finally:
        for file in files.values():
            file.close()


def _note(folder: Path, state: dict[str, Any], files: dict[str, Any]) -> None:
    """Make a block permanent: files first, then the state that counts it, by one rename."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    state["sizes"] = {name: file.tell() for name, file in files.items()}
    temporary = folder / f"{STATE}.tmp"
    write_json(temporary, state)
    temporary.replace(folder / STATE)


def _after(blocks: Iterator[list[Document]], folder: Path, state: dict[str, Any]) -> Iterator[list[Document]]:
    """Pass over blocks that are encoded already, and check that they hold the same documents."""
    digest, rows = "", 0
    while rows < state["rows"]:
        block = next(blocks, [])
        digest, rows = _digest(digest, block), rows + len(block)
        if not block or rows > state["rows"]:
            break
    if (digest, rows) != (state["digest"], state["rows"]):
        raise InputError(
            f"the corpus is not the one whose first {state['rows']} documents are in {folder}. Delete that folder "
            "to begin again."
        )
    yield from blocks


def _digest(before: str, block: list[Document]) -> str:
    """Return the SHA-256 of documents after those of another digest."""
    content = hashlib.sha256(json.dumps([before, *([d.id, d.title, d.text] for d in block)]).encode())
    for document in block:
        if document.vector is not None:
            content.update(document.vector.tobytes())
    return content.hexdigest()

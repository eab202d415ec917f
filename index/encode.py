"""Corpus -> codes on disk, streamed: memory does not grow with the corpus beyond its identifiers.

Shapes: n documents, D dimensions; codes are packed bytes, (n, code_size).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from retriever import Document, DualEncoder, InputError, Precision, embed_documents

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["EncodedCorpus", "encode_corpus"]

CHUNK = 4096  # documents sorted by length and encoded together
SAMPLE = 256  # vectors kept for the parity check and the reconstruction error


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


def encode_corpus(
    model: DualEncoder,
    documents: Iterable[Document],
    folder: Path,
    *,
    batch_size: int = 64,
    precision: Precision = "fp32",
    store_texts: bool = True,
    progress: bool = True,
) -> EncodedCorpus:
    """Write codes, ids and (unless left out) texts of a corpus into `folder`.

    Args:
        model: Towers and head.
        documents: The corpus, in index order.
        folder: Existing folder to write into.
        batch_size: Documents a forward pass.
        precision: Arithmetic of the tower.
        store_texts: Keep the texts beside the codes, so that search can show them.
        progress: Show a bar.
    """
    device = next(model.parameters()).device
    ntotal, embed_seconds, assign_seconds = 0, 0.0, 0.0
    sample: list[Tensor] = []
    with (
        (folder / "codes.u8").open("wb") as codes_file,
        (folder / "docid").open("w", encoding="utf-8") as ids_file,
        _TextWriter(folder if store_texts else None) as texts,
        tqdm(desc="encode", unit="doc", disable=not progress) as bar,
    ):
        for chunk in _chunks(documents, CHUNK):
            start = time.perf_counter()
            vectors = embed_documents(model, chunk, batch_size=batch_size, precision=precision)
            embedded = time.perf_counter()
            codes = model.compress(vectors.to(device))
            codes_file.write(model.head.pack(codes).tobytes())
            assign_seconds += time.perf_counter() - embedded
            embed_seconds += embedded - start
            ids_file.writelines(f"{document.id}\n" for document in chunk)
            texts.write(chunk)
            if ntotal < SAMPLE:
                sample.append(vectors[: SAMPLE - ntotal])
            ntotal += len(chunk)
            bar.update(len(chunk))
    if not ntotal:
        raise InputError("the corpus holds no documents. Give a corpus with at least one document.")
    return EncodedCorpus(
        folder=folder,
        ntotal=ntotal,
        sample=torch.cat(sample),
        embed_seconds=embed_seconds,
        assign_seconds=assign_seconds,
    )


def _chunks(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while chunk := list(islice(iterator, size)):
        yield chunk


class _TextWriter:
    """Writes documents as JSON lines and the byte offset of every line as little-endian uint64."""

    def __init__(self, folder: Path | None) -> None:
        self._lines = (folder / "documents.jsonl").open("wb") if folder else None
        self._offsets = (folder / "documents.offsets").open("wb") if folder else None
        self._position = 0

    def __enter__(self) -> _TextWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._lines, self._offsets):
            if file:
                file.close()

    def write(self, documents: list[Document]) -> None:
        """Append documents."""
        if self._lines is None or self._offsets is None:
            return
        lines = [
            json.dumps({"_id": d.id, "title": d.title, "text": d.text}, ensure_ascii=False).encode() + b"\n"
            for d in documents
        ]
        starts = self._position + np.cumsum([0, *map(len, lines)])
        self._offsets.write(starts[:-1].astype("<u8").tobytes())
        self._lines.writelines(lines)
        self._position = int(starts[-1])

"""What an export will take, predicted from a few documents."""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from index._faiss import load_faiss
from index.artifact import load_model
from index.config import IndexConfig
from index.encode import encode_corpus
from retriever import Document, Precision

__all__ = ["ExportEstimate", "estimate_export"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportEstimate:
    """What an export will take, from encoding a few documents."""

    documents: int
    seconds: float  # of encoding, on this device, by one process
    memory_bytes: (
        int  # peak of the process that builds the index: the model, and the index twice while it is filled
    )
    code_bytes: int  # codes of all documents
    text_bytes: int  # stored texts and their offsets, 0 without
    index_bytes: int  # FAISS file
    disk_bytes: int  # the folder, and the unfinished one that it grows from

    def __str__(self) -> str:
        gigabytes = {name: f"{getattr(self, name) / 1e9:,.3f} GB" for name in SIZES}
        return (
            f"{self.documents:,} documents: encoding takes {self.seconds / 3600:,.2f} hours "
            f"({self.documents / self.seconds:,.0f} documents/s)\n"
            f"  memory {gigabytes['memory_bytes']}, disk {gigabytes['disk_bytes']}: codes {gigabytes['code_bytes']}, "
            f"texts {gigabytes['text_bytes']}, index {gigabytes['index_bytes']}"
        )


SIZES = ("memory_bytes", "disk_bytes", "code_bytes", "text_bytes", "index_bytes")


def estimate_export(
    model_folder: str | Path,
    documents: Iterable[Document],
    *,
    total: int,
    config: IndexConfig,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: str | None = None,
    store_texts: bool = True,
    sample: int = 512,
) -> ExportEstimate:
    """Encode the first documents and predict what the whole corpus takes; nothing is left on disk.

    Args:
        model_folder: See `export_index`, as the rest.
        documents: The corpus; only its first documents are read.
        total: Number of its documents.
        config: Kind of the index.
        batch_size: Documents a forward pass.
        precision: Arithmetic of the tower.
        device: torch device.
        store_texts: Keep the texts.
        sample: Documents to encode.
    """
    model_folder = Path(model_folder)
    model = load_model(model_folder, device)
    builder = config.builder(model.head.export())
    some = list(islice(documents, sample))
    options: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        encode_corpus(model, some[:64], Path(folder) / "warm", **options)
        corpus = encode_corpus(model, some, Path(folder) / "part", store_texts=store_texts, **options)
        sizes = {name: (corpus.folder / name).stat().st_size for name in corpus.files}
        codes = np.fromfile(corpus.folder / "codes.u8", dtype=np.uint8).reshape(corpus.ntotal, -1)
    export = builder.prepare(model.head, codes)
    texts = (sizes.get("documents.jsonl", 0) + sizes.get("documents.offsets", 0)) * total // corpus.ntotal
    full, half = (
        len(load_faiss().serialize_index(builder.build(export, part)))
        for part in (codes, codes[: len(codes) // 2])
    )
    per_document = (full - half) / (len(codes) - len(codes) // 2) if len(codes) > 1 else full
    index_bytes = int(full + per_document * (total - len(codes))) + builder.extra_bytes(export, total)
    code_bytes = total * model.head.code_size
    ids = sizes["docid"] * total // corpus.ntotal
    return ExportEstimate(
        documents=total,
        seconds=(corpus.embed_seconds + corpus.assign_seconds) * total / corpus.ntotal,
        memory_bytes=resident_bytes() + 2 * index_bytes + 8 * total,
        code_bytes=code_bytes,
        text_bytes=texts,
        index_bytes=index_bytes,
        disk_bytes=index_bytes + code_bytes + texts + ids + folder_bytes(model_folder),
    )


def resident_bytes() -> int:
    """Return the largest memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

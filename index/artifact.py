"""Model folder + corpus -> index folder, published only when FAISS agrees with the model.

The folder: `index` (FAISS file) and `docid` (one id a line) as pyserini reads them, `index_infos.json` with
autofaiss's keys, `encoder/` (the query tower), `documents.jsonl` with offsets (unless left out), `experiment.yaml`
of the training, `manifest.json` with checksums.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from index._faiss import load_faiss
from index.builders import FaissIndex, IndexBuilder, probing_all
from index.config import IndexConfig
from index.encode import EncodedCorpus, encode_corpus
from index.parity import assert_parity
from retriever import Document, DualEncoder, Precision, model_fingerprint
from retriever.folder import publish_folder, write_json
from retriever.heads import CompressionHead, FaissExport

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ExportReport", "export_index"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """Measurements of an export; seconds are wall clock."""

    ntotal: int
    code_size: int  # bytes a document
    index_bytes: int  # size of the FAISS file
    embed_seconds: float
    assign_seconds: float
    build_seconds: float  # copying codebooks and codes into FAISS
    parity: float  # largest difference between a FAISS score and the model's


def export_index(
    model_folder: Path,
    documents: Iterable[Document],
    out: Path,
    *,
    config: IndexConfig,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: str | None = None,
    store_texts: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> ExportReport:
    """Encode a corpus with a trained model and publish its index folder.

    Args:
        model_folder: What `endex train` wrote.
        documents: The corpus.
        out: Index folder to publish.
        config: Kind of the index.
        batch_size: Documents a forward pass.
        precision: Arithmetic of the tower.
        device: torch device; by default a GPU where there is one.
        store_texts: Keep the texts, so that search can show them.
        overwrite: Replace an existing folder once the new one is complete.
        progress: Show a bar.

    Raises:
        InputError: If the model or corpus is faulty, the kind does not fit the head, or `out` exists.
        ParityError: If FAISS's scores are not the model's.
    """
    fingerprint = model_fingerprint(model_folder)
    model = DualEncoder.load(model_folder).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    export = model.head.export()
    builder = config.builder(export)
    about: dict[str, Any] = {"model": fingerprint, "versions": library_versions()}
    with publish_folder(out, "index", overwrite=overwrite, about=about) as folder:
        corpus = encode_corpus(
            model,
            documents,
            folder,
            batch_size=batch_size,
            precision=precision,
            store_texts=store_texts,
            progress=progress,
        )
        report = _write_index(folder, corpus, model.head, builder, export)
        model.query_encoder.save(folder / "encoder")
        experiment = model_folder / "experiment.yaml"
        if experiment.is_file():
            (folder / "experiment.yaml").write_bytes(experiment.read_bytes())
        about.update(
            ntotal=report.ntotal, dim=model.dim, code_size=report.code_size, index=type(builder).__name__
        )
    return report


def _write_index(
    folder: Path, corpus: EncodedCorpus, head: CompressionHead, builder: IndexBuilder, export: FaissExport
) -> ExportReport:
    """Build from the codes on disk, prove parity, write `index` and `index_infos.json`."""
    codes_path = folder / "codes.u8"
    codes = np.memmap(codes_path, dtype=np.uint8, mode="r").reshape(corpus.ntotal, head.code_size)
    start = time.perf_counter()
    built = builder.build(export, codes)
    build_seconds = time.perf_counter() - start
    with probing_all(built):
        parity = assert_parity(built, head, codes, corpus.sample)
    load_faiss().write_index(built, str(folder / "index"))
    del codes
    codes_path.unlink()  # the FAISS file holds them
    report = ExportReport(
        ntotal=corpus.ntotal,
        code_size=head.code_size,
        index_bytes=(folder / "index").stat().st_size,
        embed_seconds=corpus.embed_seconds,
        assign_seconds=corpus.assign_seconds,
        build_seconds=build_seconds,
        parity=parity,
    )
    write_json(folder / "index_infos.json", _infos(built, head, corpus, report))
    return report


def _infos(
    built: FaissIndex, head: CompressionHead, corpus: EncodedCorpus, report: ExportReport
) -> dict[str, object]:
    """Return the report under autofaiss's keys (those that need no uncompressed copy of the corpus), and ours."""
    queries: NDArray[np.float32] = corpus.sample[:100].numpy()
    milliseconds = []
    for row in range(len(queries)):
        start = time.perf_counter()
        built.search(queries[row : row + 1], min(40, report.ntotal))
        milliseconds.append(1000 * (time.perf_counter() - start))
    with torch.no_grad():
        device = next(iter(head.state_dict().values()), corpus.sample).device
        sample = corpus.sample.to(device)
        error = (head.decode(head.encode(sample)) - sample).norm(dim=1) / sample.norm(dim=1)
    return {
        "size in bytes": report.index_bytes,
        "avg_search_speed_ms": float(np.mean(milliseconds)),
        "99p_search_speed_ms": float(np.percentile(milliseconds, 99)),
        "reconstruction error %": 100 * error.mean().item(),
        "nb vectors": report.ntotal,
        "vectors dimension": head.dim,
        "compression ratio": 4 * head.dim * report.ntotal / report.index_bytes,
        "code_size": report.code_size,
        "embed_seconds": report.embed_seconds,
        "assign_seconds": report.assign_seconds,
        "build_seconds": report.build_seconds,
        "parity": report.parity,
    }


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that shape an artifact."""
    versions = {"faiss": str(load_faiss().__version__)}
    for name in ("endex", "torch", "transformers", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            versions[name] = "unknown"
    return versions

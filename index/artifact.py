"""Model folder + corpus -> index folder, published only when FAISS agrees with the model.

The folder: `index` (FAISS file) and `docid` (one id a line) as pyserini reads them, `index_infos.json` with
autofaiss's keys, `codes.u8` and `head/` (from which any other form can be built), `encoder/` (the query tower),
`documents.jsonl` with offsets (unless left out), `sample.safetensors` (vectors for the proof of parity),
`experiment.yaml` of the training, `manifest.json` with checksums. A shard folder is the same without `index`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from index._faiss import load_faiss
from index.builders import (
    CascadeBuilder,
    IndexBuilder,
    IVFPQBuilder,
    probing_all,
    search_index,
)
from index.config import IndexConfig
from index.decoders import save_decoders
from index.encode import EncodedCorpus, Shard, encode_corpus
from index.on_disk import LISTS, build_on_disk
from index.parity import Search, prove_parity
from index.stages import DECODERS, Cascade, Widths
from retriever import Document, DualEncoder, InputError, Precision, map_queries, model_fingerprint
from retriever.folder import publish_folder, refuse_existing, write_json
from retriever.heads import CompressionHead, NeuralCodec

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "ExportReport",
    "ShardReport",
    "describe_index",
    "export_index",
    "export_shard",
    "library_versions",
    "load_model",
    "write_index",
]


INDEX_FILES = ("index", LISTS, DECODERS)  # what a search reads beside the codes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """Measurements of an export; seconds are wall clock."""

    ntotal: int
    code_size: int  # bytes a document
    index_bytes: int  # size of the FAISS files, and of a cascade's decoders
    embed_seconds: float
    assign_seconds: float
    build_seconds: float  # copying codebooks and codes into FAISS; also fitting a cascade's decoders
    parity: float  # largest difference between a FAISS score and the model's
    overlap: float  # share of the model's 20 best documents among FAISS's, 1 for an exact form


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """Measurements of a shard; seconds are wall clock."""

    ntotal: int
    code_size: int  # bytes a document
    embed_seconds: float
    assign_seconds: float


def export_index(
    model_folder: str | Path,
    documents: Iterable[Document],
    out: str | Path,
    *,
    config: IndexConfig,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: str | None = None,
    store_texts: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    total: int | None = None,
) -> ExportReport:
    """Encode a corpus with a trained model and publish its index folder.

    Codes are written to `OUT.part` first; the same call goes on there after an interruption.

    Args:
        model_folder: What `endex train` wrote.
        documents: The corpus.
        out: Index folder to publish.
        config: Kind of the index.
        batch_size: Documents a forward pass; see `encode_corpus`.
        precision: Arithmetic of the tower.
        device: torch device; by default a GPU where there is one.
        store_texts: Keep the texts, so that search can show them.
        overwrite: Replace an existing folder once the new one is complete.
        progress: Show a bar.
        total: Number of documents, for the bar.

    Raises:
        InputError: If the model or corpus is faulty, the kind does not fit the head, or `out` exists.
        ParityError: If FAISS's scores are not the model's.
    """
    model_folder, out = Path(model_folder), Path(out)
    if not overwrite:
        refuse_existing(out)
    fingerprint = model_fingerprint(model_folder)
    model = load_model(model_folder, device)
    builder = config.builder(model.head.export())
    corpus = encode_corpus(
        model,
        documents,
        part_folder(out),
        batch_size=batch_size,
        precision=precision,
        store_texts=store_texts,
        progress=progress,
        total=total,
        description={"model": fingerprint, "precision": precision, "shard": None},
    )
    about: dict[str, Any] = {"model": fingerprint, "versions": library_versions()}
    with publish_folder(out, "index", overwrite=overwrite, about=about) as folder:
        _take(corpus, folder)
        _copy_model(model_folder, model, folder)
        report = write_index(folder, model.head, builder, corpus.sample, corpus)
        about.update(describe_index(report, model.head, builder))
    shutil.rmtree(corpus.folder)
    return report


def export_shard(
    model_folder: str | Path,
    documents: Iterable[Document],
    out: str | Path,
    *,
    shard: Shard,
    total: int,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: str | None = None,
    store_texts: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> ShardReport:
    """Encode a shard of a corpus and publish its folder, which `merge` joins with the others.

    Args:
        model_folder: What `endex train` wrote.
        documents: The documents of this shard: rows `shard.rows(total)` of the corpus.
        out: Shard folder to publish.
        shard: Which part of the corpus.
        total: Documents of the whole corpus.
        batch_size: See `export_index`, as the rest.
        precision: Arithmetic of the tower.
        device: torch device.
        store_texts: Keep the texts.
        overwrite: Replace an existing folder once the new one is complete.
        progress: Show a bar.

    Raises:
        InputError: If the model or corpus is faulty, the documents are not as many as the shard has, or `out` exists.
    """
    model_folder, out = Path(model_folder), Path(out)
    if not overwrite:
        refuse_existing(out)
    fingerprint = model_fingerprint(model_folder)
    model = load_model(model_folder, device)
    start, stop = shard.rows(total)
    place = {"shard": str(shard), "documents": total}
    corpus = encode_corpus(
        model,
        documents,
        part_folder(out),
        batch_size=batch_size,
        precision=precision,
        store_texts=store_texts,
        progress=progress,
        total=stop - start,
        description={"model": fingerprint, "precision": precision, **place},
    )
    if corpus.ntotal != stop - start:
        raise InputError(
            f"shard {shard} of {total} documents has rows {start} to {stop}, but {corpus.ntotal} documents came. "
            "The corpus has changed: delete the shards and begin again."
        )
    about: dict[str, Any] = {"model": fingerprint, "versions": library_versions()}
    about |= {**place, "precision": precision, "ntotal": corpus.ntotal, "code_size": model.head.code_size}
    with publish_folder(out, "shard", overwrite=overwrite, about=about) as folder:
        _take(corpus, folder)
        if shard.number == 1:  # one of the shards brings the model
            _copy_model(model_folder, model, folder)
    shutil.rmtree(corpus.folder)
    return ShardReport(
        ntotal=corpus.ntotal,
        code_size=model.head.code_size,
        embed_seconds=corpus.embed_seconds,
        assign_seconds=corpus.assign_seconds,
    )


def part_folder(out: Path) -> Path:
    """Return where an unfinished encoding of `out` lies."""
    return out.with_name(f"{out.name}.part")


def load_model(model_folder: Path, device: str | None) -> DualEncoder:
    """Return a model on a device; by default a GPU where there is one."""
    return DualEncoder.load(model_folder).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _take(corpus: EncodedCorpus, folder: Path) -> None:
    """Put the files of an encoding into a folder, without a copy where the file system can."""
    for name in (*corpus.files, "sample.safetensors"):
        try:
            os.link(corpus.folder / name, folder / name)
        except OSError:
            shutil.copyfile(corpus.folder / name, folder / name)


def _copy_model(model_folder: Path, model: DualEncoder, folder: Path) -> None:
    """Write what answers queries and reads codes: query tower, head, experiment."""
    model.query_encoder.save(folder / "encoder")
    shutil.copytree(model_folder / "head", folder / "head")
    experiment = model_folder / "experiment.yaml"
    if experiment.is_file():
        shutil.copyfile(experiment, folder / "experiment.yaml")


def write_index(
    folder: Path,
    head: CompressionHead,
    builder: IndexBuilder,
    sample: Float[Tensor, "s D"],
    corpus: EncodedCorpus | None = None,
) -> ExportReport:
    """Build from the codes in a folder, prove parity, write `index` and `index_infos.json`.

    Codes stay beside the index, so that it can be merged, changed and built in another form without a model;
    those of kind "flat" do not, for they are the index.

    Args:
        folder: Holds `codes.u8`.
        head: The head that made them.
        builder: Index family.
        sample: Vectors to search with.
        corpus: Measurements of the encoding, where there was one.
    """
    codes_path = folder / "codes.u8"
    codes = np.memmap(codes_path, dtype=np.uint8, mode="r").reshape(-1, head.code_size)
    start = time.perf_counter()
    export = builder.prepare(head, codes)
    if isinstance(builder, IVFPQBuilder) and builder.on_disk:
        built = build_on_disk(builder, export, codes, folder)
    else:
        built = builder.build(export, codes)
    build_seconds = time.perf_counter() - start
    search: Search = partial(search_index, built)
    if isinstance(builder, CascadeBuilder) and isinstance(export, NeuralCodec):
        save_decoders(folder / DECODERS, export)
        search = Cascade(built, head, codes, export, _widths(builder)).search
    with probing_all(built):
        proof = prove_parity(builder, built, head, codes, sample, search)
    load_faiss().write_index(built, str(folder / "index"))
    report = ExportReport(
        ntotal=len(codes),
        code_size=head.code_size,
        index_bytes=sum((folder / name).stat().st_size for name in INDEX_FILES if (folder / name).is_file()),
        embed_seconds=corpus.embed_seconds if corpus else 0.0,
        assign_seconds=corpus.assign_seconds if corpus else 0.0,
        build_seconds=build_seconds,
        parity=proof.difference,
        overlap=proof.overlap,
    )
    del codes
    if builder.kind == "flat":
        codes_path.unlink()
    write_json(folder / "index_infos.json", _infos(search, head, sample, report))
    return report


def describe_index(report: ExportReport, head: CompressionHead, builder: IndexBuilder) -> dict[str, Any]:
    """Return the entries of an index folder's manifest."""
    stages = {"cascade": asdict(_widths(builder))} if isinstance(builder, CascadeBuilder) else {}
    return {
        "ntotal": report.ntotal,
        "dim": head.dim,
        "code_size": report.code_size,
        "index": type(builder).__name__,
        **stages,
    }


def _widths(builder: CascadeBuilder) -> Widths:
    return Widths(shortlist=builder.shortlist, rerank=builder.rerank)


def _infos(
    search: Search, head: CompressionHead, vectors: Float[Tensor, "s D"], report: ExportReport
) -> dict[str, object]:
    """Return the report under autofaiss's keys (those that need no uncompressed copy of the corpus), and ours."""
    mapped = map_queries(head, vectors)
    queries: NDArray[np.float32] = mapped[:100].numpy()
    milliseconds = []
    for row in range(len(queries)):
        start = time.perf_counter()
        search(queries[row : row + 1], min(40, report.ntotal))
        milliseconds.append(1000 * (time.perf_counter() - start))
    with torch.no_grad():
        device = next(iter(head.state_dict().values()), vectors).device
        decoded = head.decode(head.encode(vectors.to(device))).cpu()  # documents are mapped as queries are
        error = (decoded - mapped).norm(dim=1) / mapped.norm(dim=1)
    return {
        "size in bytes": report.index_bytes,
        "avg_search_speed_ms": float(np.mean(milliseconds)),
        "99p_search_speed_ms": float(np.percentile(milliseconds, 99)),
        "reconstruction error %": 100 * error.mean().item(),
        "nb vectors": report.ntotal,
        "vectors dimension": head.dim,
        "index dimension": head.out_dim,
        "compression ratio": 4 * head.dim * report.ntotal / report.index_bytes,
        "code_size": report.code_size,
        "embed_seconds": report.embed_seconds,
        "assign_seconds": report.assign_seconds,
        "build_seconds": report.build_seconds,
        "parity": report.parity,
        "overlap@20": report.overlap,
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

"""`endex export MODEL CORPUS --out DIR [--shard I/N] [--dry_run]`."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from index import (
    ExportReport,
    IndexConfig,
    Shard,
    ShardReport,
    count_blocks,
    estimate_export,
    export_index,
    export_shard,
    merge_indexes,
)
from launch.arguments import parse, verb_parser
from retriever import Precision, read_corpus
from retriever.folder import MANIFEST, refuse_existing
from retriever.sources import count_documents

__all__ = ["describe_report", "run"]


def run(words: list[str]) -> int:
    """Encode a corpus, or a shard of it, and publish an index or shard folder."""
    parser = verb_parser(
        "export",
        "Encode a corpus to codes with a trained model and put them into FAISS as they are. Started by accelerate or "
        "torchrun, every process encodes a shard, and the first one merges them. A stopped export goes on where it "
        "was when it is called again.",
    )
    parser.add_argument("model", type=str, help="Model folder (best/ or last/ of a run).")
    parser.add_argument(
        "corpus",
        type=str,
        help="Folder in the BEIR layout, corpus.jsonl[.gz], or a Hub data set; a vector file or a folder of them.",
    )
    parser.add_argument("--out", type=str, required=True, help="Index (or shard) folder to write.")
    parser.add_class_arguments(IndexConfig, "index")
    parser.add_argument(
        "--shard",
        type=str | None,
        default=None,
        help="I/N: encode only part I of N; join the parts with endex merge.",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Documents a forward pass.")
    parser.add_argument("--precision", type=Precision, default="fp32", help="Arithmetic of the tower.")
    parser.add_argument(
        "--device", type=str | None, default=None, help="torch device; a GPU if there is one."
    )
    parser.add_argument(
        "--store_texts", type=bool, default=True, help="Keep the texts, so that search shows them."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing folder.")
    parser.add_argument(
        "--dry_run", action="store_true", help="Encode a few documents and predict time, memory and disk."
    )
    options = parse(parser, words)
    model, out = Path(options.model), Path(options.out)
    shard = Shard.parse(options.shard) if options.shard else None
    encoding = {
        "batch_size": options.batch_size,
        "precision": options.precision,
        "device": options.device,
        "store_texts": options.store_texts,
        "overwrite": options.overwrite,
        "progress": not options.json,
    }
    if options.dry_run:
        total = count_documents(options.corpus)
        estimate = estimate_export(
            model,
            read_corpus(options.corpus),
            total=total,
            config=options.index,
            **{name: encoding[name] for name in ("batch_size", "precision", "device", "store_texts")},
        )
        print(json.dumps(asdict(estimate)) if options.json else estimate)
    elif shard:
        total = count_documents(options.corpus)
        print(_report(options, _export_shard(options, model, out, shard, total, encoding)))
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        report = _export_on_all(options, model, out, encoding)
        if report:
            print(_report(options, report))
    else:  # a Hub data set is not streamed twice, only for the bar
        known = count_documents(options.corpus) if Path(options.corpus).exists() else None
        report = export_index(
            model,
            read_corpus(options.corpus),
            out,
            config=options.index,
            total=known,
            **encoding,
        )
        print(_report(options, report))
    return 0


def _export_shard(
    options: Any, model: Path, out: Path, shard: Shard, total: int, encoding: dict[str, Any]
) -> ShardReport:
    documents = read_corpus(options.corpus, *shard.rows(total))
    return export_shard(model, documents, out, shard=shard, total=total, **encoding)


def _export_on_all(options: Any, model: Path, out: Path, encoding: dict[str, Any]) -> ExportReport | None:
    """Encode a shard in every process of an accelerate or torchrun program; the first one waits for all and merges.

    No collective is called, so none can time out where one machine is slower than another. A process that fails
    ends the others by its launcher.
    """
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not options.overwrite:
        refuse_existing(out)
    total = count_documents(options.corpus)
    folders = shard_folders(out, min(processes, count_blocks(total)))
    # an earlier call may have finished the shard
    if rank < len(folders) and not (folders[rank] / MANIFEST).is_file():
        encoding = {**encoding, "overwrite": True, "progress": encoding["progress"] and rank == 0}
        if encoding["device"] is None and torch.cuda.is_available():
            encoding["device"] = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
        shard = Shard(rank + 1, len(folders))
        _export_shard(options, model, folders[rank], shard, total, encoding)
    if rank:
        return None
    while not all((folder / MANIFEST).is_file() for folder in folders):
        time.sleep(0.2)
    report = merge_indexes(folders, out, config=options.index, overwrite=options.overwrite)
    shutil.rmtree(folders[0].parent)
    return report


def shard_folders(out: Path, count: int) -> list[Path]:
    """Return where the processes of one export write their shards."""
    return [out.with_name(f"{out.name}.shards") / f"{number}-of-{count}" for number in range(1, count + 1)]


def _report(options: Any, report: ExportReport | ShardReport) -> str:
    if options.json:
        return json.dumps({"out": options.out, **asdict(report)})
    return describe_report(options.out, report)


def describe_report(out: str, report: ExportReport | ShardReport) -> str:
    """Return what was written, for reading."""
    seconds = f"texts to vectors {report.embed_seconds:.2f} s, vectors to codes {report.assign_seconds:.3f} s"
    if isinstance(report, ShardReport):
        return f"{out}: {report.ntotal:,} documents, {report.code_size} bytes each\n  {seconds}"
    proof = f"{report.overlap:.1%} of the model's 20 best documents are among FAISS's"
    if report.parity < 1e-4:
        found = "" if report.overlap == 1 else f"; {proof}"
        proof = f"FAISS scores = model scores within {report.parity:.1e}{found}"
    return (
        f"{out}: {report.ntotal:,} documents, {report.code_size} bytes each, index file "
        f"{report.index_bytes:,} bytes\n"
        f"  {seconds}, codes into FAISS {report.build_seconds:.4f} s\n"
        f"  {proof}"
    )

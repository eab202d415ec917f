"""`endex export MODEL CORPUS --out DIR`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from index import IndexConfig, export_index
from launch.arguments import parse, verb_parser
from retriever import Precision, read_corpus

__all__ = ["run"]


def run(words: list[str]) -> int:
    """Encode a corpus and publish an index folder."""
    parser = verb_parser(
        "export", "Encode a corpus to codes with a trained model and put them into FAISS as they are."
    )
    parser.add_argument("model", type=str, help="Model folder (best/ or last/ of a run).")
    parser.add_argument(
        "corpus", type=str, help="Folder in the BEIR layout, corpus.jsonl[.gz], or a Hub data set."
    )
    parser.add_argument("--out", type=str, required=True, help="Index folder to write.")
    parser.add_class_arguments(IndexConfig, "index")
    parser.add_argument("--batch_size", type=int, default=64, help="Documents a forward pass.")
    parser.add_argument("--precision", type=Precision, default="fp32", help="Arithmetic of the tower.")
    parser.add_argument(
        "--device", type=str | None, default=None, help="torch device; a GPU if there is one."
    )
    parser.add_argument(
        "--store_texts", type=bool, default=True, help="Keep the texts, so that search shows them."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing index folder.")
    options = parse(parser, words)
    report = export_index(
        Path(options.model),
        read_corpus(options.corpus),
        Path(options.out),
        config=options.index,
        batch_size=options.batch_size,
        precision=options.precision,
        device=options.device,
        store_texts=options.store_texts,
        overwrite=options.overwrite,
        progress=not options.json,
    )
    if options.json:
        print(json.dumps({"out": options.out, **asdict(report)}))
        return 0
    print(
        f"{options.out}: {report.ntotal:,} documents, {report.code_size} bytes each, index file "
        f"{report.index_bytes:,} bytes\n"
        f"  texts to vectors {report.embed_seconds:.2f} s, vectors to codes {report.assign_seconds:.3f} s, "
        f"codes into FAISS {report.build_seconds:.4f} s\n"
        f"  FAISS scores = model scores within {report.parity:.1e}"
    )
    return 0

"""Encode a corpus on a Ray cluster, one shard a task, and merge the shards into one index folder.

    python launch/ray/export.py MODEL CORPUS --out DIR --shards 8 [--num_gpus 1] [--index.kind ...]

Endex is installed on every node; MODEL, CORPUS and DIR lie on storage that all of them share. Ray starts a task again
when its worker or node dies, and it goes on after its last whole block; a finished shard is left as it is, so calling
the script again encodes what is missing. The index is byte for byte that of `endex export`. Start it as a file, not
with `python -m`, which lets folders of the current directory hide Endex's packages.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from index import IndexConfig, Shard, export_shard, merge_indexes
from launch.arguments import parse, verb_parser
from launch.export import describe_report, shard_folders
from retriever import InputError, Precision, read_corpus
from retriever.folder import MANIFEST, refuse_existing
from retriever.sources import count_documents

__all__ = ["encode_shard", "run"]

RETRIES = 10  # of a shard whose worker died; a mistake of the user is not tried again


def encode_shard(
    model: str, corpus: str, out: str, number: int, count: int, total: int, options: dict[str, Any]
) -> str:
    """Write shard `number` of `count` to `out`, unless it is there; return `out`. Runs in a Ray worker."""
    if not (Path(out) / MANIFEST).is_file():
        shard = Shard(number, count)
        documents = read_corpus(corpus, *shard.rows(total))
        export_shard(Path(model), documents, Path(out), shard=shard, total=total, progress=False, **options)
    return out


def run(words: list[str]) -> int:
    """Encode the shards on the cluster and merge them here."""
    parser = verb_parser(
        "export", "Encode a corpus on a Ray cluster, one shard a task, and merge the shards."
    )
    parser.prog = "launch/ray/export.py"
    parser.add_argument("model", type=str, help="Model folder, on storage that all nodes share.")
    parser.add_argument("corpus", type=str, help="As for endex export, on shared storage or of the Hub.")
    parser.add_argument("--out", type=str, required=True, help="Index folder to write, on shared storage.")
    parser.add_argument("--shards", type=int, required=True, help="Tasks; about one to four a GPU.")
    parser.add_class_arguments(IndexConfig, "index")
    parser.add_argument("--num_gpus", type=float, default=1.0, help="GPUs a task; 0 for CPUs.")
    parser.add_argument("--num_cpus", type=float, default=1.0, help="CPUs a task.")
    parser.add_argument(
        "--address", type=str | None, default=None, help="Ray cluster; by default Ray's own choice."
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Documents a forward pass.")
    parser.add_argument("--precision", type=Precision, default="fp32", help="Arithmetic of the tower.")
    parser.add_argument("--store_texts", type=bool, default=True, help="Keep the texts.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing index folder.")
    options = parse(parser, words)
    out = Path(options.out).absolute()
    if not options.overwrite:
        refuse_existing(out)
    folders = _encode(options, out)
    report = merge_indexes(folders, out, config=options.index, overwrite=options.overwrite)
    shutil.rmtree(folders[0].parent)
    if options.json:
        print(json.dumps({"out": options.out, **asdict(report)}))
    else:
        print(describe_report(options.out, report))
    return 0


def _encode(options: Any, out: Path) -> list[Path]:
    """Return the shard folders once all are written.

    Raises:
        InputError: If a task cannot do what it was asked, or Ray is missing.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError("the Ray recipe needs ray. Run: pip install 'endex[ray]'") from None

    total = count_documents(options.corpus)
    folders = shard_folders(out, options.shards)
    Shard(1, options.shards).rows(total)  # refuses too many shards before a cluster is asked
    encoding = {"batch_size": options.batch_size, "precision": options.precision}
    encoding |= {"store_texts": options.store_texts}
    model = str(Path(options.model).absolute())
    corpus = str(Path(options.corpus).absolute()) if Path(options.corpus).exists() else options.corpus
    ray.init(address=options.address, ignore_reinit_error=True, log_to_driver=False)
    task = ray.remote(num_gpus=options.num_gpus, num_cpus=options.num_cpus, max_retries=RETRIES)(encode_shard)
    waiting = [
        task.remote(model, corpus, str(folder), number, options.shards, total, encoding)
        for number, folder in enumerate(folders, start=1)
    ]
    while waiting:
        done, waiting = ray.wait(waiting)
        try:
            finished = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, InputError) else error from None
        if not options.json:
            print(f"{finished}: finished, {len(waiting)} of {options.shards} shards to go", flush=True)
    return folders


if __name__ == "__main__":
    try:
        code = run(sys.argv[1:])
    except InputError as error:
        print(f"endex: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.exit(code)

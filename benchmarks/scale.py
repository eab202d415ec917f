"""What a large corpus costs besides encoding: reading, merging, scanning codes, handing over to other engines.

Random codes of random codebooks, since their content changes none of these times; for Lance, clustered vectors. The
rates are what docs/scale.md and docs/engines.md compute with. Run it on an idle machine of the kind that will be used.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import benchmark_parser, print_table, write_result
from safetensors.torch import save_file

from index import FaissFit, IndexConfig, merge_indexes
from index._faiss import load_faiss
from index.artifact import describe_index, write_index
from index.lance_dataset import search_lance, write_lance
from retriever.beir import count_documents, read_corpus
from retriever.folder import publish_folder
from retriever.heads import CompressionHead, HeadConfig, IVFProductQuantizerConfig
from retriever.scores import Metric

TEXT = "w" * 500  # bytes of a document's text


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def write_folder(
    out: Path,
    head: CompressionHead,
    config: HeadConfig,
    codes: np.ndarray,
    vectors: torch.Tensor,
    texts: bool,
) -> None:
    """Write an index folder of packed codes."""
    about: dict[str, Any] = {"model": "synthetic"}
    with publish_folder(out, "index", about=about) as folder:
        codes.tofile(folder / "codes.u8")
        names = [f"{out.name}-{row}" for row in range(len(codes))]
        (folder / "docid").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        if texts:
            lines = [json.dumps({"_id": name, "title": "", "text": TEXT}) + "\n" for name in names]
            (folder / "documents.jsonl").write_text("".join(lines), encoding="utf-8")
            starts = np.cumsum([0, *(len(line) for line in lines[:-1])])
            starts.astype("<u8").tofile(folder / "documents.offsets")
        for name in ("head", "encoder"):
            (folder / name).mkdir()
        state = {name: value.contiguous() for name, value in head.state_dict().items()}
        save_file(state, folder / "head" / "model.safetensors")
        stored = {"head": config.name, "dim": head.dim, "config": asdict(config)}  # type: ignore[call-overload]
        (folder / "head" / "config.json").write_text(json.dumps(stored), encoding="utf-8")
        save_file({"sample": vectors[:64].contiguous()}, folder / "sample.safetensors")
        builder = IndexConfig().builder(head.export())
        about.update(describe_index(write_index(folder, head, builder, vectors[:64]), head, builder))


def draw(count: int, dim: int, seed: int) -> torch.Tensor:
    """Return clustered unit vectors."""
    centers = torch.randn(500, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(500, (count,), generator=generator)
    vectors = centers[rows] + 0.7 * torch.randn(count, dim, generator=generator)
    return vectors / vectors.norm(dim=1, keepdim=True)


def make(
    root: Path, books: int, metric: Metric, vectors: torch.Tensor, lists: int
) -> tuple[Any, Any, np.ndarray]:
    config = IVFProductQuantizerConfig(num_codebooks=books, num_lists=lists, rotation="none", metric=metric)
    head = config.build(vectors.shape[1]).eval()
    head.warm_start(vectors[:10000], FaissFit(), 0)
    with torch.no_grad():
        codes = [
            head.pack(head.encode(vectors[start : start + 4096])) for start in range(0, len(vectors), 4096)
        ]
    return config, head, np.concatenate(codes)


def reading(root: Path, count: int) -> list[dict[str, Any]]:
    path = root / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"_id": f"d{row}", "text": TEXT}) + "\n" for row in range(count))
    counted, _ = timed(lambda: count_documents(path))
    passed, _ = timed(lambda: next(read_corpus(path, count - 1)))
    return [
        {"what": "corpus counted", "documents/s": count / counted},
        {"what": "corpus passed over up to a shard", "documents/s": count / passed},
    ]


def merging(root: Path, options: Any) -> list[dict[str, Any]]:
    vectors = draw(10000, 64, 1)
    config, head, codes = make(root, 16, "l2", vectors, 256)
    rows = np.random.default_rng(options.seed).integers(len(codes), size=options.documents // 2)
    for name in ("a", "b"):
        write_folder(root / name, head, config, codes[rows], vectors, texts=True)
    seconds, _ = timed(lambda: merge_indexes([root / "a", root / "b"], root / "merged"))
    found = [{"what": "merged, with texts", "documents/s": 2 * len(rows) / seconds}]
    for form in ["bundle", "npy", "parquet", *(["lance"] if find_spec("lance") else [])]:
        for name in ("a", "merged"):
            count = len(rows) * (2 if name == "merged" else 1)
            words = ["convert", str(root / name), "--to", form, "--out", str(root / form), "--overwrite"]
            call = [
                sys.executable,
                "-c",
                "import sys; from launch.main import main; sys.exit(main(sys.argv[1:]))",
            ]
            seconds, _ = timed(
                lambda call=call, words=words: subprocess.run(
                    [*call, *words], check=True, stdout=subprocess.DEVNULL
                )
            )
            row = {"what": f"converted to {form}, 64 dimensions", "documents": count}
            found.append({**row, "documents/s": count / seconds})
    return found


def scanning(options: Any) -> list[dict[str, Any]]:
    """Measure codes scored a second by one thread in IndexIVFPQ, L2."""
    faiss = load_faiss()
    faiss.omp_set_num_threads(1)
    found, generator = [], np.random.default_rng(options.seed)
    for books in (16, 32):
        dim, lists = 768, 256
        coarse = faiss.IndexFlatL2(dim)
        coarse.add(generator.standard_normal((lists, dim), dtype=np.float32))
        built = faiss.IndexIVFPQ(coarse, dim, lists, books, 8)
        faiss.copy_array_to_vector(generator.standard_normal(256 * dim, dtype=np.float32), built.pq.centroids)
        built.is_trained = True
        built.precompute_table()
        built.add_sa_codes(generator.integers(256, size=(options.documents, 1 + books), dtype=np.uint8))
        built.nprobe = 64
        queries = generator.standard_normal((50, dim), dtype=np.float32)
        built.search(queries[:5], 10)
        seconds, _ = timed(lambda built=built, queries=queries: built.search(queries, 10))
        codes = 50 * options.documents * built.nprobe / lists
        found.append({"what": f"codes of {books} bytes scored, one thread", "documents/s": codes / seconds})
    return found


def lance(root: Path, options: Any) -> list[dict[str, Any]]:
    """Measure overlap@10 of Lance and FAISS over all lists, and over 16 of 256."""
    vectors, queries = draw(options.vectors, 384, 1), draw(200, 384, 2).numpy()
    found = []
    for metric in ("l2", "inner_product"):
        config, head, codes = make(root, 32, metric, vectors, 256)
        write_folder(root / metric, head, config, codes, vectors, texts=False)
        write_lance(root / metric, root / f"{metric} lance")
        built = load_faiss().read_index(str(root / metric / "index"))
        for nprobe in (256, 16):
            built.nprobe = nprobe
            _, rows = built.search(queries, 10)
            _, ids = search_lance(root / f"{metric} lance", queries, 10, nprobe=nprobe)
            pairs = zip(rows, ids, strict=True)
            same = [len({f"{metric}-{row}" for row in a} & set(b)) / 10 for a, b in pairs]
            found.append(
                {"what": f"Lance, {metric}, {nprobe} of 256 lists", "overlap@10": float(np.mean(same))}
            )
    return found


def main() -> None:
    """Measure everything and print it."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents of the synthetic corpus")
    parser.add_argument("--vectors", type=int, default=50_000, help="vectors of 384 dimensions for Lance")
    options = parser.parse_args()
    if options.quick:
        options.documents, options.vectors = 50_000, 5_000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = [*reading(root, options.documents), *merging(root, options), *scanning(options)]
        if find_spec("lance"):
            rows += lance(root, options)
    names = ("what", "documents", "documents/s", "overlap@10")
    table = [{name: row.get(name) for name in names} for row in rows]
    print_table("Costs of scale", table)
    write_result(options.json, options, rows)


if __name__ == "__main__":
    main()

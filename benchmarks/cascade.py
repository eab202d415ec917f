"""The cascade of a neural codec beside exhaustive search of what it decodes: recall and milliseconds a query.

    python benchmarks/cascade.py MODEL DATA [--json FILE]

MODEL is a model folder with a head that only a network can decode (qinco, qinco2, ...), DATA what it is evaluated on: a
folder of vector files, or texts in the BEIR layout. Every row is a search for 100 documents. Times are processor
milliseconds of one thread and one query at a time; the rows take turns, and a row's time is its median over the rounds.

- R@k: whether the nearest vector before compression is among the first k, mean over the queries.
- overlap@20: share of the 20 best of exhaustive neural search among the first 20.
- exhaustive: all codes are decoded and scored for every query (`decoded in memory`: decoded once, 4 D bytes each).
- scan, lists: the first-order decoder in FAISS, over all documents or those of the probed lists. `linear` stops there.
  A number is the width of the short list that the network decodes; `a > b` that the pair tables choose b of a.
- `residual quantizer`: the same decoder in FAISS's IndexResidualQuantizer and IndexIVFResidualQuantizer.
- `fitted to vectors`: the first-order decoder is fitted to the vectors before compression, not to the decoded ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from index._faiss import load_faiss
from index.builders import CascadeBuilder, IVFRQBuilder, RQBuilder, inverted_file, search_index
from index.decoders import decode_linear, fit_additive
from index.stages import Cascade, Widths
from retriever import DualEncoder, InputError, embed_documents, embed_queries, map_queries, read_data
from retriever.heads import (
    AdditiveCodebooks,
    CoarseAdditiveCodebooks,
    CompressionHead,
    NeuralCodec,
    pack_codes,
    pack_list_numbers,
)
from retriever.scores import score_matrix

K, TOP = 100, 20
PIECE = 4096


@dataclass(frozen=True)
class Search:
    """A row of the table.

    Attributes:
        run: Returns the rows of the 100 best documents of queries.
        known: The same from vectors that are decoded already, to measure recall in less time.
    """

    run: Callable[[np.ndarray], np.ndarray]
    known: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Corpus:
    """Codes and queries, and what exhaustive searches find.

    Attributes:
        head: Decodes the codes.
        codes: Packed codes (n, code_size).
        vectors: Documents before compression (n, D).
        decoded: What the head decodes the codes to (n, D).
        queries: Query vectors (q, D).
        nearest: Row of the best vector before compression of each query (q,).
        best: Rows of the best 20 decoded vectors of each query (q, 20).
    """

    head: CompressionHead
    codes: np.ndarray
    vectors: Tensor
    decoded: Tensor
    queries: np.ndarray
    nearest: np.ndarray
    best: np.ndarray


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("data", help="folder of vector files, or texts in the BEIR layout")
    parser.add_argument("--split", default="test", help="split of the queries")
    parser.add_argument("--queries", type=int, default=1000, help="queries whose recall is measured")
    parser.add_argument("--documents", type=int, help="documents searched, the first ones; by default all")
    parser.add_argument("--timed", type=int, default=20, help="queries whose time is taken")
    parser.add_argument("--rounds", type=int, default=3, help="times that every row is timed")
    parser.add_argument("--widths", type=int, nargs="+", default=[100, 200, 500, 1000])
    parser.add_argument("--probes", type=int, nargs="+", default=[4, 8, 16, 32], help="of the lists")
    parser.add_argument("--pairs", type=int, help="pair tables; by default 2 M")
    options = parser.parse_args()
    if options.quick:
        options.documents, options.queries, options.timed, options.rounds = 5000, 50, 5, 1
        options.widths, options.probes = [100, 500], [8]
    torch.set_num_threads(1)
    load_faiss().omp_set_num_threads(1)
    corpus = encode(options)
    searches, facts = make_searches(corpus, options)
    rows = [
        {"search": name, **quality(corpus, search)} for name, search in tqdm(searches.items(), desc="recall")
    ]
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for _ in tqdm(range(options.rounds), desc="time"):
        for name, search in searches.items():
            count = 1 if name == "exhaustive" else options.timed
            start = time.process_time()
            for query in corpus.queries[:count, None]:
                search.run(query)
            seconds[name].append((time.process_time() - start) / count)
    for row in rows:
        row["ms"] = 1000 * float(np.median(seconds[row["search"]]))
    title = f"{len(corpus.codes):,} documents of {corpus.codes.shape[1]} bytes, {len(corpus.queries)} queries"
    common.print_table(title, rows)
    common.print_table("decoders", [facts])
    common.write_result(options.json, options, rows, decoders=facts)


@torch.no_grad()
def encode(options: Any) -> Corpus:
    """Embed and encode documents and queries, and search exhaustively before and after compression."""
    model = DualEncoder.load(options.model).eval()
    head = model.head
    if not isinstance(head.export(), NeuralCodec):
        raise InputError(f"{options.model} has a head {head.config.name!r}, which FAISS holds as it is.")
    normalize = model.query_encoder.settings.normalize
    data = read_data(options.data, options.split, metric=head.metric, normalize=normalize)
    documents = list(data.documents.values())[: options.documents]
    x = embed_documents(model, documents)
    q = embed_queries(model, list(data.queries.values())[: options.queries])
    start = time.perf_counter()
    codes = head.pack(torch.cat([model.compress(part) for part in tqdm(x.split(1024), desc="encode")]))
    print(f"encoded in {common.seconds_since(start):.0f} s")
    decoded = decode(head, codes)
    queries = map_queries(head, q)
    return Corpus(
        head=head,
        codes=codes,
        vectors=x,
        decoded=decoded,
        queries=queries.numpy(),
        nearest=score_matrix(q.double(), x.double(), head.metric).argmax(1).numpy(),
        best=score_matrix(queries.double(), decoded.double(), head.metric).topk(TOP).indices.numpy(),
    )


@torch.no_grad()
def decode(head: CompressionHead, codes: np.ndarray) -> Tensor:
    """Return the decoded vectors of packed codes."""
    pieces = (codes[start : start + PIECE] for start in range(0, len(codes), PIECE))
    return torch.cat([head.decode(head.unpack(piece)) for piece in pieces])


def make_searches(corpus: Corpus, options: Any) -> tuple[dict[str, Search], dict[str, Any]]:
    """Return every search by its name in the order of the table, and the errors of the linear decoders."""
    head, metric = corpus.head, corpus.head.metric

    def best(queries: np.ndarray, documents: Tensor) -> np.ndarray:
        return score_matrix(torch.from_numpy(queries), documents, metric).topk(K).indices.numpy()

    def decoded(queries: np.ndarray) -> np.ndarray:
        return best(queries, corpus.decoded)

    found = {
        "exhaustive": Search(lambda queries: best(queries, decode(head, corpus.codes)), decoded),
        "exhaustive, decoded in memory": Search(decoded, decoded),
    }
    owns_lists = corpus.head.export().centroids is not None  # type: ignore[attr-defined]
    builder = CascadeBuilder(pairs=0, list_codes=0 if owns_lists else 1)
    plain = builder.prepare(head, corpus.codes)
    pairs = options.pairs or 2 * plain.num_codes
    half = CascadeBuilder(pairs=pairs, fit_rows=len(corpus.codes) // 2)
    paired = half.prepare(head, corpus.codes)
    built = {"lists": builder.build(plain, corpus.codes)}
    if not owns_lists:
        built["scan"] = CascadeBuilder(pairs=0).build(plain, corpus.codes)
    for form in sorted(built, reverse=True):
        probes = options.probes if form == "lists" else [None]
        for nprobe in probes:
            where = form if nprobe is None else f"{form}, {nprobe} probed"
            found[f"{where}: linear"] = linear(built[form], nprobe)
            for width in options.widths:
                found[f"{where}: {width}"] = staged(corpus, built[form], plain, nprobe, shortlist=width)
        for width in options.widths[-2:]:
            nprobe = probes[-1]
            where = form if nprobe is None else f"{form}, {nprobe} probed"
            found[f"{where}: {width} > {K}, {pairs} pairs"] = staged(
                corpus, built[form], paired, nprobe, shortlist=width, rerank=K
            )
    found.update(others(corpus, plain, options.probes[-1]))
    return found, errors(corpus, plain, paired)


def linear(built: Any, nprobe: int | None) -> Search:
    """Return the search of FAISS alone."""

    def search(queries: np.ndarray) -> np.ndarray:
        if nprobe is not None:
            inverted_file(built).nprobe = nprobe
        return search_index(built, queries, K)[1]

    return Search(search, search)


def staged(corpus: Corpus, built: Any, export: NeuralCodec, nprobe: int | None, **widths: int) -> Search:
    """Return the search by stages."""
    both = [
        Cascade(built, corpus.head, corpus.codes, export, Widths(**{"rerank": K} | widths)) for _ in range(2)
    ]
    both[1]._decode = lambda rows: corpus.decoded[rows]  # type: ignore[method-assign]
    return Search(*(lambda q, one=one: one.search(q, K, nprobe=nprobe)[1] for one in both))


def others(corpus: Corpus, plain: NeuralCodec, nprobe: int) -> dict[str, Search]:
    """Return the same decoder in FAISS's residual quantizers, and one that is fitted to the vectors themselves."""
    head, metric = corpus.head, corpus.head.metric
    numbers = head.unpack(corpus.codes)
    own = numbers if plain.centroids is None else numbers[:, 1:]
    assert plain.additive is not None, "prepared"
    centroids, books = plain.centroids, plain.additive
    listed = corpus.codes
    if centroids is None:
        centroids, books = books[0], books[1:]
        listed = np.hstack(
            [
                pack_list_numbers(numbers[:, 0].numpy(), len(centroids)),
                pack_codes(numbers[:, 1:], plain.code_bits),
            ]
        )
    lists = CoarseAdditiveCodebooks(codebooks=books, centroids=centroids, metric=metric)
    found = {
        f"lists, {nprobe} probed: linear, residual quantizer": linear(
            IVFRQBuilder().build(lists, listed), nprobe
        )
    }
    targets = corpus.vectors if plain.centroids is None else corpus.vectors - plain.centroids[numbers[:, 0]]
    fitted = replace(plain, additive=fit_additive(own, targets, 2**plain.code_bits))
    if plain.centroids is None:
        scan = AdditiveCodebooks(codebooks=plain.additive, metric=metric)
        found["scan: linear, residual quantizer"] = linear(RQBuilder().build(scan, corpus.codes), None)
        found["scan: linear, fitted to vectors"] = linear(CascadeBuilder().build(fitted, corpus.codes), None)
    else:
        built = CascadeBuilder().build(fitted, corpus.codes)
        found[f"lists, {nprobe} probed: linear, fitted to vectors"] = linear(built, nprobe)
    return found


def errors(corpus: Corpus, plain: NeuralCodec, paired: NeuralCodec) -> dict[str, Any]:
    """Return what the decoders leave of the decoded vectors, as a share of their variance, and what they take."""
    numbers = corpus.head.unpack(corpus.codes)
    rows = np.linspace(0, len(numbers) - 1, len(numbers) // 2).astype(np.int64)
    fitted = torch.zeros(len(numbers), dtype=torch.bool)
    fitted[rows] = True
    spread = (corpus.decoded - corpus.decoded.mean(0)).square().sum(1).mean()

    def share(export: NeuralCodec, some: Tensor, *, pairwise: bool) -> float:
        made = decode_linear(export, numbers[some], pairwise=pairwise)
        return float((made - corpus.decoded[some]).square().sum(1).mean() / spread)

    assert paired.tables is not None, "prepared"
    return {
        "network's error": float((corpus.decoded - corpus.vectors).square().sum(1).mean() / spread),
        "first order": share(plain, fitted, pairwise=False),
        "pairs, fitted half": share(paired, fitted, pairwise=True),
        "pairs, other half": share(paired, ~fitted, pairwise=True),
        "pairs": len(paired.tables),
        "tables, MB": paired.tables.numel() * 2 / 1e6,
    }


def quality(corpus: Corpus, search: Search) -> dict[str, float]:
    """Return recall of the true nearest neighbour, and the overlap with exhaustive neural search."""
    parts = np.array_split(corpus.queries, 1 + len(corpus.queries) // 100)
    rows = np.concatenate([search.known(part) for part in parts])
    hits = rows == corpus.nearest[:, None]
    found = {f"R@{k}": 100 * float(hits[:, :k].any(1).mean()) for k in (1, 10, 100)}
    common_rows = [len(set(a) & set(b)) for a, b in zip(rows[:, :TOP], corpus.best, strict=True)]
    return {**found, f"overlap@{TOP}": float(np.mean(common_rows)) / TOP}


if __name__ == "__main__":
    main()

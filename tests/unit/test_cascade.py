"""A codec that only a network can decode becomes a folder that is searched by stages, with the network's own scores.

The head here is additive codewords behind a fixed random network, so that it needs no training. Oracles are its
`decode` of all codes in float64, searched exhaustively.

Shapes: n documents, q queries, D dimensions, M codes, J lists.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from index import IndexConfig, Searcher, Shard, estimate_export, export_index, export_shard, merge_indexes
from index.artifact import write_index
from index.builders import CascadeBuilder, probing_all
from index.decoders import decode_linear, fit_decoders
from index.parity import ParityError, prove_parity
from index.stages import DECODERS, Cascade, Widths
from launch.main import main
from retriever import Document, DualEncoderConfig, InputError, embed_documents, read_corpus
from retriever.folder import check_folder
from retriever.heads import (
    HEADS,
    CompressionHead,
    HeadConfig,
    HeadOutput,
    NeuralCodec,
    QuantizerFit,
    pack_codes,
    pack_list_numbers,
    unpack_codes,
)
from retriever.heads.base import list_number_size
from retriever.scores import Metric, score_matrix

D, M, N, QUERIES, J = 16, 4, 1200, 30, 9
METRICS: tuple[Metric, ...] = ("inner_product", "l2")


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True)
class TinyNeuralConfig(HeadConfig):
    """A small neural codec with fixed random weights."""

    name: ClassVar[str] = "tiny neural"
    bits: int = 4
    lists: int = 0
    metric: Metric = "inner_product"
    bend: float = 0.5
    seed: int = 0

    def check(self, dim: int) -> None:
        pass

    def build(self, dim: int) -> TinyNeural:
        return TinyNeural(self, dim)


class TinyNeural(CompressionHead):
    """decode(k) = network(c_j + sum_m B[m, k_m]): codes are found by the residuals to the sums, greedily."""

    def __init__(self, config: TinyNeuralConfig, dim: int) -> None:
        super().__init__(
            dim=dim, num_codes=M + bool(config.lists), code_bits=config.bits, metric=config.metric
        )
        self._config = config
        scale = 0.6 ** torch.arange(M)[:, None, None]
        self.books = nn.Parameter(scale * rand(M, 2**config.bits, dim, seed=config.seed))
        self.centroids = nn.Parameter(2 * rand(config.lists, dim, seed=config.seed + 1))
        self.inward = nn.Parameter(rand(dim, 2 * dim, seed=config.seed + 2) / dim**0.5)
        self.outward = nn.Parameter(rand(2 * dim, dim, seed=config.seed + 3) / dim**0.5)

    @property
    def config(self) -> TinyNeuralConfig:
        return self._config

    @property
    def code_size(self) -> int:
        lists = self._config.lists
        return (M * self.code_bits + 7) // 8 + (list_number_size(lists) if lists else 0)

    def forward(self, x: Tensor) -> HeadOutput:
        codes = self.encode(x)
        return HeadOutput(reconstruction=self.decode(codes), codes=codes)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        rest, codes = x, []
        if self._config.lists:
            codes.append(torch.cdist(rest, self.centroids).argmin(1))
            rest = rest - self.centroids[codes[-1]]
        for book in self.books:
            codes.append(torch.cdist(rest, book).argmin(1))
            rest = rest - book[codes[-1]]
        return torch.stack(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        lists = bool(self._config.lists)
        y = sum(self.books[m, codes[:, m + lists]] for m in range(M))
        if lists:
            y = y + self.centroids[codes[:, 0]]
        return y + self._config.bend * torch.tanh(y @ self.inward) @ self.outward

    def pack(self, codes: Tensor) -> np.ndarray:
        if not self._config.lists:
            return pack_codes(codes, self.code_bits)
        lists = pack_list_numbers(codes[:, 0].numpy(), self._config.lists)
        return np.hstack([lists, pack_codes(codes[:, 1:], self.code_bits)])

    def unpack(self, packed: np.ndarray) -> Tensor:
        if not self._config.lists:
            return unpack_codes(packed, M, self.code_bits)
        size = list_number_size(self._config.lists)
        assert size == 1, "few lists here"
        lists = torch.from_numpy(packed[:, :1].astype(np.int64))
        return torch.hstack([lists, unpack_codes(packed[:, size:], M, self.code_bits)])

    def export(self) -> NeuralCodec:
        lists = self.centroids.detach() if self._config.lists else None
        return NeuralCodec(
            dim=self.dim, num_codes=M, code_bits=self.code_bits, centroids=lists, metric=self.metric
        )

    def warm_start(self, sample: Tensor, fit: QuantizerFit, seed: int) -> None:
        pass

    def count(self, codes: Tensor) -> None:
        pass

    def usage_statistics(self) -> dict[str, float]:
        return {}

    def restart_dead_codes(self, x: Tensor, generator: torch.Generator) -> dict[nn.Parameter, Tensor]:
        return {}


@pytest.fixture(autouse=True)
def _tiny_neural(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(HEADS, "tiny neural", TinyNeuralConfig)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A head, its codes, queries, and the head's scores of all documents in float64 (q, n)."""

    head: TinyNeural
    codes: np.ndarray
    queries: np.ndarray
    scores: np.ndarray

    def cascade(self, builder: CascadeBuilder) -> Cascade:
        export = builder.prepare(self.head, self.codes)
        assert isinstance(export, NeuralCodec)
        built = builder.build(export, self.codes)
        widths = Widths(shortlist=builder.shortlist, rerank=builder.rerank)
        return Cascade(built, self.head, self.codes, export, widths)

    def overlap(self, rows: np.ndarray) -> float:
        """Share of the best documents that were returned; equal scores may stand for each other."""
        best = -np.sort(-self.scores, axis=1)[:, rows.shape[1] - 1]
        return float((np.take_along_axis(self.scores, rows, axis=1) >= best[:, None] - 1e-4).mean())


def make_case(**options: Any) -> Case:
    head = TinyNeuralConfig(**options).build(D).eval()
    x = rand(N, D, seed=20) @ rand(D, D, seed=21) / 3
    queries = x[:QUERIES] + 0.3 * rand(QUERIES, D, seed=22)
    codes = head.pack(head.encode(x))
    with torch.no_grad():
        decoded = head.decode(head.unpack(codes)).double()
    scores = score_matrix(queries.double(), decoded, head.metric).numpy()
    return Case(head, codes, queries.numpy(), scores)


# --- stages ---


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("lists", "options"),
    [
        (0, {}),
        (0, {"pairs": 6}),
        (0, {"list_codes": 1}),
        (0, {"list_codes": 2, "hnsw_lists": True}),
        (J, {}),
        (J, {"pairs": 6, "rerank": 60}),
    ],
)
def test_scores_are_the_networks_and_the_best_are_nearly_its_best(
    lists: int, options: dict[str, Any], metric: Metric
) -> None:
    case = make_case(lists=lists, metric=metric)
    cascade = case.cascade(CascadeBuilder(shortlist=200, **options))
    with probing_all(cascade.built):
        scores, rows = cascade.search(case.queries, 10)
    expected = np.take_along_axis(case.scores, rows, axis=1)
    assert np.abs(scores - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert (np.diff(scores) <= 0).all()
    assert case.overlap(rows) >= 0.97


def test_a_short_list_of_all_documents_is_exhaustive_search() -> None:
    case = make_case()
    _, rows = case.cascade(CascadeBuilder(shortlist=N, pairs=0)).search(case.queries, 20)
    assert case.overlap(rows) == 1


def test_the_linear_decoder_alone_ranks_worse_than_the_cascade() -> None:
    case = make_case(bend=1.0)
    cascade = case.cascade(CascadeBuilder(pairs=0))
    _, narrow = cascade.search(case.queries, 10, widths=Widths(shortlist=10))
    _, wide = cascade.search(case.queries, 10, widths=Widths(shortlist=100))
    assert case.overlap(narrow) < case.overlap(wide) - 0.05


def test_pair_tables_choose_better_than_the_first_order_decoder() -> None:
    case = make_case(bend=1.5)
    cascade = case.cascade(CascadeBuilder(shortlist=300, pairs=6))
    _, with_pairs = cascade.search(case.queries, 10, widths=Widths(rerank=20))
    _, without = cascade.search(case.queries, 10, widths=Widths(shortlist=20))
    assert case.overlap(with_pairs) > case.overlap(without) + 0.02


def test_every_stage_decodes_no_more_than_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    cascade = case.cascade(CascadeBuilder(shortlist=100, rerank=30, pairs=3))
    seen: dict[str, int] = {}
    for name in ("_decode_pairs", "_decode"):
        inner = getattr(cascade, name)
        monkeypatch.setattr(
            cascade,
            name,
            lambda rows, name=name, inner=inner: (seen.update({name: len(rows)}), inner(rows))[1],
        )
    cascade.search(case.queries[:1], 10)
    assert seen == {"_decode_pairs": 100, "_decode": 30}
    cascade.search(case.queries[:1], 50)  # never fewer than k
    assert seen == {"_decode_pairs": 100, "_decode": 50}


def test_a_document_is_decoded_once_for_all_queries_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    cascade = case.cascade(CascadeBuilder(shortlist=100, pairs=0))
    decoded: list[np.ndarray] = []
    inner = cascade._decode
    monkeypatch.setattr(cascade, "_decode", lambda rows: (decoded.append(rows), inner(rows))[1])
    same = np.repeat(case.queries[:1], 8, axis=0)
    _, rows = cascade.search(same, 10)
    assert [len(rows) for rows in decoded] == [100]
    assert (rows == rows[0]).all()


def test_batches_are_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    cascade = case.cascade(CascadeBuilder(shortlist=50, pairs=0))
    scores, rows = cascade.search(case.queries, 7)
    monkeypatch.setattr("index.stages.BATCH_NUMBERS", 4 * 50 * D)
    again, other = cascade.search(case.queries, 7)
    assert np.array_equal(rows, other)
    assert np.abs(scores - again).max() < 1e-5


def test_no_query_has_no_answer() -> None:
    case = make_case()
    scores, rows = case.cascade(CascadeBuilder(pairs=0)).search(case.queries[:0], 7)
    assert scores.shape == rows.shape == (0, 7)


def test_stages_are_timed_by_query() -> None:
    case = make_case()
    cascade = case.cascade(CascadeBuilder(shortlist=50, rerank=20, pairs=3))
    cascade.search(case.queries, 7)
    times = cascade.times.milliseconds()
    assert list(times) == ["shortlist", "pairwise", "neural"]
    assert min(times.values()) > 0


def test_lists_that_hold_too_few_leave_rows_empty() -> None:
    case = make_case()
    cascade = case.cascade(CascadeBuilder(list_codes=2, nprobe=1, pairs=0))
    scores, rows = cascade.search(case.queries, 50)
    assert (rows == -1).any()
    assert np.isneginf(scores[rows == -1]).all()
    found = rows >= 0
    expected = np.take_along_axis(case.scores, np.maximum(rows, 0), axis=1)
    assert np.abs(scores - expected)[found].max() < 1e-4


@pytest.mark.parametrize("options", [{}, {"list_codes": 1}])
@pytest.mark.parametrize("count", [3, 40, 700])
def test_a_search_among_chosen_documents_returns_the_best_of_them(
    count: int, options: dict[str, int]
) -> None:
    case = make_case()
    cascade = case.cascade(CascadeBuilder(shortlist=200, pairs=0, **options))
    among = np.sort(np.random.default_rng(0).choice(N, count, replace=False))
    with probing_all(cascade.built):
        _, rows = cascade.search(case.queries, 5, rows=among)
    masked = np.full_like(case.scores, -np.inf)
    masked[:, among] = case.scores[:, among]
    k = min(5, count)
    best = -np.sort(-masked, axis=1)[:, k - 1]
    found = np.take_along_axis(masked, rows[:, :k], axis=1)
    assert (found >= best[:, None] - 1e-4).mean() >= 0.97
    assert (rows[:, k:] == -1).all()


# --- fitting ---


def test_decoders_are_a_function_of_the_codes() -> None:
    case = make_case()
    one, two = (fit_decoders(case.head, case.codes, rows=500, pairs=2) for _ in range(2))
    assert one.additive is not None
    assert one.tables is not None
    assert two.additive is not None
    assert two.tables is not None
    assert torch.equal(one.additive, two.additive)
    assert torch.equal(one.tables, two.tables)


@pytest.mark.parametrize("lists", [0, J])
def test_pairs_bring_the_linear_decoder_nearer_to_the_network(lists: int) -> None:
    case = make_case(lists=lists)
    export = fit_decoders(case.head, case.codes, rows=N, pairs=6)
    numbers = case.head.unpack(case.codes)
    target = case.head.decode(numbers).detach()
    errors = [
        float((decode_linear(export, numbers, pairwise=pairwise) - target).square().mean())
        for pairwise in (False, True)
    ]
    assert errors[1] < 0.8 * errors[0] < 0.4 * float((target - target.mean(0)).square().mean())


def test_a_decoder_of_a_part_of_the_documents_serves_the_others() -> None:
    case = make_case()
    cascade = case.cascade(CascadeBuilder(shortlist=200, fit_rows=300, pairs=0))
    _, rows = cascade.search(case.queries, 10)
    assert case.overlap(rows) >= 0.95


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "lists", "fault"),
    [
        ({"shortlist": 0}, 0, r"shortlist must be at least 1, got 0"),
        ({"pairs": -1}, 0, r"pairs must be at least 0, got -1"),
        ({"list_codes": 1}, J, r"has 9 inverted lists of its own, got list_codes=1. Choose list_codes 0"),
        ({"list_codes": M}, 0, r"list_codes must leave a code.* got 4 of 4 codes of 4 bits. Choose fewer"),
        ({"hnsw_lists": True}, 0, r"need inverted lists, and this head has none. Choose list_codes 1"),
        ({"nprobe": 3}, 0, r"need inverted lists, and this head has none"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], lists: int, fault: str) -> None:
    head = TinyNeuralConfig(lists=lists).build(D)
    with pytest.raises(InputError, match=fault):
        IndexConfig(kind="cascade", **options).builder(head.export())


def test_more_codewords_than_can_be_solved_for_are_refused() -> None:
    export = NeuralCodec(dim=D, num_codes=4, code_bits=14)
    with pytest.raises(InputError, match=r"has 65536 codewords, and at most 32768 can be solved for"):
        IndexConfig().builder(export)


def test_widths_are_at_least_one() -> None:
    with pytest.raises(InputError, match="rerank must be at least 1, got 0"):
        Widths(rerank=0)


def test_too_narrow_a_short_list_is_not_published() -> None:
    case = make_case(bend=2.0)
    cascade = case.cascade(CascadeBuilder(shortlist=1, pairs=0))
    with pytest.raises(ParityError, match=r"overlap@20 .* 'cascade' .* Raise --index\.shortlist"):
        prove_parity(
            CascadeBuilder(),
            cascade.built,
            case.head,
            case.codes,
            torch.from_numpy(case.queries),
            cascade.search,
        )


def test_scores_of_another_network_are_not_published() -> None:
    case = make_case()
    other = TinyNeuralConfig(bend=0.4).build(D).eval()
    cascade = case.cascade(CascadeBuilder(pairs=0))
    cascade.head = other
    with pytest.raises(ParityError, match="scores differ"):
        prove_parity(
            CascadeBuilder(),
            cascade.built,
            case.head,
            case.codes,
            torch.from_numpy(case.queries),
            cascade.search,
        )


# --- folders ---


@pytest.fixture(scope="module")
def documents(tiny_data: Path) -> list[Document]:
    return list(read_corpus(tiny_data))


@pytest.fixture(scope="module")
def model_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cascade") / "model"
    torch.manual_seed(0)
    model = DualEncoderConfig(encoder=str(tiny_model), document_max_length=32).build(TinyNeuralConfig(bits=3))
    model.eval().save(folder, files={"experiment.yaml": "seed: 1"})
    return folder


CONFIG = IndexConfig(kind="cascade", shortlist=30, rerank=20, pairs=2)
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def index_folder(
    model_folder: Path, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An index folder, not to be changed."""
    folder = tmp_path_factory.mktemp("cascade") / "index"
    HEADS["tiny neural"] = TinyNeuralConfig  # the fixture of each test comes later than this one
    try:
        export_index(model_folder, iter(documents), folder, config=CONFIG, **QUIET)
    finally:
        del HEADS["tiny neural"]
    return folder


def exhaustive(folder: Path, searcher: Searcher, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors of queries, and the head's scores of all codes in a folder."""
    cascade = searcher._cascade
    assert cascade is not None
    vectors = searcher.embed(texts)
    codes = np.fromfile(folder / "codes.u8", np.uint8).reshape(-1, cascade.head.code_size)
    with torch.no_grad():
        decoded = cascade.head.decode(cascade.head.unpack(codes))
    return vectors, score_matrix(torch.from_numpy(vectors), decoded, cascade.head.metric).numpy()


def test_a_folder_answers_texts_with_the_networks_scores(index_folder: Path) -> None:
    searcher = Searcher(index_folder, verify=True)
    texts = ["w3 w4 w5", "w60"]
    _, exact = exhaustive(index_folder, searcher, texts)
    scores, ids = searcher.search(texts, 20)
    rows = [[searcher.document_ids[:].index(name) for name in found] for found in ids]
    assert np.abs(np.take_along_axis(exact, np.array(rows), axis=1) - scores).max() < 1e-5
    everything, _ = searcher.search(texts, 20, widths=Widths(shortlist=80, rerank=80))
    assert np.abs(everything - -np.sort(-exact, axis=1)[:, :20]).max() < 1e-5


def test_widths_of_an_opened_folder_are_its_own_unless_given(index_folder: Path) -> None:
    assert Searcher(index_folder)._cascade.widths == Widths(shortlist=30, rerank=20)  # type: ignore[union-attr]
    opened = Searcher(index_folder, widths=Widths(rerank=7))
    assert opened._cascade.widths == Widths(shortlist=30, rerank=7)  # type: ignore[union-attr]


def test_kind_auto_of_a_neural_head_is_a_cascade(
    model_folder: Path, documents: list[Document], tmp_path: Path
) -> None:
    export_index(model_folder, iter(documents), tmp_path / "index", config=IndexConfig(), **QUIET)
    assert check_folder(tmp_path / "index", "index")["index"] == "CascadeBuilder"


def test_a_search_among_ids_returns_those(index_folder: Path) -> None:
    _, ids = Searcher(index_folder).search(["w1 w2"], 3, ids=["d5", "d70"])
    assert sorted(ids[0]) == ["d5", "d70"]


def test_damaged_decoders_are_named(index_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    shutil.copytree(index_folder, folder)
    content = bytearray((folder / DECODERS).read_bytes())
    content[-1] ^= 1
    (folder / DECODERS).write_bytes(content)
    with pytest.raises(InputError, match=rf"{DECODERS} is damaged"):
        Searcher(folder)


def test_merged_shards_are_byte_for_byte_one_export(
    model_folder: Path,
    documents: list[Document],
    index_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("index.encode.BLOCK", 16)
    shards = []
    for number in (1, 2):
        shard = Shard(number, 2)
        start, stop = shard.rows(len(documents))
        shards.append(tmp_path / str(number))
        export_shard(
            model_folder, iter(documents[start:stop]), shards[-1], shard=shard, total=len(documents), **QUIET
        )
    merge_indexes(shards, tmp_path / "merged", config=CONFIG)
    whole = tmp_path / "whole"
    export_index(model_folder, iter(documents), whole, config=CONFIG, **QUIET)
    for name in ("index", "codes.u8", "docid", DECODERS):
        assert (tmp_path / "merged" / name).read_bytes() == (whole / name).read_bytes()


def test_documents_are_removed_from_a_cascade(index_folder: Path, tmp_path: Path) -> None:
    merge_indexes([index_folder], tmp_path / "smaller", remove={"d0", "d41"})
    searcher = Searcher(tmp_path / "smaller")
    assert len(searcher.document_ids) == 78
    _, ids = searcher.search(["w7"], 78)
    assert "d41" not in ids[0]


def test_an_engine_that_takes_codebooks_is_refused(
    index_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(index_folder), "--to", "bundle", "--out", str(tmp_path / "out")]) == 2
    assert "no codebooks" in capsys.readouterr().err


def test_vectors_for_other_engines_are_the_networks(index_folder: Path, tmp_path: Path) -> None:
    assert main(["convert", str(index_folder), "--to", "npy", "--out", str(tmp_path / "out"), "--json"]) == 0
    searcher = Searcher(index_folder)
    vectors, exact = exhaustive(index_folder, searcher, ["w9"])
    found = vectors @ np.load(tmp_path / "out" / "vectors.npy").T
    assert np.abs(found - exact).max() < 1e-5


def test_an_estimate_counts_the_tables(model_folder: Path, documents: list[Document]) -> None:
    sizes = [
        estimate_export(
            model_folder, documents, total=1000, config=replace(CONFIG, pairs=pairs), device="cpu"
        ).index_bytes
        for pairs in (0, 3)
    ]
    assert sizes[1] - sizes[0] == 3 * 64 * 32 * 2  # pairs, K K, D, float16


def test_cards_are_refused(index_folder: Path) -> None:
    with pytest.raises(InputError, match="searched by stages"):
        Searcher(index_folder).to_gpu()


def test_the_command_line_sets_widths_and_prints_times(
    index_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", str(index_folder), "--query", "w4 w5", "--k", "3"]
    assert main([*words, "--cascade.shortlist", "25", "--cascade.rerank", "5", "--times", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["milliseconds"]) == ["shortlist", "pairwise", "neural"]
    assert len(report["results"]["query"]) == 3


def test_evaluation_prints_times(
    index_folder: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(index_folder), str(tiny_data), "--cascade.shortlist", "40", "--json"]
    assert main(words) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["milliseconds/neural"] > 0
    assert 0 <= metrics["recall@100"] <= 1


def test_widths_of_an_index_without_stages_are_refused(
    tmp_path: Path, tiny_model: Path, documents: list[Document]
) -> None:
    from retriever.heads import NoCompressionConfig

    model = DualEncoderConfig(encoder=str(tiny_model)).build(NoCompressionConfig()).eval()
    model.save(tmp_path / "model", files={})
    export_index(tmp_path / "model", iter(documents), tmp_path / "index", config=IndexConfig(), **QUIET)
    with pytest.raises(InputError, match="is no cascade: shortlist and rerank have no meaning"):
        Searcher(tmp_path / "index", widths=Widths(shortlist=5))


def test_writing_needs_no_model(index_folder: Path, tmp_path: Path) -> None:
    """A folder's own codes and head are enough for another form of the cascade."""
    shutil.copytree(index_folder / "head", tmp_path / "head")
    shutil.copyfile(index_folder / "codes.u8", tmp_path / "codes.u8")
    head = TinyNeuralConfig(bits=3).build(32).eval()
    sample = rand(10, 32, seed=3)
    builder = CascadeBuilder(list_codes=1, shortlist=80, pairs=0)
    report = write_index(tmp_path, head, builder, sample)
    assert report.overlap == 1
    assert report.parity < 1e-4
    size = sum((tmp_path / name).stat().st_size for name in ("index", DECODERS))
    assert report.index_bytes == size


def test_embedding_is_that_of_the_index(
    index_folder: Path, model_folder: Path, documents: list[Document]
) -> None:
    from retriever import DualEncoder

    vectors = embed_documents(DualEncoder.load(model_folder), documents[:3])
    assert vectors.shape[1] == Searcher(index_folder).dim

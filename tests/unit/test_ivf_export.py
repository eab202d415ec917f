"""A learned inverted file in FAISS: its lists, its bytes, its scores, and which lists a search visits.

Oracles are the head's own `decode` in float64, NumPy, and FAISS's inspection of its lists.

Shapes: n documents, q queries, D dimensions, J lists, M codebooks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from faiss.contrib.inspect_tools import get_invlist
from torch import Tensor

from index import IndexConfig, Searcher, export_index
from index.builders import FaissIndex, IVFPQBuilder, PQBuilder, inverted_file, probing_all, search_index
from index.builders.lists import default_nprobe
from index.parity import assert_parity
from launch.main import main
from retriever import (
    Document,
    DualEncoder,
    DualEncoderConfig,
    InputError,
    RetrievalData,
    embed_documents,
    read_corpus,
    read_qrels,
    read_queries,
)
from retriever.heads import IVFProductQuantizer, IVFProductQuantizerConfig, ProductQuantizerConfig
from retriever.scores import score_matrix
from training import evaluate_index

D, M, DOCUMENTS, QUERIES = 16, 4, 300, 7
SEEDS = (0, 1, 2)
METRICS = ("inner_product", "l2")
FROZEN = {"assignment": "frozen", "list_assignment": "frozen"}
VARIANTS = [
    (metric, rotation) for metric in METRICS for rotation in ("none", "opq", "givens_greedy", "cayley")
]
every_variant = pytest.mark.parametrize(("metric", "rotation"), [*VARIANTS, ("inner_product", "free")])


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_head(seed: int = 0, *, num_lists: int = 9, bits: int = 4, **options: Any) -> IVFProductQuantizer:
    """Return a head with random values; a rotation "free" is far from orthonormal."""
    options = {"rotation": "none", "metric": "inner_product"} | options
    head = IVFProductQuantizerConfig(
        num_lists=num_lists, num_codebooks=M, codebook_bits=bits, **options
    ).build(D)
    head.coarse.start(rand(1, num_lists, D, seed=seed))
    head.fine.start(0.5 * rand(*head.fine.codewords.shape, seed=seed + 1))
    if head.config.rotation != "none":
        head.rotate.start(torch.linalg.qr(rand(D, D, seed=seed)).Q)
    if head.config.rotation == "free":
        with torch.no_grad():
            head.rotate.values.add_(0.5 * rand(D, D, seed=seed + 9))
    return head.eval()


def move(head: IVFProductQuantizer) -> None:
    """Change centroids and codewords as training would, only more."""
    with torch.no_grad():
        head.coarse.codewords.add_(rand(*head.coarse.codewords.shape, seed=77))
        head.fine.codewords.add_(rand(*head.fine.codewords.shape, seed=78))


def build(head: IVFProductQuantizer, codes: Tensor, **options: Any) -> FaissIndex:
    return IVFPQBuilder(**options).build(head.export(), head.pack(codes))


def exact_scores(head: IVFProductQuantizer, queries: Tensor, codes: Tensor) -> np.ndarray:
    """Scores of the decoded documents, in float64, (q, n)."""
    q, x = queries.double().numpy(), head.decode(codes).detach().double().numpy()
    return q @ x.T if head.metric == "inner_product" else 1 - ((q[:, None] - x) ** 2).sum(-1) / 2


def stored(index: FaissIndex, list_number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and code bytes of a list."""
    ids, codes = get_invlist(inverted_file(index).invlists, list_number)
    return ids, codes.reshape(len(ids), inverted_file(index).code_size)


# --- what the lists hold ---


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("num_lists", [1, 9, 256, 257])
def test_a_list_holds_the_documents_that_the_head_put_there(num_lists: int, bits: int) -> None:
    head = make_head(num_lists=num_lists, bits=bits)
    codes = head.encode(rand(DOCUMENTS, D, seed=5))
    index = build(head, codes)
    for number in range(num_lists):
        expected = (codes[:, 0] == number).nonzero().squeeze(1)
        assert stored(index, number)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("rotation", ["none", "opq"])
@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("num_lists", [1, 9, 257])
def test_codes_survive_export_byte_for_byte_whatever_the_codebooks_are(
    num_lists: int, bits: int, rotation: str
) -> None:
    """The codes at the head's start are the codes in FAISS, though centroids and codewords have moved."""
    head, x = make_head(num_lists=num_lists, bits=bits, rotation=rotation), rand(DOCUMENTS, D, seed=5)
    codes = head.encode(x)
    before = head.pack(codes)
    move(head)
    index = build(head, codes)
    for number in range(num_lists):
        ids, found = stored(index, number)
        np.testing.assert_array_equal(found, before[ids][:, head.list_bytes :])
        assert (head.unpack(before[ids])[:, 0] == number).all()


def test_frozen_lists_stay_after_training_though_faiss_would_assign_others() -> None:
    """LibVQ's fault: adding the vectors again moves them to other lists."""
    head, x = make_head(list_assignment="frozen"), rand(DOCUMENTS, D, seed=5)
    before = head.encode(x)[:, 0]
    move(head)
    codes = head.encode(x)
    index = build(head, codes)
    lists = torch.empty(DOCUMENTS, dtype=torch.int64)
    for number in range(9):
        lists[stored(index, number)[0]] = number
    _, theirs = inverted_file(index).quantizer.search(x.numpy(), 1)
    assert torch.equal(lists, before)
    assert (theirs[:, 0] != before.numpy()).mean() > 0.2


@pytest.mark.parametrize(("metric", "family"), [("inner_product", "IndexFlatIP"), ("l2", "IndexFlatL2")])
def test_coarse_quantizer_has_the_metric_and_the_centroids(metric: str, family: str) -> None:
    head = make_head(metric=metric)
    index = build(head, head.encode(rand(DOCUMENTS, D, seed=5)))
    quantizer = faiss.downcast_index(inverted_file(index).quantizer)
    assert type(quantizer).__name__ == family
    np.testing.assert_array_equal(quantizer.reconstruct_n(0, 9), head.centroids.detach().numpy())


@every_variant
def test_metric_type_is_that_of_the_head(metric: str, rotation: str) -> None:
    head = make_head(metric=metric, rotation=rotation)
    index = build(head, head.encode(rand(DOCUMENTS, D, seed=5)))
    expected = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[metric]
    assert (index.metric_type, inverted_file(index).metric_type) == (expected, expected)


# --- scores ---


@every_variant
@pytest.mark.parametrize("seed", SEEDS)
def test_scores_of_all_lists_are_those_of_the_decoded_documents(
    seed: int, metric: str, rotation: str
) -> None:
    head, queries = make_head(seed, metric=metric, rotation=rotation), rand(QUERIES, D, seed=seed + 50)
    codes = head.encode(rand(DOCUMENTS, D, seed=seed + 60))
    index = build(head, codes)
    with probing_all(index):
        scores, rows = search_index(index, queries.numpy(), DOCUMENTS)
    exact = exact_scores(head, queries, codes)
    expected = np.take_along_axis(exact, rows, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(exact).max()))
    assert all(sorted(row) == list(range(DOCUMENTS)) for row in rows.tolist())


@pytest.mark.parametrize("rotation", ["none", "opq"])
@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_scores_after_training_with_frozen_codes_are_those_of_the_decoded_documents(
    metric: str, rotation: str
) -> None:
    head, queries = make_head(metric=metric, rotation=rotation, **FROZEN), rand(QUERIES, D, seed=50)
    codes = head.encode(rand(DOCUMENTS, D, seed=60))
    move(head)
    index = build(head, codes)
    with probing_all(index):
        scores, _ = search_index(index, queries.numpy(), 10)
    exact = exact_scores(head, queries, codes)
    np.testing.assert_allclose(
        scores, -np.sort(-exact, axis=1)[:, :10], rtol=0, atol=1e-5 * max(1.0, np.abs(exact).max())
    )


@every_variant
def test_parity_is_found_with_the_packed_codes(metric: str, rotation: str) -> None:
    head, queries = make_head(metric=metric, rotation=rotation), rand(QUERIES, D, seed=50)
    codes = head.encode(rand(DOCUMENTS, D, seed=60))
    index = build(head, codes)
    with probing_all(index):
        assert assert_parity(index, head, head.pack(codes), queries) < 1e-3


@every_variant
def test_index_read_from_its_file_gives_identical_results(metric: str, rotation: str, tmp_path: Path) -> None:
    head, queries = make_head(metric=metric, rotation=rotation), rand(QUERIES, D, seed=50).numpy()
    built = build(head, head.encode(rand(DOCUMENTS, D, seed=60)), nprobe=4)
    faiss.write_index(built, str(tmp_path / "index"))
    read = faiss.read_index(str(tmp_path / "index"))
    for ours, theirs in zip(read.search(queries, 10), built.search(queries, 10), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- probing ---


@every_variant
@pytest.mark.parametrize("nprobe", [1, 3, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_search_visits_the_lists_whose_centroids_score_best(
    seed: int, nprobe: int, metric: str, rotation: str
) -> None:
    head, queries = make_head(seed, metric=metric, rotation=rotation), rand(QUERIES, D, seed=seed + 50)
    codes = head.encode(rand(DOCUMENTS, D, seed=seed + 60))
    _, rows = search_index(build(head, codes, nprobe=nprobe), queries.numpy(), DOCUMENTS)
    z = queries.double().numpy() @ head.rotation.detach().double().numpy().T
    centroids = head.centroids.detach().double().numpy()
    scores = z @ centroids.T if metric == "inner_product" else -((z[:, None] - centroids) ** 2).sum(-1)
    for found, line in zip(rows, scores, strict=True):
        visited = np.argsort(-line)[:nprobe]
        expected = np.isin(codes[:, 0].numpy(), visited).nonzero()[0]
        assert sorted(found[found >= 0].tolist()) == expected.tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_are_not_found_score_minus_infinity_and_come_last(metric: str) -> None:
    head = make_head(metric=metric)
    index = build(head, head.encode(rand(DOCUMENTS, D, seed=60)), nprobe=1)
    scores, rows = search_index(index, rand(QUERIES, D, seed=50).numpy(), DOCUMENTS)
    missing = rows < 0
    assert missing.any()
    assert np.isneginf(scores[missing]).all()
    assert np.isfinite(scores[~missing]).all()
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize(
    ("num_lists", "nprobe", "share", "expected"),
    [
        *[(9, None, 0, 3), (20, None, 0, 4), (1, None, 0, 1), (9, 5, 0, 5), (9, 50, 0, 9), (9, 2, 1, 2)],
        *[(9, None, 1, 9), (9, None, 0.5, 5), (9, None, 0.4, 4), (9, None, 0.1, 3), (9, None, 5, 9)],
    ],
)
def test_lists_probed_by_default_hold_enough_documents_and_are_the_square_root_at_least(
    num_lists: int, nprobe: int | None, share: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.builders.lists.PROBED", int(share * DOCUMENTS))
    head = make_head(num_lists=num_lists)
    index = build(head, head.encode(rand(DOCUMENTS, D, seed=60)), nprobe=nprobe)
    assert inverted_file(index).nprobe == expected


def test_lists_probed_by_default_are_few_enough_for_a_gpu() -> None:
    assert default_nprobe(None, 10_000, documents=1000) == 2048
    assert default_nprobe(None, 10_000, documents=0) == 2048
    assert default_nprobe(3000, 10_000, documents=1000) == 3000
    assert default_nprobe(None, 5_000_000, documents=10**9) == 2236


def test_probing_all_restores_the_lists_probed() -> None:
    head = make_head(rotation="opq")
    index = build(head, head.encode(rand(DOCUMENTS, D, seed=60)), nprobe=2)
    with probing_all(index):
        assert inverted_file(index).nprobe == 9
    assert inverted_file(index).nprobe == 2


# --- what is refused ---


@pytest.mark.parametrize("nprobe", [0, -1])
def test_probing_no_list_is_refused(nprobe: int) -> None:
    with pytest.raises(InputError, match=f"nprobe must be at least 1, got {nprobe}"):
        IVFPQBuilder(nprobe=nprobe)


def test_lists_of_ones_own_cannot_be_set() -> None:
    with pytest.raises(InputError, match=r"the head has its own lists, so nlist cannot be set; got 7"):
        IVFPQBuilder(nlist=7).check(make_head().export())


def test_probing_without_lists_is_refused_with_the_head_that_has_some() -> None:
    export = ProductQuantizerConfig(num_codebooks=M).build(D).export()
    with pytest.raises(
        InputError,
        match=r"needs a head with inverted lists, got 3.*or train with the head `ivfpq` or `ivfrq`",
    ):
        IndexConfig(nprobe=3).builder(export)


def test_a_flat_index_of_codes_cannot_carry_lists() -> None:
    fault = r"kind 'pq' cannot carry CoarseProductCodebooks\. Choose --index\.kind auto"
    with pytest.raises(InputError, match=fault):
        PQBuilder().check(make_head().export())


def test_kind_auto_carries_lists() -> None:
    assert IndexConfig().builder(make_head().export()) == IVFPQBuilder()


# --- a folder with lists ---


@pytest.fixture(scope="module")
def documents(tiny_data: Path) -> list[Document]:
    return list(read_corpus(tiny_data))


@pytest.fixture(scope="module")
def folder(tiny_model: Path, documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index folder whose head has 8 lists, some of few documents; it probes 2 by default."""
    path = tmp_path_factory.mktemp("ivf")
    head = IVFProductQuantizerConfig(
        num_lists=8, num_codebooks=4, codebook_bits=4, rotation="none", metric="l2"
    )
    model = DualEncoderConfig(encoder=str(tiny_model)).build(head).eval()
    x = embed_documents(model, documents)
    model.head.coarse.start(x[None, :8])
    model.head.fine.start((x[16:32] - x[32:48]).view(16, 4, 8).transpose(0, 1))
    model.save(path / "model")
    config = IndexConfig(nprobe=2)
    export_index(path / "model", documents, path / "index", config=config, device="cpu", progress=False)
    return path / "index"


def test_a_search_of_all_lists_gives_the_scores_of_the_model(folder: Path, documents: list[Document]) -> None:
    searcher = Searcher(folder, nprobe=8)
    queries = rand(5, 32, seed=0)
    scores, rows = searcher.search_vectors(queries.numpy(), 10)
    model = DualEncoder.load(folder.parent / "model")
    with torch.no_grad():
        exact = score_matrix(
            queries, model.head.decode(model.head.encode(embed_documents(model, documents))), "l2"
        )
    np.testing.assert_allclose(scores, exact.gather(1, torch.from_numpy(rows)), rtol=0, atol=1e-4)
    np.testing.assert_allclose(scores, exact.topk(10).values, rtol=0, atol=1e-4)


def test_a_folder_probes_what_it_was_exported_with(folder: Path) -> None:
    assert inverted_file(Searcher(folder).faiss_index).nprobe == 2


def test_ids_of_documents_that_were_not_found_are_left_out(folder: Path) -> None:
    scores, ids = Searcher(folder, nprobe=1).search(["w1 w2", "w3 w4"], k=80)
    for line, names in zip(scores, ids, strict=True):
        assert 0 < len(names) < 80
        assert np.isfinite(line[: len(names)]).all()
        assert np.isneginf(line[len(names) :]).all()


def test_more_lists_find_at_least_as_good_documents(folder: Path) -> None:
    searcher, found = Searcher(folder), []
    for nprobe in (1, 3, 8):
        searcher.probe(nprobe)
        found.append(searcher.search_vectors(rand(5, 32, seed=0).numpy(), 5)[0])
    assert (found[1] >= found[0]).all()
    assert (found[2] >= found[1]).all()


@pytest.mark.parametrize("nprobe", [0, 9, -3])
def test_probing_other_than_the_lists_there_are_is_refused(folder: Path, nprobe: int) -> None:
    with pytest.raises(
        InputError, match=rf"nprobe must be between 1 and 8, the lists of the index; got {nprobe}"
    ):
        Searcher(folder, nprobe=nprobe)


def test_probing_an_index_without_lists_is_refused(
    tiny_model: Path, documents: list[Document], tmp_path: Path
) -> None:
    head = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, rotation="none")
    DualEncoderConfig(encoder=str(tiny_model)).build(head).save(tmp_path / "model")
    export_index(
        tmp_path / "model", documents, tmp_path / "index", config=IndexConfig(), device="cpu", progress=False
    )
    with pytest.raises(InputError, match=r"has no inverted lists: nprobe=2 has no meaning"):
        Searcher(tmp_path / "index", nprobe=2)


@pytest.mark.parametrize("nprobe", [1, 8])
def test_the_command_line_probes_as_many_lists_as_it_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], nprobe: int
) -> None:
    words = ["search", str(folder), "--query", "w1 w2", "--k", "80", "--nprobe", str(nprobe), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["query"]
    _, ids = Searcher(folder, nprobe=nprobe).search(["w1 w2"], k=80)
    assert list(found) == ids[0]
    assert (len(found) == 80) == (nprobe == 8)


def test_evaluate_prints_and_draws_the_measures_of_every_number_of_lists(
    folder: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "recall.svg"
    words = ["evaluate", str(folder), str(tiny_data), "--nprobe", "[8,1]", "--plot", str(plot), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    queries = read_queries(str(tiny_data))
    data = RetrievalData({}, queries, read_qrels(str(tiny_data), "test", queries=queries))
    expected = {str(n): evaluate_index(Searcher(folder, nprobe=n), data)[0] for n in (1, 8)}
    assert found == expected
    assert "Recall@100" in plot.read_text(encoding="utf-8")


def test_a_plot_without_numbers_of_lists_is_refused(
    folder: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(folder), str(tiny_data), "--plot", str(tmp_path / "plot.svg")]) == 2
    assert "--nprobe '[1,4,16]'" in capsys.readouterr().err

"""An exported folder answers with the model's scores, is published whole or not at all, and names its damage.

Shapes: B queries, n documents, D dimensions, k results.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from index import ExportReport, IndexConfig, Searcher, export_index
from retriever import (
    Document,
    DualEncoder,
    DualEncoderConfig,
    InputError,
    embed_documents,
    embed_queries,
    model_fingerprint,
    read_corpus,
    read_queries,
)
from retriever.heads import HeadConfig, NoCompressionConfig, ProductQuantizerConfig

PQ = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)
N = 80  # documents of the tiny data


def make_model(
    tiny_model: Path, documents: list[Document], head: HeadConfig, seed: int = 0, *, tie: bool = True
) -> DualEncoder:
    """Return a model whose codewords are sub-vectors of documents, behind a random rotation."""
    config = DualEncoderConfig(
        encoder=str(tiny_model),
        query_max_length=16,
        document_max_length=32,
        query_prompt="w100 ",
        document_prompt="w101 ",
        tie=tie,
    )
    model = config.build(head).eval()
    if isinstance(head, ProductQuantizerConfig):
        generator = torch.Generator().manual_seed(seed)
        vectors = embed_documents(model, documents[:16])
        with torch.no_grad():
            model.head.rotation.copy_(torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q)
            z = (vectors @ model.head.rotation.T).view(16, 4, 8).transpose(0, 1)
            model.head.codebooks.copy_(z + 0.01 * torch.randn(z.shape, generator=generator))
    return model


def export(model: Path, documents: object, out: Path, **options: object) -> ExportReport:
    options = {"config": IndexConfig(), "device": "cpu", "progress": False} | options
    return export_index(model, documents, out, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def documents(tiny_data: Path) -> list[Document]:
    return list(read_corpus(tiny_data))


@pytest.fixture(scope="module")
def queries(tiny_data: Path) -> list[str]:
    return list(read_queries(tiny_data).values())[:20]


@pytest.fixture(scope="module")
def model_folder(
    tiny_model: Path, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("search") / "model"
    make_model(tiny_model, documents, PQ).save(folder, files={"experiment.yaml": "seed: 1"})
    return folder


@pytest.fixture(scope="module")
def exported(
    model_folder: Path, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ExportReport]:
    """An index folder, not to be changed, and its report."""
    folder = tmp_path_factory.mktemp("search") / "index"
    return folder, export(model_folder, iter(documents), folder)


@pytest.fixture(scope="module")
def index_folder(exported: tuple[Path, ExportReport]) -> Path:
    return exported[0]


@pytest.fixture
def copied(index_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index_folder, tmp_path / "copy"))


def exact_scores(model: DualEncoder, documents: list[Document], queries: list[str]) -> np.ndarray:
    """Return the scores of queries with decode(encode(document)), (B, n), in float64."""
    with torch.no_grad():
        decoded = model.head.decode(model.head.encode(embed_documents(model, documents))).double().numpy()
    vectors = embed_queries(model, queries).double().numpy()
    if model.head.metric == "inner_product":
        return vectors @ decoded.T
    return 1 - ((vectors[:, None] - decoded[None]) ** 2).sum(-1) / 2


# --- results ---


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize(
    "config",
    [IndexConfig(), IndexConfig(kind="pq"), IndexConfig(kind="ivfpq", nlist=7)],
    ids=["auto", "pq", "ivfpq"],
)
def test_scores_are_those_of_the_model(
    tiny_model: Path,
    documents: list[Document],
    queries: list[str],
    tmp_path: Path,
    config: IndexConfig,
    metric: str,
) -> None:
    model = make_model(tiny_model, documents, replace(PQ, metric=metric))
    model.save(tmp_path / "model")
    export(tmp_path / "model", documents, tmp_path / "index", config=config)
    scores, ids = Searcher(tmp_path / "index").search(queries, k=10)
    exact = exact_scores(model, documents, queries)
    columns = {document.id: column for column, document in enumerate(documents)}
    expected = [[exact[row, columns[name]] for name in names] for row, names in enumerate(ids)]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_results_are_the_best_of_the_model_in_falling_order(
    index_folder: Path, model_folder: Path, documents: list[Document], queries: list[str]
) -> None:
    scores, _ = Searcher(index_folder).search(queries, k=10)
    exact = exact_scores(DualEncoder.load(model_folder), documents, queries)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], rtol=0, atol=1e-5)


def test_uncompressed_index_gives_the_inner_products_of_the_towers(
    tiny_model: Path, documents: list[Document], queries: list[str], tmp_path: Path
) -> None:
    model = make_model(tiny_model, documents, NoCompressionConfig())
    model.save(tmp_path / "model")
    export(tmp_path / "model", documents, tmp_path / "index")
    scores, rows = Searcher(tmp_path / "index").search_vectors(embed_queries(model, queries).numpy(), k=5)
    exact = (embed_queries(model, queries).double() @ embed_documents(model, documents).double().T).numpy()
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, axis=1), rtol=0, atol=1e-5)


def test_text_search_and_vector_search_agree(
    index_folder: Path, model_folder: Path, queries: list[str]
) -> None:
    searcher = Searcher(index_folder)
    vectors = embed_queries(DualEncoder.load(model_folder), queries).numpy()
    scores, rows = searcher.search_vectors(vectors, k=7)
    text_scores, ids = searcher.search(queries, k=7)
    np.testing.assert_array_equal(text_scores, scores)
    assert ids == [[searcher.document_ids[row] for row in result] for result in rows]


def test_query_tower_of_the_model_folder_gives_the_same_results(
    index_folder: Path, model_folder: Path, queries: list[str]
) -> None:
    scores, ids = Searcher(index_folder).search(queries)
    model_scores, model_ids = Searcher(index_folder, model=model_folder).search(queries)
    np.testing.assert_array_equal(model_scores, scores)
    assert model_ids == ids


def test_queries_are_embedded_by_the_query_tower(
    tiny_model: Path, documents: list[Document], queries: list[str], tmp_path: Path
) -> None:
    model = make_model(tiny_model, documents, PQ, tie=False)
    with torch.no_grad():
        for parameter in model.query_encoder.parameters():
            parameter.mul_(1.1)
    model.save(tmp_path / "model")
    export(tmp_path / "model", documents, tmp_path / "index")
    scores, _ = Searcher(tmp_path / "index").search(queries, k=5)
    exact = exact_scores(model, documents, queries)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :5], rtol=0, atol=1e-5)


def test_queries_are_cut_at_the_length_of_queries(index_folder: Path) -> None:
    searcher, words = Searcher(index_folder), [f"w{i}" for i in range(40)]
    short, long = " ".join(words[:20]), " ".join(words)  # both longer than 16 tokens, one than 32
    np.testing.assert_array_equal(searcher.search([short])[0], searcher.search([long])[0])


def test_more_results_than_documents_are_cut_at_the_corpus(index_folder: Path, queries: list[str]) -> None:
    scores, ids = Searcher(index_folder).search(queries[:2], k=1000)
    assert scores.shape == (2, N)
    assert all(len(set(names)) == N for names in ids)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(index_folder: Path, queries: list[str], k: int) -> None:
    with pytest.raises(InputError, match=f"k must be at least 1, got {k}"):
        Searcher(index_folder).search(queries, k=k)


@pytest.mark.parametrize("shape", [(3, 31), (3, 33), (32,), (1, 3, 32)])
def test_vectors_of_another_shape_are_refused(index_folder: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=rf"must have shape \(B, 32\), got {re.escape(str(shape))}"):
        Searcher(index_folder).search_vectors(np.zeros(shape, dtype=np.float32))


def test_vectors_of_float64_are_taken(index_folder: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 32))
    searcher = Searcher(index_folder)
    expected = searcher.search_vectors(x.astype(np.float32))
    np.testing.assert_array_equal(searcher.search_vectors(x)[1], expected[1])


def test_no_query_is_refused(index_folder: Path) -> None:
    with pytest.raises(InputError, match="there is no query to search for"):
        Searcher(index_folder).search([])


# --- the folder ---


def test_folder_is_opened_as_pyserini_does(
    index_folder: Path, model_folder: Path, documents: list[Document], queries: list[str]
) -> None:
    """pyserini.search.faiss: read_index(DIR/index), and the lines of DIR/docid by row."""
    index = faiss.read_index(str(index_folder / "index"))
    with (index_folder / "docid").open() as file:
        ids = [line.rstrip() for line in file.readlines()]
    vectors = embed_queries(DualEncoder.load(model_folder), queries).numpy()
    _, rows = index.search(vectors, 5)
    assert ids == [document.id for document in documents]
    assert [[ids[row] for row in result] for result in rows] == Searcher(index_folder).search(queries, 5)[1]


def test_folder_holds_what_the_index_can_be_built_again_from(index_folder: Path) -> None:
    assert {path.name for path in index_folder.iterdir()} == {
        "codes.u8",
        "head",
        "index",
        "sample.safetensors",
        "docid",
        "index_infos.json",
        "encoder",
        "documents.jsonl",
        "documents.offsets",
        "experiment.yaml",
        "manifest.json",
    }


def test_manifest_names_the_model_by_its_fingerprint(index_folder: Path, model_folder: Path) -> None:
    manifest = json.loads((index_folder / "manifest.json").read_text())
    assert manifest["model"] == model_fingerprint(model_folder)


def test_report_counts_documents_and_bytes(exported: tuple[Path, ExportReport]) -> None:
    folder, report = exported
    size = (folder / "index").stat().st_size
    assert (report.ntotal, report.code_size, report.index_bytes) == (N, 2, size)


def test_infos_have_the_keys_of_autofaiss(index_folder: Path) -> None:
    infos = json.loads((index_folder / "index_infos.json").read_text())
    assert (infos["nb vectors"], infos["vectors dimension"]) == (N, 32)
    assert infos["size in bytes"] == (index_folder / "index").stat().st_size


def test_reconstruction_error_is_the_mean_relative_one(
    index_folder: Path, model_folder: Path, documents: list[Document]
) -> None:
    infos = json.loads((index_folder / "index_infos.json").read_text())
    model = DualEncoder.load(model_folder)
    x = embed_documents(model, documents)
    with torch.no_grad():
        error = (model.head.decode(model.head.encode(x)) - x).double().norm(dim=1) / x.double().norm(dim=1)
    assert infos["reconstruction error %"] == pytest.approx(100 * error.mean().item(), rel=1e-4)


def test_export_gives_equal_files_for_equal_input(
    index_folder: Path, model_folder: Path, documents: list[Document], tmp_path: Path
) -> None:
    export(model_folder, documents, tmp_path / "again")
    unequal = ("index_infos.json", "manifest.json")  # they hold times
    first, second = files(index_folder), files(tmp_path / "again")
    assert {name for name in first if first[name] != second.get(name)} <= set(unequal)


# --- texts ---


@pytest.mark.parametrize("row", [0, 1, N // 2, N - 1])
def test_stored_document_is_that_of_the_corpus(
    index_folder: Path, documents: list[Document], row: int
) -> None:
    assert Searcher(index_folder).document(row) == documents[row]


def test_corpus_encoded_in_several_chunks_gives_the_same_files(
    index_folder: Path,
    model_folder: Path,
    documents: list[Document],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("index.encode.BLOCK", 32)
    export(model_folder, documents, tmp_path / "index")
    for name in ("docid", "documents.jsonl", "documents.offsets"):
        assert (tmp_path / "index" / name).read_bytes() == (index_folder / name).read_bytes()


def test_corpus_encoded_in_several_chunks_gives_the_same_results(
    index_folder: Path,
    model_folder: Path,
    documents: list[Document],
    queries: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("index.encode.BLOCK", 32)
    export(model_folder, documents, tmp_path / "index")
    scores, _ = Searcher(tmp_path / "index").search(queries)
    np.testing.assert_allclose(scores, Searcher(index_folder).search(queries)[0], rtol=0, atol=1e-5)


def test_stored_texts_may_hold_any_character(model_folder: Path, tmp_path: Path) -> None:
    texts = ["ß\u2028☃\x85", "line\nline\r\n", '"\\', "𝄞"]
    documents = [Document(f"d{i}", text, text) for i, text in enumerate(texts * 5)]
    export(model_folder, documents, tmp_path / "index")
    searcher = Searcher(tmp_path / "index")
    assert [searcher.document(row) for row in range(len(documents))] == documents


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\x0c", "\x1e"])
def test_document_id_may_hold_a_separator_that_ends_no_line(
    model_folder: Path, documents: list[Document], tmp_path: Path, separator: str
) -> None:
    """`read_corpus` takes such ids: only a tab, a space and line ends are refused."""
    identifier = f"a{separator}b"
    changed = [Document(identifier, "", "w1"), *documents[1:]]
    export(model_folder, changed, tmp_path / "index")
    assert Searcher(tmp_path / "index").document_ids[0] == identifier


def test_folder_without_texts_has_no_document(
    model_folder: Path, documents: list[Document], tmp_path: Path
) -> None:
    export(model_folder, documents, tmp_path / "index", store_texts=False)
    assert Searcher(tmp_path / "index").document(0) is None


def test_folder_without_texts_holds_no_text(
    model_folder: Path, documents: list[Document], tmp_path: Path
) -> None:
    export(model_folder, documents, tmp_path / "index", store_texts=False)
    text = documents[0].text.encode()
    assert not [name for name, data in files(tmp_path / "index").items() if text in data]


def test_folder_without_texts_gives_the_same_results(
    index_folder: Path, model_folder: Path, documents: list[Document], queries: list[str], tmp_path: Path
) -> None:
    export(model_folder, documents, tmp_path / "index", store_texts=False)
    assert Searcher(tmp_path / "index").search(queries)[1] == Searcher(index_folder).search(queries)[1]


# --- damage and mismatch ---


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [remove, truncate, flip_a_byte])
@pytest.mark.parametrize("name", ["index", "docid", "documents.jsonl", "encoder/model.safetensors"])
def test_damaged_file_is_an_input_error_that_names_it(
    copied: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(copied / name)
    with pytest.raises(InputError, match=re.escape(f"{copied / name} ")):
        Searcher(copied)


def test_model_folder_in_place_of_an_index_is_refused(model_folder: Path) -> None:
    with pytest.raises(InputError, match="is a model folder, but an index folder is needed"):
        Searcher(model_folder)


def test_index_folder_in_place_of_a_model_is_refused(
    index_folder: Path, documents: list[Document], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is an index folder, but a model folder is needed"):
        export(index_folder, documents, tmp_path / "index")


def test_another_model_is_refused(
    tiny_model: Path, index_folder: Path, documents: list[Document], tmp_path: Path
) -> None:
    make_model(tiny_model, documents, PQ, seed=1).save(tmp_path / "other")
    with pytest.raises(InputError, match=rf"was made with another model than {tmp_path / 'other'}"):
        Searcher(index_folder, model=tmp_path / "other")


# --- publication ---


def test_existing_folder_is_refused(
    index_folder: Path, model_folder: Path, documents: list[Document]
) -> None:
    with pytest.raises(InputError, match=r"index exists already\. Choose another folder"):
        export(model_folder, documents, index_folder)


def test_refused_folder_is_left_as_it_was(
    model_folder: Path, documents: list[Document], copied: Path
) -> None:
    before = files(copied.parent)
    with pytest.raises(InputError):
        export(model_folder, documents[:20], copied)
    assert files(copied.parent) == before


def test_overwritten_folder_holds_the_new_corpus_only(
    model_folder: Path, documents: list[Document], copied: Path
) -> None:
    export(model_folder, documents[:20], copied, overwrite=True, store_texts=False)
    searcher = Searcher(copied)
    assert list(searcher.document_ids) == [document.id for document in documents[:20]]
    assert searcher.document(0) is None


def fail_after(documents: list[Document], count: int) -> Iterator[Document]:
    yield from documents[:count]
    raise InputError("corpus.jsonl:21: not JSON")


@pytest.mark.parametrize("count", [0, 20])
def test_error_in_the_corpus_leaves_nothing_behind(
    model_folder: Path, documents: list[Document], tmp_path: Path, count: int
) -> None:
    with pytest.raises(InputError, match=r"corpus\.jsonl:21"):
        export(model_folder, fail_after(documents, count), tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_error_in_the_corpus_leaves_an_existing_folder_as_it_was(
    model_folder: Path, documents: list[Document], copied: Path
) -> None:
    before = files(copied.parent)
    with pytest.raises(InputError):
        export(model_folder, fail_after(documents, 20), copied, overwrite=True)
    assert files(copied.parent) == before


def test_export_leaves_the_model_folder_as_it_was(
    model_folder: Path, documents: list[Document], tmp_path: Path
) -> None:
    before = files(model_folder)
    export(model_folder, documents, tmp_path / "index")
    assert files(model_folder) == before


def test_corpus_without_a_document_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="document"):
        export(model_folder, [], tmp_path / "index")


def test_one_document_is_enough(model_folder: Path, documents: list[Document], tmp_path: Path) -> None:
    export(model_folder, documents[:1], tmp_path / "index")
    assert Searcher(tmp_path / "index").search(["w1"])[1] == [[documents[0].id]]


# --- kinds ---


@pytest.mark.parametrize("kind", ["pq", "ivfpq"])
def test_kind_that_the_head_does_not_fit_is_refused_before_encoding(
    tiny_model: Path, documents: list[Document], tmp_path: Path, kind: str
) -> None:
    make_model(tiny_model, documents, NoCompressionConfig()).save(tmp_path / "model")
    with pytest.raises(InputError, match=rf"kind '{kind}' cannot carry FlatVectors"):
        export(tmp_path / "model", fail_after([], 0), tmp_path / "index", config=IndexConfig(kind=kind))


def test_flat_index_of_a_quantizer_is_refused(
    model_folder: Path, documents: list[Document], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="kind 'flat' cannot carry ProductCodebooks"):
        export(model_folder, documents, tmp_path / "index", config=IndexConfig(kind="flat"))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"kind": "hnswpq"}, r"index\.kind must be one of auto, flat, .*, got 'hnswpq'"),
        ({"nlist": 4}, r"index\.nlist=4 needs index\.kind ivfpq, got 'auto'"),
    ],
)
def test_faulty_index_config_is_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        IndexConfig(**options)


def test_index_config_without_lists_is_refused() -> None:
    """Where the mistake is made: not after the model is loaded."""
    with pytest.raises(InputError, match="nlist must be at least 1, got 0"):
        IndexConfig(kind="ivfpq", nlist=0)

"""An index handed to other engines scores as it did: bundle, decoded vectors, Lance."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from index import FaissFit, IndexConfig, Searcher, export_index
from index.decoded import write_npy, write_parquet
from index.interchange import CodeSource, read_bundle, write_bundle
from launch.main import main
from retriever import Document, DualEncoderConfig, InputError, embed_documents, read_corpus
from retriever.heads import (
    HeadConfig,
    IVFProductQuantizerConfig,
    IVFResidualQuantizerConfig,
    NoCompressionConfig,
    ProductQuantizerConfig,
    ResidualQuantizerConfig,
)

SIZE = {"num_codebooks": 4, "codebook_bits": 4}
COMPRESSED: dict[str, HeadConfig] = {
    "pq": ProductQuantizerConfig(**SIZE),
    "pq, inner product, no rotation": ProductQuantizerConfig(**SIZE, metric="inner_product", rotation="none"),
    "pq, 3 bits": ProductQuantizerConfig(num_codebooks=4, codebook_bits=3),
    "ivfpq": IVFProductQuantizerConfig(**SIZE, num_lists=8),
    "ivfpq, inner product": IVFProductQuantizerConfig(**SIZE, num_lists=8, metric="inner_product"),
    "rq": ResidualQuantizerConfig(**SIZE),
    "ivfrq": IVFResidualQuantizerConfig(**SIZE, num_lists=8),
}


@pytest.fixture(scope="module")
def documents(tiny_data: Path) -> list[Document]:
    return list(read_corpus(tiny_data))


@pytest.fixture(scope="module")
def indexes(
    tiny_model: Path, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("indexes")
    heads = {**COMPRESSED, "none": NoCompressionConfig()}
    found = {}
    for name, head in heads.items():
        torch.manual_seed(0)
        model = DualEncoderConfig(encoder=str(tiny_model), document_max_length=32).build(head).eval()
        model.head.warm_start(embed_documents(model, documents), FaissFit(), 0)
        model.save(root / f"{name} model", files={"experiment.yaml": "seed: 1"})
        found[name] = root / name
        options = {"config": IndexConfig(), "device": "cpu", "progress": False}
        export_index(root / f"{name} model", documents, found[name], **options)
    return found


@pytest.fixture
def queries() -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("index.interchange", "index.decoded"):
        monkeypatch.setattr(f"{module}.BLOCK", 32)  # of 80 documents


def exact_scores(searcher: Searcher, queries: np.ndarray) -> np.ndarray:
    """Return the index's score of every document, (B, n) in the order of the index."""
    count = len(searcher.document_ids)
    lists = (
        searcher.faiss_index if "IVF" in type(faiss.downcast_index(searcher.faiss_index)).__name__ else None
    )
    inner = faiss.try_extract_index_ivf(searcher.faiss_index)
    found, rows = searcher.search_vectors(queries, count, nprobe=inner.nlist if inner or lists else None)
    scores = np.empty_like(found)
    np.put_along_axis(scores, rows, found, axis=1)
    return scores


def scores_of(vectors: np.ndarray, queries: np.ndarray, metric: str) -> np.ndarray:
    products = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    if metric == "inner_product":
        return products
    return 1 - ((queries**2).sum(1)[:, None] + (vectors.astype(np.float64) ** 2).sum(1) - 2 * products) / 2


def unpacked(codes: np.ndarray, lists: np.ndarray | None, nlist: int, nbits: int) -> np.ndarray:
    """Return FAISS's rows of codes, by a packer of this test's own."""
    bits = (codes[:, :, None] >> np.arange(nbits)) & 1
    rows = np.packbits(bits.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    if lists is None or nlist == 1:
        return rows
    return np.hstack([lists.astype("<u1")[:, None], rows])


# --- bundle ---


@pytest.mark.parametrize("name", COMPRESSED)
def test_decoded_bundle_scores_as_the_index(
    indexes: dict[str, Path], queries: np.ndarray, tmp_path: Path, name: str
) -> None:
    write_bundle(indexes[name], tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    vectors = np.concatenate([bundle.decode(0, 31), bundle.decode(31, 80)])
    wanted = exact_scores(Searcher(indexes[name]), queries)
    np.testing.assert_allclose(scores_of(vectors, queries, bundle.metric), wanted, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, head in COMPRESSED.items() if "pq" in head.name])
def test_faiss_index_from_a_bundle_alone_finds_the_same(
    indexes: dict[str, Path], queries: np.ndarray, tmp_path: Path, name: str
) -> None:
    write_bundle(indexes[name], tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    metric = faiss.METRIC_INNER_PRODUCT if bundle.metric == "inner_product" else faiss.METRIC_L2
    if bundle.centroids is None or bundle.lists is None:
        nlist, built = 1, faiss.IndexPQ(32, len(bundle.codebooks), bundle.nbits, metric)
    else:
        nlist = len(bundle.centroids)
        coarse = faiss.IndexFlat(32, metric)
        coarse.add(bundle.centroids)
        built = faiss.IndexIVFPQ(coarse, 32, nlist, len(bundle.codebooks), bundle.nbits, metric)
        built.by_residual, built.nprobe = bundle.by_residual, nlist
    faiss.copy_array_to_vector(bundle.codebooks.ravel(), built.pq.centroids)
    built.is_trained = True
    built.add_sa_codes(unpacked(bundle.codes, bundle.lists, nlist, bundle.nbits))
    rotated = queries if bundle.rotation is None else queries @ bundle.rotation.T
    found, rows = built.search(np.ascontiguousarray(rotated), 80)
    scores = np.empty_like(found)
    np.put_along_axis(scores, rows, found if bundle.metric == "inner_product" else 1 - found / 2, axis=1)
    np.testing.assert_allclose(scores, exact_scores(Searcher(indexes[name]), queries), atol=1e-5)


def test_bundle_keeps_codes_lists_and_ids(indexes: dict[str, Path], tmp_path: Path) -> None:
    write_bundle(indexes["ivfpq"], tmp_path / "bundle")
    bundle, source = read_bundle(tmp_path / "bundle"), CodeSource(indexes["ivfpq"])
    packed = np.fromfile(indexes["ivfpq"] / "codes.u8", np.uint8).reshape(80, -1)
    assert (bundle.codes.dtype, bundle.codes.shape, bundle.by_residual) == (np.uint8, (80, 4), True)
    assert bundle.lists is not None
    assert unpacked(bundle.codes, bundle.lists, 8, 4).tobytes() == packed.tobytes()
    assert list(bundle.ids) == list(source.ids)


def test_bundle_of_an_uncompressed_index_is_refused(indexes: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds FlatVectors, which has no codebooks.*--to npy"):
        write_bundle(indexes["none"], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["codes", "lists"])
def test_bundle_with_numbers_out_of_range_is_refused(
    indexes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_bundle(indexes["ivfpq"], tmp_path / "bundle")
    path = tmp_path / "bundle" / "arrays.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + size])[name]["data_offsets"][0] + 8 + size
    content[start : start + 2] = b"\xff\x7f"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"arrays\.safetensors is damaged"):
        read_bundle(tmp_path / "bundle")
    monkeypatch.setattr("index.interchange.check_folder", lambda *_: {})
    with pytest.raises(InputError, match=f"contradicts itself: {name} do not fit"):
        read_bundle(tmp_path / "bundle")


# --- decoded vectors ---


@pytest.mark.parametrize("name", [*COMPRESSED, "none"])
def test_npy_scores_as_the_index(
    indexes: dict[str, Path], queries: np.ndarray, tmp_path: Path, name: str
) -> None:
    report = write_npy(indexes[name], tmp_path / "out")
    vectors = np.load(tmp_path / "out" / "vectors.npy")
    searcher = Searcher(indexes[name])
    np.testing.assert_allclose(
        scores_of(vectors, queries, report.metric), exact_scores(searcher, queries), atol=1e-5
    )
    assert (tmp_path / "out" / "docid").read_bytes() == (indexes[name] / "docid").read_bytes()
    assert (report.lossless, report.bytes_after) == (True, 128)


def test_float16_says_how_much_it_rounds(indexes: dict[str, Path], tmp_path: Path) -> None:
    write_npy(indexes["pq"], tmp_path / "exact")
    report = write_npy(indexes["pq"], tmp_path / "half", dtype="float16")
    exact, half = (np.load(tmp_path / name / "vectors.npy") for name in ("exact", "half"))
    assert half.dtype == np.float16
    assert report.rounding == np.abs(exact - half.astype(np.float32)).max() > 0
    assert (report.lossless, report.bytes_before, report.bytes_after) == (False, 2, 64)


@pytest.mark.parametrize("texts", [True, False])
def test_parquet_holds_ids_vectors_and_texts(
    indexes: dict[str, Path], documents: list[Document], tmp_path: Path, texts: bool
) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow.parquet import read_table

    write_npy(indexes["ivfpq"], tmp_path / "npy")
    write_parquet(
        indexes["ivfpq"], tmp_path / "out", texts=texts, rows_per_file=40
    )  # blocks of 32: 64 a file
    assert [path.name for path in sorted((tmp_path / "out").glob("*.parquet"))] == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    table = read_table(sorted((tmp_path / "out").glob("*.parquet")))
    assert table["id"].to_pylist() == [document.id for document in documents]
    vectors = np.array(table["vector"].to_pylist(), dtype=np.float32)
    np.testing.assert_array_equal(vectors, np.load(tmp_path / "npy" / "vectors.npy"))
    assert ("text" in table.column_names) == texts
    if texts:
        assert table["text"].to_pylist() == [document.text for document in documents]


# --- Lance ---


@pytest.mark.parametrize("name", COMPRESSED)
def test_lance_finds_what_faiss_finds(
    indexes: dict[str, Path], queries: np.ndarray, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("lance")
    from index.lance_dataset import search_lance, write_lance

    write_lance(indexes[name], tmp_path / "out")
    scores, ids = search_lance(tmp_path / "out", queries, 80)
    searcher = Searcher(indexes[name])
    wanted = exact_scores(searcher, queries)
    row_of = {name: row for row, name in enumerate(searcher.document_ids)}
    rows = np.array([[row_of[name] for name in found] for found in ids])
    np.testing.assert_allclose(scores, np.take_along_axis(wanted, rows, axis=1), atol=1e-5)
    assert all(len(set(found)) == 80 for found in ids)


@pytest.mark.parametrize("name", ["ivfpq", "ivfpq, inner product"])
def test_lance_probes_the_same_lists(
    indexes: dict[str, Path], queries: np.ndarray, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("lance")
    from index.lance_dataset import search_lance, write_lance

    write_lance(indexes[name], tmp_path / "out")
    scores, _ = search_lance(tmp_path / "out", queries, 5, nprobe=3)
    wanted, rows = Searcher(indexes[name]).search_vectors(queries, 5, nprobe=3)
    assert (rows >= 0).all()
    np.testing.assert_allclose(scores, wanted, atol=1e-5)


def test_lance_index_is_of_our_codebooks(indexes: dict[str, Path], tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    from index.lance_dataset import write_lance

    reports = {
        name: write_lance(indexes[name], tmp_path / name) for name in ("ivfpq", "ivfpq, inner product")
    }
    kinds = {
        name: lance.dataset(str(tmp_path / name / "documents.lance")).stats.index_stats("vector_idx")[
            "index_type"
        ]
        for name in reports
    }
    assert kinds == {"ivfpq": "IVF_PQ", "ivfpq, inner product": "IVF_FLAT"}
    assert [report.bytes_after for report in reports.values()] == [132, 256]


def test_lance_of_an_uncompressed_index_is_refused(indexes: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lance")
    from index.lance_dataset import write_lance

    with pytest.raises(InputError, match="is uncompressed: there is no codebook for Lance"):
        write_lance(indexes["none"], tmp_path / "out")


# --- command line ---


@pytest.mark.parametrize("form", ["bundle", "npy", "parquet"])
def test_convert_prints_one_json_object(
    indexes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    words = ["convert", str(indexes["pq"]), "--to", form, "--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["to"], printed["ntotal"], printed["bytes_before"]) == (form, 80, 2)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_convert_states_bytes_and_loss(
    indexes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "convert",
        str(indexes["pq"]),
        "--to",
        "npy",
        "--out",
        str(tmp_path / "out"),
        "--dtype",
        "float16",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "80 documents, 32 dimensions, 2 bytes each before, 64 after (32.0 times)" in printed
    assert "numbers rounded by up to" in printed
    assert "not cosine; the engine's own quantization or graph adds error" in printed


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--to", "milvus"], "milvus"),
        (
            ["--to", "bundle", "--dtype", "float16"],
            "--dtype float16 needs --to npy or parquet, got --to bundle",
        ),
        (["--to", "npy", "--texts", "false"], "--texts false needs --to parquet or lance, got --to npy"),
    ],
)
def test_convert_refuses_what_it_does_not_know(
    indexes: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    fault: str,
) -> None:
    assert main(["convert", str(indexes["pq"]), "--out", str(tmp_path / "out"), *words]) == 2
    assert fault in capsys.readouterr().err


def test_convert_refuses_what_is_no_index_and_what_exists(
    indexes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tmp_path / "no"), "--to", "npy", "--out", str(tmp_path / "out")]) == 2
    assert "is not a folder. Give the path of an index folder." in capsys.readouterr().err
    assert main(["convert", str(indexes["pq"]), "--to", "npy", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err

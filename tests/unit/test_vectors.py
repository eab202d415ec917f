"""Vector files and the data made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from retriever import (
    Document,
    DualEncoderConfig,
    Encoder,
    InputError,
    embed_documents,
    read_corpus,
    read_data,
    read_qrels,
    read_queries,
)
from retriever.data import join_tokens
from retriever.heads import NoCompressionConfig, ProductQuantizerConfig
from retriever.sources import count_documents
from retriever.vector_files import VectorFile
from retriever.vector_input import VectorInput

RANDOM = np.random.default_rng(0)


def write(path: Path, table: np.ndarray) -> Path:
    """Write a table in the format of the file's name."""
    if path.suffix == ".npy":
        np.save(path, table)
    elif path.suffix == ".hdf5":
        with h5py.File(path, "w") as file:
            file["rows"] = table
        return path.with_name(f"{path.name}:rows")
    else:
        kind = {".fvecs": "<f4", ".bvecs": "u1", ".ivecs": "<i4"}[path.suffix]
        head = np.full((len(table), 1), table.shape[1], "<i4").view("u1")
        path.write_bytes(np.hstack([head, table.astype(kind).view("u1").reshape(len(table), -1)]).tobytes())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base of 40, learn of 30, 8 queries, without ground truth."""
    for name, count in (("base", 40), ("learn", 30), ("query", 8)):
        write(tmp_path / f"{name}.npy", RANDOM.normal(size=(count, 6)).astype(np.float32))
    return tmp_path


@pytest.mark.parametrize("name", ["a.fvecs", "a.bvecs", "a.npy", "a.hdf5"])
def test_a_file_gives_the_vectors_that_were_written(tmp_path: Path, name: str) -> None:
    table = RANDOM.integers(0, 255, (7, 5)).astype(np.float32)
    file = VectorFile(write(tmp_path / name, table))
    assert (len(file), file.dim) == (7, 5)
    assert (file.vectors(2, 6) == table[2:6]).all()


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "uint8", "int8"])
def test_every_kind_of_number_becomes_float32(tmp_path: Path, kind: str) -> None:
    table = RANDOM.integers(0, 100, (4, 3)).astype(kind)
    found = VectorFile(write(tmp_path / "a.npy", table)).vectors(0, 4)
    assert found.dtype == np.float32
    assert (found == table.astype(np.float32)).all()


def broken_rows(path: Path) -> None:
    table = np.array([[3, 1, 2, 3], [4, 1, 2, 3]], "<i4")
    path.write_bytes(table.tobytes())


Write = Callable[[Path], object]
FAULTS: dict[str, tuple[str, Write, str]] = {
    "missing": ("a.npy", lambda path: None, r"is not there\. Give a vector file"),
    "one axis": ("a.npy", lambda path: np.save(path, np.zeros(3, np.float32)), r"got shape \(3,\)"),
    "empty": ("a.npy", lambda path: np.save(path, np.zeros((0, 3))), r"got shape \(0, 3\)"),
    "texts": ("a.npy", lambda path: np.save(path, np.array([["a"]])), r"vectors are float16"),
    "nan": ("a.npy", lambda path: np.save(path, np.array([[1.0], [np.nan]])), r"row 1 holds nan"),
    "no numpy": ("a.npy", lambda path: path.write_text("hello"), r"is not a NumPy table"),
    "cut": ("a.fvecs", lambda path: path.write_bytes(b"\x03\0\0\0\0\0"), r"6 bytes are no whole number"),
    "rows": ("a.fvecs", broken_rows, r"row 1 says 4 dimensions, row 0 3"),
    "no hdf5": ("a.hdf5:rows", lambda path: Path(str(path)[:-5]).write_text("x"), r"is not HDF5"),
    "data set": (
        "a.hdf5:other",
        lambda path: write(path.with_name("a.hdf5"), np.zeros((2, 2))),
        r"no data set 'other'.*:NAME with one of rows",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_file_is_refused_with_its_fault(tmp_path: Path, name: str) -> None:
    file, make, fault = FAULTS[name]
    make(tmp_path / file)
    with pytest.raises(InputError, match=fault):
        VectorFile(tmp_path / file).vectors(0, 9)


def test_hdf5_without_h5py_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.hdf5", np.zeros((2, 2)))
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(InputError, match=r"pip install 'endex\[hdf5\]'"):
        VectorFile(path)


def test_the_corpus_is_base_named_by_row(folder: Path) -> None:
    base = np.load(folder / "base.npy")
    found = list(read_corpus(folder, 3, 20))
    assert [document.id for document in found] == [str(row) for row in range(3, 20)]
    assert all((document.vector == base[int(document.id)]).all() for document in found)
    assert count_documents(folder) == 40


def test_training_rows_are_learn_and_each_is_its_own_document(folder: Path) -> None:
    data = read_data(folder, "train")
    assert list(data.qrels) == list(data.documents) == [str(row) for row in range(30)]
    assert all(judged == {name: 1} for name, judged in data.qrels.items())
    assert (data.queries["7"] == np.load(folder / "learn.npy")[7]).all()


def test_without_learn_base_trains(folder: Path) -> None:
    (folder / "learn.npy").unlink()
    assert len(read_data(folder, "train").documents) == 40


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_neighbours_that_are_not_given_are_the_exact_ones(folder: Path, metric: str, normalize: bool) -> None:
    q, x = (np.load(folder / f"{name}.npy").astype(np.float64) for name in ("query", "base"))
    if normalize:
        q, x = (table / np.linalg.norm(table, axis=1, keepdims=True) for table in (q, x))
    scores = q @ x.T if metric == "inner_product" else -((q[:, None] - x) ** 2).sum(2)
    expected = {str(query): {str(row): 1} for query, row in enumerate(scores.argmax(1))}
    assert read_qrels(folder, "test", metric=metric, normalize=normalize) == expected


def test_neighbours_beyond_the_first_piece_are_found(tmp_path: Path) -> None:
    base = RANDOM.normal(size=(9000, 4)).astype(np.float32)
    write(tmp_path / "base.npy", base)
    write(tmp_path / "query.npy", base[[8999, 5000, 0]] + 1e-4)
    assert read_qrels(tmp_path, "test") == {"0": {"8999": 1}, "1": {"5000": 1}, "2": {"0": 1}}


@pytest.mark.parametrize("suffix", ["ivecs", "npy"])
def test_given_neighbours_are_taken_as_they_are(folder: Path, suffix: str) -> None:
    write(folder / f"groundtruth.{suffix}", np.arange(16).reshape(8, 2))
    assert read_qrels(folder, "test") == {str(q): {str(2 * q): 1} for q in range(8)}


def test_inrias_names_are_known(folder: Path) -> None:
    for path in folder.iterdir():
        path.rename(folder / f"sift_{path.name}")
    assert len(read_data(folder, "dev").queries) == 8


def test_an_ann_benchmarks_file_is_a_folder(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["train"], file["test"] = RANDOM.normal(size=(20, 3)), RANDOM.normal(size=(2, 3))
        file["neighbors"] = np.array([[4, 1], [2, 3]])
    assert read_data(tmp_path / "a.hdf5", "test").qrels == {"0": {"4": 1}, "1": {"2": 1}}


def test_queries_held_out_of_a_lone_file_are_not_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy", RANDOM.normal(size=(50, 3)))
    train, dev = read_data(path, "train"), read_data(path, "dev")
    assert len(dev.queries) == 5
    assert set(dev.queries).isdisjoint(train.documents)
    assert {*dev.queries, *train.documents} == {str(row) for row in range(50)}
    x = np.load(path)
    for query, judged in dev.qrels.items():
        others = [int(name) for name in dev.documents]
        best = others[((x[others] - x[int(query)]) ** 2).sum(1).argmin()]
        assert judged == {str(best): 1}


SETS: dict[str, tuple[Write, str]] = {
    "dimensions": (
        lambda folder: write(folder / "query.npy", np.zeros((2, 5))),
        r"query\.npy has 5 dimensions and .*base\.npy 6",
    ),
    "two": (
        lambda folder: write(folder / "base.fvecs", np.zeros((2, 6))),
        r"base\.fvecs and base\.npy for base",
    ),
    "truth rows": (
        lambda folder: write(folder / "groundtruth.ivecs", np.zeros((3, 1))),
        r"has 3 rows for the 8 queries",
    ),
    "truth range": (
        lambda folder: write(folder / "groundtruth.ivecs", np.full((8, 1), 40)),
        r"names row 40, but .* has 40 vectors",
    ),
    "truth kind": (
        lambda folder: write(folder / "groundtruth.npy", np.zeros((8, 1))),
        r"must hold row numbers .* got float64",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_files_that_do_not_fit_together_are_refused(folder: Path, name: str) -> None:
    change, fault = SETS[name]
    change(folder)
    with pytest.raises(InputError, match=fault):
        read_data(folder, "dev")


def test_a_folder_without_queries_has_none_to_judge(folder: Path) -> None:
    (folder / "query.npy").unlink()
    for read in (read_queries, lambda source: read_qrels(source, "test")):
        with pytest.raises(InputError, match=r"has no quer"):
            read(folder)


def test_a_standardized_tower_has_mean_zero_and_mean_squared_length_one() -> None:
    x = torch.from_numpy(RANDOM.normal(3, 50, (500, 7)).astype(np.float32))
    y = VectorInput.standardizing(x)(x).double()
    assert y.mean(0).abs().max() < 1e-5
    assert abs(y.square().sum(1).mean().item() - 1) < 1e-5


def test_equal_vectors_cannot_be_standardized() -> None:
    with pytest.raises(InputError, match="all training vectors are equal"):
        VectorInput.standardizing(torch.ones(4, 3))


@pytest.mark.parametrize(
    ("metric", "standardized"), [("l2", True), ("inner_product", False)], ids=["l2", "inner product"]
)
def test_towers_are_standardized_where_that_keeps_the_order(
    folder: Path, metric: str, standardized: bool
) -> None:
    documents = read_data(folder, "train").documents
    head = ProductQuantizerConfig(num_codebooks=2, metric=metric)
    model = DualEncoderConfig(encoder="vectors").build(head, documents)
    y = embed_documents(model, list(documents.values()))
    x = torch.from_numpy(np.load(folder / "learn.npy"))
    assert torch.allclose(y, x) is not standardized
    assert y.mean(0).abs().max().item() < 1e-5 or not standardized


def test_normalized_vectors_are_unit_before_they_are_standardized(folder: Path) -> None:
    documents = read_data(folder, "train").documents
    config = DualEncoderConfig(encoder="vectors", normalize=True)
    model = config.build(ProductQuantizerConfig(num_codebooks=2), documents)
    tower = model.query_encoder.backbone
    y = embed_documents(model, list(documents.values()))
    lengths = (y * tower.scale + tower.mean).norm(dim=1)
    assert (lengths - 1).abs().max() < 1e-5


@pytest.mark.parametrize("normalize", [False, True])
def test_a_saved_tower_gives_the_same_vectors(tmp_path: Path, folder: Path, normalize: bool) -> None:
    documents = read_data(folder, "train").documents
    config = DualEncoderConfig(encoder="vectors", normalize=normalize)
    tower = config.build(ProductQuantizerConfig(num_codebooks=2), documents).query_encoder
    tower.save(tmp_path / "tower")
    tokens = tower.tokenize(list(read_queries(folder).values()))
    assert torch.equal(Encoder.load(tmp_path / "tower")(tokens), tower(tokens))


FAULTY_TOWERS = [
    ({"pooling": "mean"}, ProductQuantizerConfig(num_codebooks=2), r"Leave out document_encoder, pooling"),
    ({"document_encoder": "other"}, ProductQuantizerConfig(num_codebooks=2), r"has no other tower"),
    (
        {"standardize": True},
        NoCompressionConfig(),
        r"changes the order by inner product\. Set the head's metric l2",
    ),
]


@pytest.mark.parametrize(("options", "head", "fault"), FAULTY_TOWERS)
def test_settings_that_towers_of_vectors_have_not_are_refused(
    folder: Path, options, head, fault: str
) -> None:
    with pytest.raises(InputError, match=fault):
        DualEncoderConfig(encoder="vectors", **options).build(head, read_data(folder, "train").documents)


def test_towers_of_vectors_refuse_texts() -> None:
    tower = VectorInput.identity(3)
    with pytest.raises(InputError, match=r"takes vectors of 3 dimensions, got the text 'hello'"):
        tower.gather(["hello"])
    with pytest.raises(InputError, match=r"takes vectors of 3 dimensions, got one of shape \(4,\)"):
        tower.gather([np.zeros(4, np.float32)])
    texts = {"a": Document("a", "", "hello")}
    with pytest.raises(InputError, match=r"needs vectors to train on, got texts"):
        DualEncoderConfig(encoder="vectors").build(NoCompressionConfig(), texts)


def test_towers_of_texts_refuse_vectors(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"takes texts, got a vector\. Set model\.encoder vectors"):
        Encoder.load(tiny_model).tokenize([np.zeros(3, np.float32)])


def test_batches_of_vectors_are_joined_row_by_row() -> None:
    first, second = torch.rand(2, 3), torch.rand(4, 3)
    joined = join_tokens({"vectors": first}, {"vectors": second})["vectors"]
    assert torch.equal(joined, torch.cat([first, second]))

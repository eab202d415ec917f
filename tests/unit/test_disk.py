"""Documents on disk are those in memory, found without reading the corpus."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pyarrow import Table, parquet

from retriever import Document, InputError, read_corpus, read_data
from retriever.data import document_key
from retriever.disk import (
    DiskDocuments,
    JoinedDocuments,
    NamedDocuments,
    document_ids,
    document_keys,
    document_rows,
    open_documents,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(params=["jsonl", "hub"])
def source(request: pytest.FixtureRequest, tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny corpus as JSON lines with blank ones between, and as a Hub data set of Arrow tables."""
    lines = (tiny_data / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    folder = tmp_path / request.param
    folder.mkdir()
    if request.param == "jsonl":
        (folder / "corpus.jsonl").write_text(
            "\n" + "\n \n".join(lines), encoding="utf-8"
        )  # no newline at the end
        return folder
    parquet.write_table(Table.from_pylist([json.loads(line) for line in lines]), folder / "corpus.parquet")
    card = "---\nconfigs:\n- config_name: corpus\n  data_files:\n  - split: corpus\n    path: corpus.parquet\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def test_documents_on_disk_are_those_in_memory_in_their_order(source: Path) -> None:
    expected = {document.id: document for document in read_corpus(source)}
    found = open_documents(source)
    assert list(found.items()) == list(expected.items())
    assert len(found) == 80


def test_documents_are_found_by_row(source: Path) -> None:
    documents = open_documents(source)
    ids, rows = document_ids(documents), document_rows(documents)
    expected = list(read_corpus(source))
    assert [ids[row] for row in (0, 79, -1)] == ["d0", "d79", "d79"]
    assert rows[10:13] == expected[10:13]
    with pytest.raises(IndexError):
        rows[80]


def test_an_unknown_id_is_not_in_it(source: Path) -> None:
    documents = open_documents(source)
    assert "d80" not in documents
    assert "d7" in documents
    with pytest.raises(KeyError):
        documents["d80"]


def test_ids_of_one_hash_are_told_apart(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retriever.disk.identifier_hash", lambda name: len(name) % 2)
    documents = open_documents(source)
    assert [documents[f"d{row}"].id for row in range(80)] == [f"d{row}" for row in range(80)]


def test_keys_come_from_the_hashes(source: Path) -> None:
    assert document_keys(open_documents(source)).tolist() == [document_key(f"d{row}") for row in range(80)]


def test_a_corpus_is_read_once_and_again_when_it_has_changed(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes((tiny_data / "corpus.jsonl").read_bytes())
    open_documents(path)
    with monkeypatch.context() as patch:
        patch.setattr("retriever.disk.read_corpus", lambda _: pytest.fail("read again"))
        assert len(open_documents(path)) == 80
    with path.open("a", encoding="utf-8") as file:
        file.write('{"_id": "new", "text": "a text"}\n')
    assert open_documents(path)["new"] == Document("new", "", "a text")


def test_a_faulty_corpus_is_refused_as_in_memory_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n')
    with pytest.raises(InputError, match=r"corpus\.jsonl:2: the document id 'a' occurs a second time"):
        open_documents(tmp_path)
    assert not any((tmp_path / "cache").glob("*"))


def test_a_compressed_corpus_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"corpus\.jsonl\.gz is compressed .* gunzip -k"):
        open_documents(tmp_path)


def test_texts_are_not_held(tmp_path: Path) -> None:
    """20 MB of text, opened for the first time and looked through, in less than 2 MB of Python's memory."""
    with (tmp_path / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for row in range(2000):
            file.write(json.dumps({"_id": f"d{row}", "text": f"{row} " * 2500}) + "\n")
    tracemalloc.start()
    documents = open_documents(tmp_path)
    assert documents["d1234"].text.startswith("1234 1234 ")
    assert sum(len(rows) for rows in map(str, documents)) == 8890
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "corpus.jsonl").stat().st_size > 2e7
    assert peak < 2e6


def test_data_with_documents_on_disk_is_that_in_memory(tiny_data: Path) -> None:
    found, expected = read_data(tiny_data, "dev", on_disk=True), read_data(tiny_data, "dev")
    assert isinstance(found.documents, DiskDocuments)
    assert dict(found.documents) == expected.documents
    assert (found.queries, found.qrels) == (expected.queries, expected.qrels)


def test_a_judgement_of_an_unknown_document_is_refused_on_disk(tiny_data: Path, tmp_path: Path) -> None:
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / name).write_bytes((tiny_data / name).read_bytes())
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/dev.tsv").write_text("q1\tdx\t1\n")
    with pytest.raises(InputError, match=r"dev\.tsv:1: the document 'dx' is not in the corpus"):
        read_data(tmp_path, "dev", on_disk=True)


def test_several_corpora_keep_equal_ids_apart(tiny_data: Path) -> None:
    first, second = {"a": Document("a", "", "x"), "b": Document("b", "", "y")}, open_documents(tiny_data)
    parts = [NamedDocuments(0, first), NamedDocuments(1, second), NamedDocuments(2, first)]
    joined = JoinedDocuments(parts)
    names = ["0:a", "0:b", *(f"1:d{row}" for row in range(80)), "2:a", "2:b"]
    assert list(joined) == names
    assert [joined[name].id for name in names] == names
    ids, rows = document_ids(joined), document_rows(joined)
    assert [ids[row] for row in range(len(joined))] == [rows[row].id for row in range(len(joined))] == names
    assert joined["1:d5"].text == second["d5"].text
    for name in ("3:a", "a", "0:d5", "1:a"):
        assert name not in joined
        with pytest.raises(KeyError):
            joined[name]
    assert document_keys(joined).dtype == np.int64
    assert document_keys(joined).tolist() == [document_key(name) for name in names]

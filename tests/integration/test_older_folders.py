"""Folders that earlier versions wrote open, and answer as they did: tests/folders holds one archive a layout."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from index import IndexConfig, Searcher, export_index, merge_indexes
from index.builders import inverted_file
from retriever import Document, InputError

ARCHIVES = sorted((Path(__file__).parents[1] / "folders").glob("*.tar.gz"))
WITHOUT_CODES = {"2026-11-24"}  # index folders from before codes were kept


@pytest.fixture(
    scope="module", params=[(path, head) for path in ARCHIVES for head in ("pq", "ivfpq")], ids=str
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder named as its archive, with `model`, `index` and `hits.json`."""
    path, head = request.param
    target = tmp_path_factory.mktemp("older") / path.name.removesuffix(".tar.gz")
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later
    with tarfile.open(path) as archive:
        archive.extractall(target, **safely)
    return target / head


def assert_hits(searcher: Searcher, folder: Path) -> None:
    hits = json.loads((folder / "hits.json").read_text())
    scores, ids = searcher.search(hits["queries"], 5)
    np.testing.assert_allclose(scores, np.array(hits["scores"]), atol=1e-5)
    assert ids == hits["ids"]


def config(searcher: Searcher) -> IndexConfig:
    """Return a configuration that probes as many lists as an index does."""
    lists = inverted_file(searcher.faiss_index)
    return IndexConfig(nprobe=lists.nprobe if lists else None)


def test_there_are_archives() -> None:
    assert ARCHIVES


def test_index_answers_as_it_did(folder: Path) -> None:
    assert_hits(Searcher(folder / "index", verify=True), folder)
    assert_hits(Searcher(folder / "index", model=folder / "model"), folder)


def test_model_is_exported_to_the_same_index(folder: Path, tmp_path: Path) -> None:
    searcher = Searcher(folder / "index")
    documents = [searcher.document(row) for row in range(len(searcher.document_ids))]
    assert all(isinstance(document, Document) for document in documents)
    export_index(
        folder / "model", documents, tmp_path / "index", config=config(searcher), device="cpu", progress=False
    )
    assert_hits(Searcher(tmp_path / "index"), folder)


def test_index_is_merged_or_says_why_not(folder: Path, tmp_path: Path) -> None:
    if folder.parent.name in WITHOUT_CODES:
        with pytest.raises(InputError, match="holds no codes, so it cannot be merged"):
            merge_indexes([folder / "index"], tmp_path / "merged")
        return
    merge_indexes([folder / "index"], tmp_path / "merged", config=config(Searcher(folder / "index")))
    assert_hits(Searcher(tmp_path / "merged"), folder)

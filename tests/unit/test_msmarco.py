"""MS MARCO's files are read as the BEIR folder with the same texts and judgements."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from retriever import InputError, read_corpus, read_data, read_queries
from retriever.disk import open_documents
from retriever.sources import count_documents

PASSAGES = [(str(row), f"passage {row} 'quoted' \\ {row % 3}") for row in range(9)]
QUERIES = {"train": [("10", "what is it"), ("11", "who")], "dev": [("12", "where")]}
JUDGED = {"train": [("10", "3"), ("11", "0"), ("11", "8")], "dev": [("12", "5")]}
TRIPLES = [("10", "3", "4"), ("10", "3", "5"), ("10", "3", "4"), ("11", "0", "7")]


def write(path: Path, rows: list[tuple[str, ...]]) -> None:
    content = "".join("\t".join(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "msmarco"
    path.mkdir()
    write(path / "collection.tsv", PASSAGES)
    write(path / "queries.train.tsv", QUERIES["train"])
    write(path / "queries.dev.tsv.gz", QUERIES["dev"])
    write(path / "queries.dev.small.tsv", QUERIES["dev"])  # a part of the others, as published
    for split, judged in JUDGED.items():
        write(path / f"qrels.{split}.tsv", [(query, "0", passage, "1") for query, passage in judged])
    write(path / "qidpidtriples.train.full.2.tsv.gz", TRIPLES)
    return path


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    path = tmp_path / "beir"
    (path / "qrels").mkdir(parents=True)
    queries = [*QUERIES["dev"], *QUERIES["train"]]
    for name, rows in (("corpus", PASSAGES), ("queries", queries)):
        (path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"_id": one, "text": text}) + "\n" for one, text in rows)
        )
    for split, judged in JUDGED.items():
        (path / f"qrels/{split}.tsv").write_text("".join(f"{q}\t{d}\t1\n" for q, d in judged))
    negatives = {"10": ["4", "5"], "11": ["7"]}
    lines = [json.dumps({"query-id": query, "negatives": ids}) + "\n" for query, ids in negatives.items()]
    (path / "negatives.jsonl").write_text("".join(lines))
    return path


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_folder_of_msmarco_equals_the_beir_folder(folder: Path, beir: Path, split: str) -> None:
    assert read_data(folder, split) == read_data(beir, split)
    assert list(read_corpus(folder)) == list(read_corpus(beir))
    assert list(read_corpus(folder, 2, 5)) == list(read_corpus(beir, 2, 5))
    assert read_queries(folder) == read_queries(beir)
    assert count_documents(folder) == 9


def test_judgements_come_from_the_triples_where_there_are_no_others(folder: Path) -> None:
    (folder / "qrels.train.tsv").unlink()
    assert read_data(folder, "train").qrels == {"10": {"3": 1}, "11": {"0": 1}}


def test_the_collection_stays_on_disk(folder: Path, tmp_path: Path) -> None:
    found = open_documents(folder, tmp_path / "cache")
    assert list(found.values()) == list(read_corpus(folder))


@pytest.mark.parametrize("name", ["triples.train.small.tsv", "triples.tsv.gz"])
def test_triples_of_texts_give_pairs_and_negatives(tmp_path: Path, name: str) -> None:
    texts = dict(PASSAGES) | dict(QUERIES["train"])
    write(tmp_path / name, [tuple(texts[one] for one in triple) for triple in TRIPLES])
    data = read_data(tmp_path / name, "train")
    back = {one: document.text for one, document in data.documents.items()}
    pairs = {data.queries[query]: {back[d] for d in judged} for query, judged in data.qrels.items()}
    assert pairs == {"what is it": {texts["3"]}, "who": {texts["0"]}}
    negatives = {data.queries[query]: [back[d] for d in given] for query, given in data.negatives.items()}
    assert negatives == {"what is it": [texts["4"], texts["5"]], "who": [texts["7"]]}
    assert len(data.documents) == 5


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("collection.tsv", [("1", "a", "b")], "collection.tsv:1: expected 2 fields between tabs, got 3"),
        ("collection.tsv", [("1", "a"), ("1", "b")], "collection.tsv:2: the document id '1' occurs a second"),
        ("qrels.train.tsv", [("10", "0", "3", "yes")], "the relevance must be a whole number, got 'yes'"),
        ("qrels.train.tsv", [("10", "0", "99", "1")], "the document '99' is not in the corpus"),
    ],
)
def test_a_faulty_line_is_named(folder: Path, name: str, rows: list[tuple[str, ...]], message: str) -> None:
    write(folder / name, rows)
    with pytest.raises(InputError, match=re.escape(message)):
        read_data(folder, "train")


def test_a_split_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"neither qrels\.test\.tsv nor qidpidtriples\.test\*\.tsv"):
        read_data(folder, "test")


def test_of_many_negatives_the_first_hundred_are_kept(folder: Path) -> None:
    write(folder / "collection.tsv", [(str(row), f"p {row}") for row in range(300)])
    write(folder / "qidpidtriples.train.full.2.tsv.gz", [("10", "3", str(row)) for row in range(9, 300)])
    assert read_data(folder, "train").negatives["10"] == [str(row) for row in range(9, 109)]

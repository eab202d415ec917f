"""BEIR folders are read as they are written; every fault is named with file, line and remedy."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retriever import Document, InputError, read_corpus, read_data, read_negatives, read_qrels, read_queries

CORPUS = [
    {"_id": "d1", "title": "First", "text": "one ☃"},
    {"_id": "d2", "title": "", "text": "two"},
    {"_id": "d3", "title": "Third", "text": ""},
]
QUERIES = [{"_id": "q1", "text": "what"}, {"_id": "q2", "text": "who"}]
QRELS = [("q1", "d1", 1), ("q1", "d2", 0), ("q2", "d3", 2)]
NEGATIVES = [{"query-id": "q1", "negatives": ["d2", "d3"]}, {"query-id": "q2", "negatives": []}]


def write_lines(path: Path, rows: list[Any]) -> None:
    """Write rows as JSON lines, plain or gzipped by the file's suffix; texts are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a BEIR folder; any table may be given, and JSON lines or TSV lines may be texts."""

    def make(
        corpus: list[Any] = CORPUS,
        queries: list[Any] = QUERIES,
        qrels: list[Any] = QRELS,
        negatives: list[Any] | None = None,
        suffix: str = "jsonl",
    ) -> Path:
        folder = tmp_path / f"data-{suffix}"
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        write_lines(folder / f"corpus.{suffix}", corpus)
        write_lines(folder / f"queries.{suffix}", queries)
        if negatives is not None:
            write_lines(folder / f"negatives.{suffix}", negatives)
        lines = [row if isinstance(row, str) else "\t".join(map(str, row)) for row in qrels]
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
        (folder / "qrels" / "test.tsv").write_text(text, encoding="utf-8")
        return folder

    return make


def place(folder: Path, name: str, line: int) -> str:
    """Return the pattern of the start of an error message: FILE:LINE."""
    return rf"^{re.escape(str(folder / name))}:{line}: "


# --- what is read ---


def test_documents_are_read_in_order(make_folder: Callable[..., Path]) -> None:
    assert list(read_corpus(make_folder())) == [
        Document("d1", "First", "one ☃"),
        Document("d2", "", "two"),
        Document("d3", "Third", ""),
    ]


def test_queries_are_read_by_id(make_folder: Callable[..., Path]) -> None:
    assert read_queries(make_folder()) == {"q1": "what", "q2": "who"}


def test_judgements_are_read_by_query_and_document(make_folder: Callable[..., Path]) -> None:
    assert read_qrels(make_folder(), "test") == {"q1": {"d1": 1, "d2": 0}, "q2": {"d3": 2}}


def test_judgements_without_a_header_are_all_read(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    (folder / "qrels" / "test.tsv").write_text("q1\td1\t1\nq2\td3\t2\n")
    assert read_qrels(folder, "test") == {"q1": {"d1": 1}, "q2": {"d3": 2}}


def test_negative_relevance_is_read(make_folder: Callable[..., Path]) -> None:
    assert read_qrels(make_folder(qrels=[("q1", "d1", 1), ("q1", "d2", -1)]), "test")["q1"]["d2"] == -1


def test_windows_line_ends_change_nothing(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(negatives=NEGATIVES)
    expected = read_data(folder, "test")
    for path in folder.rglob("*.*"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_data(folder, "test") == expected


def test_negatives_are_read_by_query(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(negatives=NEGATIVES)
    assert read_negatives(folder, ["d1", "d2", "d3"]) == {"q1": ["d2", "d3"], "q2": []}


def test_folder_without_negatives_has_none(make_folder: Callable[..., Path]) -> None:
    assert read_negatives(make_folder(), ["d1"]) == {}


def test_gzipped_folder_equals_the_plain_one(make_folder: Callable[..., Path]) -> None:
    plain = read_data(make_folder(negatives=NEGATIVES), "test")
    assert read_data(make_folder(negatives=NEGATIVES, suffix="jsonl.gz"), "test") == plain


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_one_file_is_read_as_a_corpus(make_folder: Callable[..., Path], suffix: str) -> None:
    folder = make_folder(suffix=suffix)
    assert list(read_corpus(folder / f"corpus.{suffix}")) == list(read_corpus(folder))


def test_blank_lines_are_skipped(make_folder: Callable[..., Path]) -> None:
    assert len(list(read_corpus(make_folder(corpus=[CORPUS[0], "", " ", CORPUS[1]])))) == 2


def test_missing_and_null_titles_are_empty(make_folder: Callable[..., Path]) -> None:
    corpus = [{"_id": "d1", "text": "one"}, {"_id": "d2", "title": None, "text": "two"}]
    assert [document.title for document in read_corpus(make_folder(corpus=corpus))] == ["", ""]


def test_integer_ids_are_read_as_texts(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(
        corpus=[{"_id": 1, "title": "", "text": "one"}, {"_id": 2, "title": "", "text": "two"}],
        queries=[{"_id": 7, "text": "what"}],
        qrels=[(7, 1, 1)],
        negatives=[{"query-id": 7, "negatives": ["2"]}],
    )
    data = read_data(folder, "test")
    assert (list(data.documents), data.queries) == (["1", "2"], {"7": "what"})
    assert (data.qrels, data.negatives) == ({"7": {"1": 1}}, {"7": ["2"]})


def test_integer_ids_in_the_negatives_are_read_as_texts(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(negatives=[{"query-id": 7, "negatives": [1, 2]}])
    assert read_negatives(folder, ["1", "2"]) == {"7": ["1", "2"]}


def test_corpus_is_read_one_document_at_a_time(make_folder: Callable[..., Path]) -> None:
    documents = read_corpus(make_folder(corpus=[CORPUS[0], "broken"]))
    assert next(documents).id == "d1"


# --- faults of JSON lines ---


@pytest.mark.parametrize("table", ["corpus", "queries", "negatives"])
@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{'_id': 1}", r"not JSON \(.*\)\. Correct or remove the line: one JSON object a line"),
        ("[1, 2]", r"expected a JSON object, got list\. Correct the line"),
        ("3", r"expected a JSON object, got int\. Correct the line"),
    ],
)
def test_line_that_is_no_json_object_is_named_with_its_place(
    make_folder: Callable[..., Path], table: str, line: str, fault: str
) -> None:
    rows = {"corpus": CORPUS, "queries": QUERIES, "negatives": NEGATIVES}[table]
    folder = make_folder(**{"negatives": NEGATIVES, table: [rows[0], "", line]})
    with pytest.raises(InputError, match=place(folder, f"{table}.jsonl", 3) + fault):
        read_data(folder, "test")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"title": "", "text": "x"}, r"'_id' must be a text without spaces, got None\. Correct"),
        ({"_id": "", "text": "x"}, r"'_id' must be a text without spaces, got ''\. Correct"),
        ({"_id": "a b", "text": "x"}, r"'_id' must be a text without spaces, got 'a b'\. Correct"),
        ({"_id": "a\tb", "text": "x"}, r"'_id' must be a text without spaces, got 'a\\tb'\. Correct"),
        ({"_id": 1.5, "text": "x"}, r"'_id' must be a text without spaces, got 1\.5\. Correct"),
        ({"_id": "d9"}, r"'text' must be a text, got None\. Correct"),
        ({"_id": "d9", "text": ["x"]}, r"'text' must be a text, got \['x'\]\. Correct"),
        ({"_id": "d9", "title": 3, "text": "x"}, r"'title' must be a text, got 3\. Correct"),
        ({"_id": "d1", "text": "x"}, r"the document id 'd1' occurs a second time\. Make the ids unique"),
    ],
    ids=repr,
)
def test_faulty_document_is_named_with_its_place_and_remedy(
    make_folder: Callable[..., Path], row: dict[str, Any], fault: str
) -> None:
    folder = make_folder(corpus=[CORPUS[0], row])
    with pytest.raises(InputError, match=place(folder, "corpus.jsonl", 2) + fault):
        list(read_corpus(folder))


def test_documents_with_a_blank_title_and_no_text_are_kept_and_named(
    make_folder: Callable[..., Path],
) -> None:
    blank = [{"_id": name, "title": "  ", "text": ""} for name in ("d8", "d9")]
    folder = make_folder(corpus=[blank[0], CORPUS[0], blank[1]])
    with pytest.warns(UserWarning, match=r"^2 of the documents have neither .*corpus\.jsonl:3: each is"):
        assert [document.id for document in read_corpus(folder)] == ["d8", CORPUS[0]["_id"], "d9"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "x"}, r"'_id' must be a text without spaces, got None\. Correct"),
        ({"_id": "q9"}, r"'text' must be a text, got None\. Correct"),
        ({"_id": "q9", "text": "\n"}, r"the query 'q9' is empty\. Remove the line"),
        ({"_id": "q1", "text": "x"}, r"the query id 'q1' occurs a second time\. Make the ids unique"),
    ],
    ids=repr,
)
def test_faulty_query_is_named_with_its_place_and_remedy(
    make_folder: Callable[..., Path], row: dict[str, Any], fault: str
) -> None:
    folder = make_folder(queries=[QUERIES[0], row])
    with pytest.raises(InputError, match=place(folder, "queries.jsonl", 2) + fault):
        read_queries(folder)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"query-id": "q2", "negatives": ["d1", "d9"]}, r"the document 'd9' is not in the corpus\. Remove"),
        ({"query-id": "q2", "negatives": "d1"}, r"'negatives' must be a list of document ids, got 'd1'\. "),
        ({"query-id": "q2"}, r"'negatives' must be a list of document ids, got None\. "),
        ({"negatives": ["d1"]}, r"'query-id' must be a text without spaces, got None\. Correct"),
        ({"query-id": "q2", "negatives": [["d1"]]}, r".*\['d1'\]"),
    ],
    ids=repr,
)
def test_faulty_negatives_are_named_with_their_place_and_remedy(
    make_folder: Callable[..., Path], row: dict[str, Any], fault: str
) -> None:
    folder = make_folder(negatives=[NEGATIVES[0], row])
    with pytest.raises(InputError, match=place(folder, "negatives.jsonl", 2) + fault):
        read_data(folder, "test")


# --- faults of judgements ---


@pytest.mark.parametrize(
    "line", ["q1\td1", "q1 d1 1", "q1\td1\t1\t0", "q1\td1\thigh", "q1\td1\t0.5", "q1\td1\t", "q1\td1\t--1"]
)
def test_malformed_judgement_is_named_with_its_place(make_folder: Callable[..., Path], line: str) -> None:
    folder = make_folder(qrels=[QRELS[0], line])
    fault = rf"expected query-id<TAB>corpus-id<TAB>score, got {re.escape(repr(line.rstrip()))}\. Correct"
    with pytest.raises(InputError, match=place(folder, "qrels/test.tsv", 3) + fault):
        read_qrels(folder, "test")


def test_judgement_with_a_digit_that_is_no_number_is_named_with_its_place(
    make_folder: Callable[..., Path],
) -> None:
    folder = make_folder(qrels=["q1\td1\t²"])
    with pytest.raises(InputError, match=place(folder, "qrels/test.tsv", 2) + "expected"):
        read_qrels(folder, "test")


@pytest.mark.parametrize(
    ("judgement", "fault"),
    [
        (("q9", "d1", 1), r"the query 'q9' is not among the queries\. Add it or remove the line"),
        (("q1", "d9", 1), r"the document 'd9' is not in the corpus\. Add it or remove the line"),
    ],
)
def test_judgement_of_an_unknown_id_is_named_with_its_place(
    make_folder: Callable[..., Path], judgement: tuple[str, str, int], fault: str
) -> None:
    folder = make_folder(qrels=[QRELS[0], judgement])
    with pytest.raises(InputError, match=place(folder, "qrels/test.tsv", 3) + fault):
        read_data(folder, "test")


def test_judgements_of_unknown_ids_are_read_where_nothing_is_known(make_folder: Callable[..., Path]) -> None:
    assert read_qrels(make_folder(qrels=[("q9", "d9", 1)]), "test") == {"q9": {"d9": 1}}


def test_missing_split_lists_those_present(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    (folder / "qrels" / "dev.tsv").write_text("q1\td1\t1\n")
    with pytest.raises(InputError, match=r"has no qrels/train\.tsv\. Choose a split: dev, test\."):
        read_qrels(folder, "train")


def test_missing_split_of_a_folder_without_judgements_says_so(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    (folder / "qrels" / "test.tsv").unlink()
    with pytest.raises(InputError, match=r"Choose a split: there is none\."):
        read_qrels(folder, "test")


@pytest.mark.parametrize("qrels", [[], [("q1", "d1", 0)]])
def test_split_without_a_relevant_document_is_refused(
    make_folder: Callable[..., Path], qrels: list[Any]
) -> None:
    with pytest.raises(InputError, match=r"has no relevant document in split 'test'\. Choose another"):
        read_qrels(make_folder(qrels=qrels), "test")


# --- faults of files ---


def test_empty_corpus_is_refused(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"holds no documents\. Give a corpus with at least one"):
        list(read_corpus(make_folder(corpus=[])))


def test_no_queries_are_refused(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"holds no queries\. Give at least one"):
        read_queries(make_folder(queries=[]))


def test_folder_without_a_corpus_says_which_file_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no corpus\.jsonl or corpus\.jsonl\.gz\. Give a folder"):
        list(read_corpus(tmp_path))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_text_that_is_not_utf8_is_named_with_its_place(make_folder: Callable[..., Path], suffix: str) -> None:
    folder = make_folder(suffix=suffix)
    data = json.dumps(CORPUS[0]).encode() + b"\n" + "é".encode("latin-1") + b"\n"
    path = folder / f"corpus.{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(InputError, match=rf"corpus\.{suffix}:\d+: unreadable .* as UTF-8"):
        list(read_corpus(folder))


def test_judgements_that_are_not_utf8_are_an_input_error(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    (folder / "qrels" / "test.tsv").write_bytes("q1\té\t1\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"qrels/test\.tsv"):
        read_qrels(folder, "test")


def no_gzip(data: bytes) -> bytes:
    return b"plain text"


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def broken_stream(data: bytes) -> bytes:
    return data[:10] + bytes([data[10] ^ 0x06]) + data[11:]  # an unknown kind of deflate block


def broken_checksum(data: bytes) -> bytes:
    return data[:-8] + bytes(4) + data[-4:]


@pytest.mark.parametrize("damage", [no_gzip, cut_short, broken_stream, broken_checksum])
def test_damaged_gzip_file_is_an_input_error(
    make_folder: Callable[..., Path], damage: Callable[[bytes], bytes]
) -> None:
    folder = make_folder(suffix="jsonl.gz")
    path = folder / "corpus.jsonl.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"corpus\.jsonl\.gz:\d+: unreadable"):
        list(read_corpus(folder))

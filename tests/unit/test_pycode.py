"""The code search set is deterministic, free of docstrings and complete or not there."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

import launch.pycode
from launch.pycode import MIN_DOCUMENTS, build_pycode

NUM_PACKAGES = 12
FUNCTIONS_PER_PACKAGE = MIN_DOCUMENTS // 8
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")

COUNTER = '''
class Counter(dict):
    """Count how often each word occurs."""

    limit: int = 10
    is_case_sensitive = False
    words = [
        "of several lines",
    ]

    def add(self, word: str, times: int = 1) -> None:
        """Add a word some number of times."""
        # Remark.
        self[word] = self.get(word, 0) + times
        self.clean(self.limit)

    def halve(self) -> None:
        # Remark.
        self.update({word: times // 2 for word, times in self.items()})

    def clean(self, limit: int) -> None: "Drop the rare words."
'''


def make_function(number: int) -> str:
    """Return a function that is no near-copy of another one: the bits of `number` pick its operators."""
    operators = ["+" if bit == "0" else "*" for bit in f"{number:010b}"]
    steps = "".join(f"    total = total {operator} weight\n" for operator in operators)
    ordinal = f"{ORDINALS[number // 10 % 10]} and {ORDINALS[number % 10]}"
    doc = f"Combine :class:`~a.Weight` {number} of the {ordinal} kind. Unsaid: secret{number}."
    docstring = f'"""{doc}\n\n    More text.\n    """'
    return f"def combine_{number}(total, weight):\n    {docstring}\n{steps}    return total\n"


def make_module(numbers: Iterable[int]) -> str:
    return "\n\n".join(make_function(number) for number in numbers)


def make_modules() -> dict[str, str]:
    """Return 12 packages of four modules each, whose 48 units fall into all three splits."""
    modules: dict[str, str] = {}
    for package in range(NUM_PACKAGES):
        numbers = range(package * FUNCTIONS_PER_PACKAGE, (package + 1) * FUNCTIONS_PER_PACKAGE)
        modules |= {f"package_{package}/part_{part}.py": make_module(numbers[part::4]) for part in range(4)}
    return modules


def write_root(root: Path, modules: Iterable[tuple[str, str]]) -> Path:
    for name, source in modules:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return root


def build_with(
    tmp_path: Path, extra: dict[str, str], max_documents: int = 12_000
) -> dict[str, dict[str, str]]:
    """Build in `tmp_path / "out"` from the standard and some extra modules; return documents by title."""
    root = write_root(tmp_path / "root", (make_modules() | extra).items())
    build_pycode(tmp_path / "out", roots=[root], max_documents=max_documents)
    return {row["title"]: row for row in read_jsonl(tmp_path / "out" / "corpus.jsonl.gz")}


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def read_qrels(folder: Path) -> dict[str, list[list[str]]]:
    files = {split: folder / "qrels" / f"{split}.tsv" for split in ("train", "dev", "test")}
    return {
        split: [line.split("\t") for line in path.read_text().splitlines()[1:]]
        for split, path in files.items()
    }


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def relevant_titles(folder: Path, query: str) -> dict[str, list[str]]:
    """Return, of the splits that have the query, the sorted titles of its documents."""
    titles = {row["_id"]: row["title"] for row in read_jsonl(folder / "corpus.jsonl.gz")}
    ids = {row["_id"] for row in read_jsonl(folder / "queries.jsonl.gz") if row["text"] == query}
    found = {
        split: sorted(titles[document] for query_id, document, _ in rows if query_id in ids)
        for split, rows in read_qrels(folder).items()
    }
    return {split: names for split, names in found.items() if names}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build_with(folder, {})
    return folder / "out"


def test_files_created_in_another_order_and_place_give_equal_bytes(built: Path, tmp_path: Path) -> None:
    root = write_root(tmp_path / "elsewhere", reversed(make_modules().items()))
    build_pycode(tmp_path / "again", roots=[root])
    assert read_bytes(tmp_path / "again") == read_bytes(built)


def test_another_file_system_order_gives_equal_bytes_when_reading_stops_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {f"package_{place}/more.py": make_module(range(500 + place, 650, 12)) for place in range(12)}
    root = write_root(tmp_path / "root", (make_modules() | extra).items())
    build_pycode(tmp_path / "out", roots=[root], max_documents=MIN_DOCUMENTS)
    found = sorted(root.rglob("*.py"), reverse=True)
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(found))
    build_pycode(tmp_path / "again", roots=[root], max_documents=MIN_DOCUMENTS)
    monkeypatch.undo()
    assert read_bytes(tmp_path / "again") == read_bytes(tmp_path / "out")


def test_gzip_headers_hold_no_time(built: Path) -> None:
    headers = {path.name: path.read_bytes()[:8] for path in built.glob("*.gz")}
    assert {name: header[4:] for name, header in headers.items()} == {
        "corpus.jsonl.gz": bytes(4),
        "queries.jsonl.gz": bytes(4),
    }


def test_another_hash_seed_gives_equal_bytes(built: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from launch.pycode import build_pycode\n"
    code += "build_pycode(Path(sys.argv[1]), roots=[Path(sys.argv[2])])"
    checkout = Path(launch.pycode.__file__).parents[1]
    for seed in ("1", "2"):
        arguments = [sys.executable, "-c", code, str(tmp_path / seed), str(built.parent / "root")]
        subprocess.run(arguments, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, cwd=checkout)
    assert read_bytes(tmp_path / "1") == read_bytes(tmp_path / "2") == read_bytes(built)


def test_folder_has_the_beir_files_and_a_readme_only(built: Path) -> None:
    qrels = {f"qrels/{split}.tsv" for split in ("train", "dev", "test")}
    assert set(read_bytes(built)) == {"README.md", "corpus.jsonl.gz", "queries.jsonl.gz"} | qrels


def test_nothing_temporary_is_left_beside_the_folder(built: Path) -> None:
    assert {path.name for path in built.parent.iterdir()} == {"out", "root"}


def test_returned_counts_are_those_of_the_files(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", make_modules().items())
    counts = build_pycode(tmp_path / "out", roots=[root])
    sizes = {
        f"{split}_queries": len({row[0] for row in rows})
        for split, rows in read_qrels(tmp_path / "out").items()
    }
    assert counts == {"documents": NUM_PACKAGES * FUNCTIONS_PER_PACKAGE} | sizes


def test_query_is_the_first_sentence_without_markup(built: Path) -> None:
    assert list(relevant_titles(built, "Combine Weight 7 of the first and eighth kind").values()) == [
        ["package_0.part_3.combine_7"]
    ]


def test_no_docstring_text_is_in_a_document(built: Path) -> None:
    texts = [row["text"] for row in read_jsonl(built / "corpus.jsonl.gz")]
    assert not [text for text in texts if "secret" in text or "More text" in text or '"""' in text]


def test_document_is_the_signature_and_the_dedented_body(tmp_path: Path) -> None:
    documents = build_with(tmp_path, {"package_0/counter.py": COUNTER})
    assert documents["package_0.counter.Counter.add"]["text"] == (
        "def add(self, word: str, times: int = 1) -> None:\n"
        "    # Remark.\n"
        "    self[word] = self.get(word, 0) + times\n"
        "    self.clean(self.limit)"
    )


def test_class_document_is_its_one_line_fields_and_signatures(tmp_path: Path) -> None:
    documents = build_with(tmp_path, {"package_0/counter.py": COUNTER})
    assert documents["package_0.counter.Counter"]["text"] == (
        "class Counter(dict):\n"
        "    limit: int = 10\n"
        "    is_case_sensitive = False\n"
        "    def add(self, word: str, times: int = 1) -> None:\n"
        "    def halve(self) -> None:"
    )


def test_stub_is_no_document(tmp_path: Path) -> None:
    stub = 'def stub(a):\n    """Combine all of the weights."""\n    raise NotImplementedError("a" * 100)\n'
    assert "package_0.stub.stub" not in build_with(tmp_path, {"package_0/stub.py": stub})


def test_equal_definitions_are_one_document_with_the_sentences_of_both(tmp_path: Path) -> None:
    other = make_function(7).replace("Combine :class:`~a.Weight`", "Merge or even blend")
    documents = build_with(tmp_path, {"package_3/other.py": other})
    assert len(documents) == NUM_PACKAGES * FUNCTIONS_PER_PACKAGE
    for query in ("Merge or even blend 7", "Combine Weight 7"):
        found = relevant_titles(tmp_path / "out", f"{query} of the first and eighth kind")
        assert list(found.values()) == [["package_0.part_3.combine_7"]]


def test_definitions_that_differ_in_names_only_are_one_document(tmp_path: Path) -> None:
    near_copy = make_function(7).replace("total", "sum_so_far").replace("combine_7", "combined")
    documents = build_with(tmp_path, {"package_3/other.py": near_copy})
    assert len(documents) == NUM_PACKAGES * FUNCTIONS_PER_PACKAGE


def test_each_query_is_in_exactly_one_split(built: Path) -> None:
    seen = [query for rows in read_qrels(built).values() for query in {row[0] for row in rows}]
    assert sorted(seen) == [row["_id"] for row in read_jsonl(built / "queries.jsonl.gz")]


def test_every_split_has_queries(built: Path) -> None:
    assert all(read_qrels(built).values())


@pytest.mark.parametrize(
    ("units", "split"),
    # SHA-1 puts package_0.same and package_4.same in train, package_2.part_1 in dev, package_2.same in test.
    [
        (["0.same", "4.same"], "train"),
        (["0.same", "2.part_1"], "dev"),
        (["0.same", "2.part_1", "2.same"], "test"),
    ],
)
def test_query_of_several_splits_is_in_the_least_train_one(
    tmp_path: Path, units: list[str], split: str
) -> None:
    modules = {
        f"package_{unit.replace('.', '/')}.py": make_function(500 + place).replace(
            f"Combine :class:`~a.Weight` {500 + place}", "Say the same in each package. Not"
        )
        for place, unit in enumerate(units)
    }
    build_with(tmp_path, modules)
    found = relevant_titles(tmp_path / "out", "Say the same in each package")
    assert {name: len(titles) for name, titles in found.items()} == {split: len(units)}


def test_query_with_more_than_three_documents_is_dropped(tmp_path: Path) -> None:
    source = make_module(range(500, 504))
    for number in range(500, 504):
        source = source.replace(f"Combine :class:`~a.Weight` {number}", "Say the same four times. Not")
    documents = build_with(tmp_path, {"package_0/same.py": source})
    assert "package_0.same.combine_503" in documents
    assert relevant_titles(tmp_path / "out", "Say the same four times") == {}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("package_0/tests/part.py", ""),
        ("package_0/_vendor/part.py", ""),
        ("package_0/test_part.py", ""),
        ("package_0/part_pb2.py", ""),
        ("package_0/generated.py", "# This file is auto-generated. Do not edit.\n"),
        ("package_0/broken.py", "def broken(:\n"),
        ("package_0/binary.py", "\0"),
    ],
)
def test_tests_and_vendored_generated_and_broken_files_are_skipped(
    tmp_path: Path, name: str, head: str
) -> None:
    documents = build_with(tmp_path, {name: head + make_function(500)})
    assert len(documents) == NUM_PACKAGES * FUNCTIONS_PER_PACKAGE


def test_one_package_gives_at_most_a_quarter_of_the_documents(tmp_path: Path) -> None:
    documents = build_with(tmp_path, {"package_0/big.py": make_module(range(500, 540))}, max_documents=120)
    assert len(documents) == 120
    assert Counter(title.partition(".")[0] for title in documents)["package_0"] <= 30


def test_existing_output_is_refused_and_unchanged(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", make_modules().items())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out exists already\. Choose another folder or delete it"):
        build_pycode(tmp_path / "out", roots=[root])
    assert read_bytes(tmp_path / "out") == {"mine.txt": b"mine"}


def test_too_few_documents_are_an_error_that_says_where_and_how_many(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", [("package/part.py", make_module(range(MIN_DOCUMENTS - 1)))])
    with pytest.raises(ValueError, match=rf"found {MIN_DOCUMENTS - 1} in .*root\. Install more packages"):
        build_pycode(tmp_path / "out", roots=[root])
    assert not (tmp_path / "out").exists()


def test_as_many_documents_as_needed_are_enough(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", [("package/part.py", make_module(range(MIN_DOCUMENTS)))])
    assert build_pycode(tmp_path / "out", roots=[root])["documents"] == MIN_DOCUMENTS

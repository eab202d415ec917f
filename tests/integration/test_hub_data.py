"""A data set in the Hub's layout, read through `datasets` from a local folder, equals the BEIR folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from retriever import InputError, read_corpus, read_data, read_qrels, read_queries

SPLITS = ("train", "dev", "test")
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _private_cache_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def beir_tables(folder: Path) -> dict[str, dict[str, Rows]]:
    """Return the rows of a BEIR folder by table and split."""
    tables: dict[str, dict[str, Rows]] = {"qrels": {}}
    for name in ("corpus", "queries"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        tables[name] = {name: [json.loads(line) for line in lines]}
    for split in SPLITS:
        lines = (folder / "qrels" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        fields = [line.split("\t") for line in lines]
        tables["qrels"][split] = [{"query-id": q, "corpus-id": d, "score": int(s)} for q, d, s in fields]
    return tables


def write_table(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_card(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """Write README.md with the Hub's `configs:`: configuration -> split -> file."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# Tiny", ""]), encoding="utf-8")


def write_hub_folder(beir: Path, folder: Path, *, suffix: str, qrels_config: str) -> Path:
    """Write a BEIR folder again as a Hub data set with one folder a table."""
    tables = beir_tables(beir)
    configs = {}
    for table, splits in tables.items():
        config = qrels_config if table == "qrels" else table
        configs[config] = {split: f"{table}/{split}-00000.{suffix}" for split in splits}
        for split, rows in splits.items():
            write_table(folder / configs[config][split], rows)
    write_card(folder, configs)
    return folder


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("qrels_config", ["qrels", "default"])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_hub_folder_equals_the_beir_folder(
    tiny_data: Path, tmp_path: Path, suffix: str, qrels_config: str, split: str
) -> None:
    folder = write_hub_folder(tiny_data, tmp_path / "hub", suffix=suffix, qrels_config=qrels_config)
    assert read_data(folder, split) == read_data(tiny_data, split)


def test_documents_of_a_hub_folder_are_in_the_order_of_the_beir_folder(
    tiny_data: Path, tmp_path: Path
) -> None:
    folder = write_hub_folder(tiny_data, tmp_path / "hub", suffix="parquet", qrels_config="qrels")
    assert list(read_corpus(folder)) == list(read_corpus(tiny_data))


def test_clone_with_its_tables_as_jsonl_in_the_root_equals_the_beir_folder(
    tiny_data: Path, tmp_path: Path
) -> None:
    """MTEB's data sets have corpus.jsonl and queries.jsonl in the root, and qrels/SPLIT.jsonl as `default`."""
    tables = beir_tables(tiny_data)
    write_table(tmp_path / "hub" / "corpus.jsonl", tables["corpus"]["corpus"])
    write_table(tmp_path / "hub" / "queries.jsonl", tables["queries"]["queries"])
    for split in SPLITS:
        write_table(tmp_path / "hub" / "qrels" / f"{split}.jsonl", tables["qrels"][split])
    write_card(
        tmp_path / "hub",
        {
            "default": {split: f"qrels/{split}.jsonl" for split in SPLITS},
            "corpus": {"corpus": "corpus.jsonl"},
            "queries": {"queries": "queries.jsonl"},
        },
    )
    assert read_data(tmp_path / "hub", "test") == read_data(tiny_data, "test")


def test_judgements_in_the_data_set_beside_it_are_found(tiny_data: Path, tmp_path: Path) -> None:
    """BeIR/NAME has corpus and queries, BeIR/NAME-qrels the judgements."""
    folder = write_hub_folder(tiny_data, tmp_path / "hub", suffix="parquet", qrels_config="default")
    tables = beir_tables(tiny_data)
    shutil.rmtree(folder / "qrels")
    write_card(folder, {name: {name: f"{name}/{name}-00000.parquet"} for name in ("corpus", "queries")})
    for split in SPLITS:
        write_table(tmp_path / "hub-qrels" / f"{split}.parquet", tables["qrels"][split])
    write_card(tmp_path / "hub-qrels", {"default": {split: f"{split}.parquet" for split in SPLITS}})
    assert read_data(folder, "dev") == read_data(tiny_data, "dev")


def write_one_judgement(folder: Path, judgement: dict[str, Any]) -> Path:
    """Write a Hub data set with integer ids: a document, a query, a judgement in split `test`."""
    write_table(folder / "corpus.parquet", [{"_id": 3, "title": "", "text": "three"}])
    write_table(folder / "queries.parquet", [{"_id": 7, "text": "what"}])
    write_table(folder / "qrels.parquet", [judgement])
    write_card(
        folder,
        {
            "corpus": {"corpus": "corpus.parquet"},
            "queries": {"queries": "queries.parquet"},
            "qrels": {"test": "qrels.parquet"},
        },
    )
    return folder


def test_integer_ids_of_a_hub_folder_are_read_as_texts(tmp_path: Path) -> None:
    judgement = {"query-id": 7, "corpus-id": 3, "score": 1}
    data = read_data(write_one_judgement(tmp_path / "hub", judgement), "test")
    assert (list(data.documents), data.queries, data.qrels) == (["3"], {"7": "what"}, {"7": {"3": 1}})


def test_whole_score_stored_as_a_float_is_read(tmp_path: Path) -> None:
    judgement = {"query-id": 7, "corpus-id": 3, "score": 2.0}
    assert read_qrels(write_one_judgement(tmp_path / "hub", judgement), "test") == {"7": {"3": 2}}


def test_judgement_without_a_score_counts_as_relevant(tmp_path: Path) -> None:
    judgement = {"query-id": 7, "corpus-id": 3}
    assert read_qrels(write_one_judgement(tmp_path / "hub", judgement), "test") == {"7": {"3": 1}}


def test_judgements_without_the_columns_name_those_present(tmp_path: Path) -> None:
    folder = write_one_judgement(tmp_path / "hub", {"query": 7, "document": 3})
    with pytest.raises(InputError, match=r"need the columns query-id, corpus-id, score; got \['document', "):
        read_qrels(folder, "test")


@pytest.mark.parametrize("score", [0.5, None, "high"])
def test_score_that_is_no_whole_number_is_named_with_its_place(tmp_path: Path, score: object) -> None:
    """A TSV file with such a score is refused; here, too, 0.5 must not silently become 0."""
    judgement = {"query-id": 7, "corpus-id": 3, "score": score}
    with pytest.raises(InputError, match=r"hub\[qrels\]:1: .*score"):
        read_qrels(write_one_judgement(tmp_path / "hub", judgement), "test")


def test_faulty_row_is_named_with_its_table_and_number(tiny_data: Path, tmp_path: Path) -> None:
    folder = write_hub_folder(tiny_data, tmp_path / "hub", suffix="parquet", qrels_config="qrels")
    rows = [{"_id": "q1", "text": "what"}, {"_id": "q2", "text": ""}]
    write_table(folder / "queries" / "queries-00000.parquet", rows)
    with pytest.raises(InputError, match=r"hub\[queries\]:2: the query 'q2' is empty\. Remove"):
        read_queries(folder)


def test_missing_split_of_a_hub_folder_lists_those_present(tiny_data: Path, tmp_path: Path) -> None:
    folder = write_hub_folder(tiny_data, tmp_path / "hub", suffix="parquet", qrels_config="qrels")
    with pytest.raises(InputError, match=r"dev, test, train|train, dev, test"):
        read_qrels(folder, "validation")


def test_name_that_is_neither_folder_nor_data_set_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"'no/such_data' is neither a folder here nor a readable Hub data"):
        list(read_corpus("no/such_data"))

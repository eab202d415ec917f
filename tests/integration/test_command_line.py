"""The command line: every verb on tiny data, and one clear line for every mistake."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
import torch
import yaml

import launch.data
from index import Searcher
from launch.main import VERBS, main
from launch.pycode import build_pycode
from retriever import read_qrels, read_queries
from retriever.heads import ProductQuantizerConfig
from training import load_experiment


def call(*words: object) -> int:
    """Return the exit code of `endex words...` in this process."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:  # --help, --print_config
        return int(end.code or 0)


def make_recipe(model: Path, data: Path, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "model": {"encoder": str(model), "query_max_length": 16, "document_max_length": 32},
        "head": {
            "class_path": "ProductQuantizerConfig",
            "init_args": {"num_codebooks": 4, "codebook_bits": 4},
        },
        "loss": {"class_path": "MCLConfig"},
        "data": {"source": str(data)},
        "optimization": {"steps": 8, "batch_size": 16, "lr": 0.001},
    }


@pytest.fixture(scope="module")
def work(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, recipe.yaml, run/, other-run/, dense-run/, and the indexes pq/, ivfpq/, flat/."""
    work = tmp_path_factory.mktemp("work")
    shutil.copytree(tiny_data, work / "data")
    recipe = make_recipe(tiny_model, work / "data", work / "run")
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train = ("train", work / "recipe.yaml", "--json")
    dense = ("--head", "NoCompressionConfig", "--evaluation.metric", "dense/ndcg@10")
    assert call(*train) == 0
    assert call(*train, "--output", work / "other-run", "--seed", 1, "--optimization.steps", 1) == 0
    assert call(*train, "--output", work / "dense-run", *dense) == 0
    for name, run, options in [
        ("pq", "run", ("--index.kind", "pq")),
        ("ivfpq", "run", ("--index.kind", "ivfpq", "--index.nlist", 3)),
        ("flat", "dense-run", ()),
    ]:
        model = work / run / "last"
        assert call("export", model, work / "data", "--out", work / name, "--json", *options) == 0
    return work


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed; return what it printed."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert call(*words) == 0
        return capsys.readouterr().out

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], work: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused with one line and change no file; return that line."""

    def run(*words: object) -> str:
        before = snapshot(work), snapshot(tmp_path)
        capsys.readouterr()
        code, printed = call(*words), capsys.readouterr()
        assert re.fullmatch(r"endex: [^\n]+\n", printed.err), printed.err
        assert printed.out == ""
        assert code == 2
        assert (snapshot(work), snapshot(tmp_path)) == before
        return printed.err

    return run


Refusal = Callable[..., str]
Output = Callable[..., str]


def write_recipe(work: Path, folder: Path, **changes: Any) -> Path:
    """Write the recipe into a folder, with other fields, and an output that does not exist."""
    recipe = yaml.safe_load((work / "recipe.yaml").read_text()) | {"output": str(folder / "new-run")}
    for name, value in changes.items():
        recipe[name] = recipe.get(name, {}) | value if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def copy_data(work: Path, folder: Path) -> Path:
    shutil.copytree(work / "data", folder / "data")
    return folder / "data"


def edit_line(path: Path, number: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


# --- help, version -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_names_it_and_exits_with_0(output: Output, verb: str) -> None:
    assert f"endex {verb}" in output(verb, "--help")


@pytest.mark.parametrize("words", [("--help",), ("-h",), ("help",)])
def test_help_lists_every_verb(output: Output, words: tuple[str, ...]) -> None:
    assert set(VERBS) <= set(output(*words).split())


def test_no_verb_prints_the_usage_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 2
    assert "usage: endex VERB" in capsys.readouterr().out


def test_version_is_a_number(output: Output) -> None:
    assert re.fullmatch(r"endex \d+\.\d+\.\d+\S*\n", output("--version"))


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_an_unknown_verb_is_refused_with_the_known_ones(refusal: Refusal) -> None:
    assert re.search(r"no verb 'trian'.*Choose one of train, export", refusal("trian"))


def test_a_missing_recipe_is_named(refusal: Refusal, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refusal("train", tmp_path / "nowhere.yaml", "--json")


def test_an_unknown_field_of_a_recipe_is_named_with_the_file(
    refusal: Refusal, work: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(work, tmp_path, optimization={"batchsize": 3})
    line = refusal("train", recipe, "--json")
    assert "batchsize" in line
    assert str(recipe) in line


@pytest.mark.parametrize(
    ("changes", "meant"),
    [
        ({"optimization": {"batchsize": 3}}, "batch_size"),
        ({"head": {"init_args": {"num_codebook": 4}}}, "num_codebooks"),
        ({"loss": {"init_args": {"temprature": 0.1}}}, "temperature"),
        ({"sede": 1}, "seed"),
    ],
)
def test_an_unknown_field_of_a_recipe_is_refused_with_the_nearest_known_one(
    refusal: Refusal, work: Path, tmp_path: Path, changes: dict[str, Any], meant: str
) -> None:
    line = refusal("train", write_recipe(work, tmp_path, **changes), "--json")
    assert re.search(rf"Did you mean '[\w.]*\b{meant}'\?", line)


def test_an_unknown_option_of_train_is_refused_with_the_nearest_known_one(
    refusal: Refusal, work: Path, tmp_path: Path
) -> None:
    line = refusal("train", write_recipe(work, tmp_path), "--json", "--optimization.stepz", 5)
    assert re.search(r"optimization\.stepz.*Did you mean '(--)?optimization\.steps'\?", line)


def test_an_unknown_option_of_export_is_refused_with_the_nearest_known_one(
    refusal: Refusal, work: Path, tmp_path: Path
) -> None:
    line = refusal("export", work / "run/last", work / "data", "--out", tmp_path / "i", "--index.kinds", "pq")
    assert re.search(r"index\.kinds.*Did you mean '(--)?index\.kind'\?", line)


def test_an_unknown_class_is_refused_with_the_known_ones(
    refusal: Refusal, work: Path, tmp_path: Path
) -> None:
    line = refusal("train", write_recipe(work, tmp_path), "--json", "--head", "PQConfig")
    assert re.search(r"PQConfig.*ProductQuantizerConfig", line)


def test_a_wrong_value_is_refused_with_its_field_and_the_choices(
    refusal: Refusal, work: Path, tmp_path: Path
) -> None:
    line = refusal("train", write_recipe(work, tmp_path), "--json", "--optimization.schedule", "linea")
    assert re.search(r"optimization\.schedule.*linear.*cosine.*constant", line)
    assert "linea" in line.replace("linear", "")


def test_codebooks_that_do_not_divide_the_dimension_are_refused_with_a_number_that_does(
    refusal: Refusal, work: Path, tmp_path: Path
) -> None:
    line = refusal("train", write_recipe(work, tmp_path), "--json", "--head.num_codebooks", 5)
    assert re.search(r"dim=32 and num_codebooks=5\. Try num_codebooks=4\.", line)


def test_a_corpus_too_small_for_the_codebooks_is_refused_before_the_first_step(
    refusal: Refusal, work: Path, tmp_path: Path
) -> None:
    """Not after a third of the run, when the head's warm start comes: `refusal` allows no file to appear."""
    line = refusal("train", write_recipe(work, tmp_path), "--json", "--head.codebook_bits", 8)
    assert re.search(r"256 documents.*got 80.*lower codebook_bits", line)


def test_a_second_run_into_the_same_output_is_refused(refusal: Refusal, work: Path) -> None:
    line = refusal("train", work / "recipe.yaml", "--json")
    assert re.search(rf"{re.escape(str(work / 'run'))} holds a run already.*--resume", line)


@pytest.mark.parametrize("verb", ["train", "export", "evaluate"])
def test_a_missing_data_folder_is_named(refusal: Refusal, work: Path, tmp_path: Path, verb: str) -> None:
    line = refusal(*read_with(verb, work, tmp_path / "nowhere", tmp_path))
    assert str(tmp_path / "nowhere") in line


@pytest.mark.parametrize("verb", ["train", "export"])
def test_a_corpus_line_that_is_not_json_is_named_with_file_and_number(
    refusal: Refusal, work: Path, tmp_path: Path, verb: str
) -> None:
    data = copy_data(work, tmp_path)
    edit_line(data / "corpus.jsonl", 7, '{"_id": "d6", "text": ')
    line = refusal(*read_with(verb, work, data, tmp_path))
    assert re.search(r"data/corpus\.jsonl:7: not JSON.*Correct or remove the line", line)


@pytest.mark.parametrize("verb", ["train", "export"])
def test_an_empty_corpus_is_refused(refusal: Refusal, work: Path, tmp_path: Path, verb: str) -> None:
    data = copy_data(work, tmp_path)
    (data / "corpus.jsonl").write_text("")
    line = refusal(*read_with(verb, work, data, tmp_path))
    assert re.search(r"data holds no documents\. Give a corpus", line)


@pytest.mark.parametrize("verb", ["train", "export"])
def test_a_repeated_document_id_is_named_with_file_and_number(
    refusal: Refusal, work: Path, tmp_path: Path, verb: str
) -> None:
    data = copy_data(work, tmp_path)
    edit_line(data / "corpus.jsonl", 9, '{"_id": "d3", "text": "w1"}')
    line = refusal(*read_with(verb, work, data, tmp_path))
    assert re.search(r"data/corpus\.jsonl:9: the document id 'd3' occurs a second time\. Make", line)


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_judgement_of_an_unknown_document_is_named_with_file_and_number(
    refusal: Refusal, work: Path, tmp_path: Path, verb: str
) -> None:
    data = copy_data(work, tmp_path)
    for split in ("train", "test"):
        edit_line(data / f"qrels/{split}.tsv", 3, "q70\td999\t1")
    line = refusal(*read_with(verb, work, data, tmp_path))
    assert re.search(r"data/qrels/(train|test)\.tsv:3: the document 'd999' is not in the corpus\. Add", line)


def read_with(verb: str, work: Path, data: Path, folder: Path) -> tuple[object, ...]:
    """Return a command that reads a data folder."""
    if verb == "train":
        return "train", write_recipe(work, folder, data={"source": str(data)}), "--json"
    if verb == "export":
        return "export", work / "run/last", data, "--out", folder / "new-index", "--json"
    return "evaluate", work / "run/last", data, "--json"


def test_an_index_without_a_judged_document_is_refused(refusal: Refusal, work: Path, tmp_path: Path) -> None:
    data = copy_data(work, tmp_path)
    with (data / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "new", "text": "w1 w2"}\n')
    edit_line(data / "qrels/test.tsv", 3, "q70\tnew\t1")
    assert re.search(r"'new' is not in the index .*pq", refusal("evaluate", work / "pq", data, "--json"))


def test_a_split_that_is_not_there_is_refused_with_those_that_are(refusal: Refusal, work: Path) -> None:
    line = refusal("evaluate", work / "pq", work / "data", "--split", "validation")
    assert re.search(r"no qrels/validation\.tsv.*dev, test, train", line)


def damaged(folder: Path, copy: Path, name: str, *, flip: bool) -> Path:
    """Return a copy of a folder with a bit of a file flipped, or without the file."""
    shutil.copytree(folder, copy)
    content = bytearray((copy / name).read_bytes())
    (copy / name).unlink()
    if flip:
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize("name", ["encoder/model.safetensors", "head/model.safetensors", "dual_encoder.json"])
@pytest.mark.parametrize(("flip", "word"), [(True, "damaged"), (False, "missing")])
def test_a_damaged_model_folder_is_refused_with_the_file(
    refusal: Refusal, work: Path, tmp_path: Path, name: str, flip: bool, word: str
) -> None:
    model = damaged(work / "run/last", tmp_path / "model", name, flip=flip)
    line = refusal("export", model, work / "data", "--out", tmp_path / "index", "--json")
    assert re.search(rf"model/{re.escape(name)} is {word}.*[Rr]estore it", line)


@pytest.mark.parametrize("name", ["index", "docid", "documents.jsonl", "encoder/model.safetensors"])
@pytest.mark.parametrize(("flip", "word"), [(True, "damaged"), (False, "missing")])
def test_a_damaged_index_folder_is_refused_with_the_file(
    refusal: Refusal, work: Path, tmp_path: Path, name: str, flip: bool, word: str
) -> None:
    folder = damaged(work / "pq", tmp_path / "copy", name, flip=flip)
    line = refusal("search", folder, "--query", "w1")
    assert re.search(rf"copy/{re.escape(name)} is {word}.*[Rr]estore it", line)


def test_an_index_folder_is_no_model(refusal: Refusal, work: Path, tmp_path: Path) -> None:
    line = refusal("export", work / "pq", work / "data", "--out", tmp_path / "index", "--json")
    assert re.search(r"pq is an index folder, but a model folder is needed", line)


def test_a_model_folder_is_no_index(refusal: Refusal, work: Path) -> None:
    line = refusal("search", work / "run/last", "--query", "w1")
    assert re.search(r"last is a model folder, but an index folder is needed", line)


def test_searching_with_another_model_is_refused(refusal: Refusal, work: Path) -> None:
    line = refusal("search", work / "pq", "--query", "w1", "--model", work / "other-run/last")
    assert re.search(r"pq was made with another model than .*other-run/last.*Export", line)


def test_export_into_an_existing_folder_is_refused(refusal: Refusal, work: Path) -> None:
    line = refusal("export", work / "run/last", work / "data", "--out", work / "pq", "--json")
    assert re.search(r"pq exists already\. Choose another folder, or add --overwrite", line)


def test_an_index_kind_that_the_head_does_not_fit_is_refused(
    refusal: Refusal, work: Path, tmp_path: Path
) -> None:
    words = ("--out", tmp_path / "index", "--json", "--index.kind", "flat")
    line = refusal("export", work / "run/last", work / "data", *words)
    assert re.search(r"'flat' cannot carry ProductCodebooks.*--index\.kind auto", line)


@pytest.mark.parametrize("words", [(), ("--query", "w1", "--queries", "data")], ids=["neither", "both"])
def test_search_wants_one_of_query_and_queries(refusal: Refusal, work: Path, words: tuple[str, ...]) -> None:
    assert "either --query TEXT or --queries FILE" in refusal("search", work / "pq", *words)


def test_zero_results_are_refused(refusal: Refusal, work: Path) -> None:
    assert "k must be at least 1, got 0" in refusal("search", work / "pq", "--query", "w1", "--k", 0)


def test_a_run_of_a_model_folder_is_refused_with_the_command_to_export(refusal: Refusal, work: Path) -> None:
    line = refusal("evaluate", work / "run/last", work / "data", "--run", work / "run.trec")
    assert "endex export" in line


def test_an_unknown_data_set_is_refused_with_the_known_ones(refusal: Refusal, tmp_path: Path) -> None:
    assert re.search(r"'pycod'.*Choose one of pycode", refusal("data", "pycod", "--out", tmp_path / "data"))


def test_data_into_an_existing_folder_is_refused(refusal: Refusal, work: Path) -> None:
    assert "data exists already" in refusal("data", "pycode", "--out", work / "data")


# --- train -------------------------------------------------------------------------------------------------------


def test_print_config_prints_the_whole_experiment(output: Output, work: Path, tmp_path: Path) -> None:
    printed = output("train", work / "recipe.yaml", "--seed", 4, "--print_config")
    (tmp_path / "printed.yaml").write_text(printed)
    expected = yaml.safe_load((work / "recipe.yaml").read_text()) | {"seed": 4}
    (tmp_path / "expected.yaml").write_text(yaml.safe_dump(expected))
    assert load_experiment(tmp_path / "printed.yaml") == load_experiment(tmp_path / "expected.yaml")


def test_train_prints_where_the_models_are(output: Output, work: Path, tmp_path: Path) -> None:
    printed = json.loads(output("train", write_recipe(work, tmp_path), "--json", "--optimization.steps", 1))
    assert (printed["best"], printed["last"], printed["steps"]) == (
        str(tmp_path / "new-run/best"),
        str(tmp_path / "new-run/last"),
        1,
    )


def test_options_of_the_command_line_reach_the_model(work: Path) -> None:
    head = load_experiment(work / "run/last/experiment.yaml").head
    assert head == ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)


# --- export, search, evaluate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pq", "ivfpq"])
def test_export_reports_sizes_and_parity(output: Output, work: Path, tmp_path: Path, kind: str) -> None:
    words = ("--out", tmp_path / "index", "--json", "--index.kind", kind)
    report = json.loads(output("export", work / "run/last", work / "data", *words))
    assert (report["ntotal"], report["code_size"]) == (80, 2)
    assert report["parity"] < 1e-5


def test_export_with_overwrite_replaces_the_folder(output: Output, work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "flat", tmp_path / "index")
    words = ("--out", tmp_path / "index", "--json", "--overwrite")
    output("export", work / "run/last", work / "data", *words)
    assert json.loads((tmp_path / "index/manifest.json").read_text())["index"] == "PQBuilder"


def test_search_prints_the_query_and_k_hits_with_texts(output: Output, work: Path) -> None:
    lines = output("search", work / "pq", "--query", "w1 w2", "--k", 3).splitlines()
    assert lines[0] == "w1 w2"
    assert [re.match(r" +(\d+)  -?\d\.\d{4}  d\d+  w\d+", line)[1] for line in lines[1:]] == ["1", "2", "3"]


def test_search_json_holds_k_scores_of_each_query(output: Output, work: Path) -> None:
    found = json.loads(output("search", work / "pq", "--queries", work / "data", "--k", 7, "--json"))
    assert {len(hits) for hits in found.values()} == {7}
    assert set(found) == set(read_queries(work / "data"))


@pytest.mark.parametrize("index", ["pq", "ivfpq", "flat"])
def test_more_results_than_documents_gives_every_document_once(
    output: Output, work: Path, index: str
) -> None:
    found = json.loads(output("search", work / index, "--query", "w1", "--k", 1000, "--json"))["query"]
    assert set(found) == {f"d{row}" for row in range(80)}


def test_searching_with_the_indexs_own_model_gives_the_same(output: Output, work: Path) -> None:
    words = ("search", work / "pq", "--query", "w1 w2", "--json")
    assert output(*words, "--model", work / "run/last") == output(*words)


@pytest.fixture
def run_lines(output: Output, work: Path, tmp_path: Path) -> list[list[str]]:
    """The columns of a run of 12 documents a query."""
    path = tmp_path / "run.trec"
    output("search", work / "pq", "--queries", work / "data", "--k", 12, "--run", path, "--json")
    return [line.split(" ") for line in path.read_text().splitlines()]


def test_a_run_has_six_columns(run_lines: list[list[str]]) -> None:
    assert {(len(columns), columns[1], columns[5]) for columns in run_lines} == {(6, "Q0", "pq")}


def test_the_ranks_of_a_run_are_1_to_k_for_every_query(run_lines: list[list[str]]) -> None:
    assert [int(columns[3]) for columns in run_lines] == 80 * list(range(1, 13))


def test_the_scores_of_a_run_are_exactly_those_of_the_search(run_lines: list[list[str]], work: Path) -> None:
    """Or trec_eval would see ties where the search saw none."""
    scores, _ = Searcher(work / "pq").search(list(read_queries(work / "data").values()), 12)
    written = np.array([columns[4] for columns in run_lines]).astype(np.float32)
    np.testing.assert_array_equal(written, scores.ravel())


def test_search_json_says_where_the_run_is(output: Output, work: Path, tmp_path: Path) -> None:
    words = ("--run", tmp_path / "run.trec", "--json")
    printed = json.loads(output("search", work / "pq", "--queries", work / "data", *words))
    assert printed == {"run": str(tmp_path / "run.trec"), "queries": 80}


@pytest.mark.parametrize(
    ("index", "run", "kind"),
    [("pq", "run", "compressed"), ("ivfpq", "run", "compressed"), ("flat", "dense-run", "dense")],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_measures_through_the_index_are_those_of_the_model(
    output: Output, work: Path, index: str, run: str, kind: str, split: str
) -> None:
    words = (work / "data", "--split", split, "--json")
    through_index = json.loads(output("evaluate", work / index, *words))
    of_model = json.loads(output("evaluate", work / run / "last", *words))
    expected = {name: of_model[f"{kind}/{name}"] for name in through_index}
    assert through_index == pytest.approx(expected, abs=1e-6)


def test_evaluating_a_model_shows_dense_and_compressed_side_by_side(output: Output, work: Path) -> None:
    printed = json.loads(output("evaluate", work / "run/last", work / "data", "--json"))
    names = ("ndcg@10", "mrr@10", "recall@1", "recall@10", "recall@100")
    assert set(printed) == {f"{kind}/{name}" for kind in ("dense", "compressed") for name in names}


def test_the_run_of_an_evaluation_has_the_printed_ndcg(output: Output, work: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    printed = json.loads(output("evaluate", work / "pq", work / "data", "--run", path, "--json"))
    with path.open() as file:
        run = pytrec_eval.parse_run(file)
    evaluator = pytrec_eval.RelevanceEvaluator(read_qrels(work / "data", "test"), {"ndcg_cut.10"})
    values = [row["ndcg_cut_10"] for row in evaluator.evaluate(run).values()]
    assert np.mean(values) == pytest.approx(printed["ndcg@10"], abs=1e-6)


# --- data, env ---------------------------------------------------------------------------------------------------


def test_data_reports_what_it_wrote(output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(np.__file__).parent / "lib"  # modules with docstrings
    monkeypatch.setitem(launch.data.SETS, "pycode", partial(build_pycode, roots=[source]))
    words = ("--out", tmp_path / "data", "--max_documents", 400, "--json")
    counts = json.loads(output("data", "pycode", *words))
    with gzip.open(tmp_path / "data/corpus.jsonl.gz") as file:
        assert counts["documents"] == len(file.readlines())


def test_env_names_torch_and_faiss(output: Output) -> None:
    found = json.loads(output("env", "--json"))
    assert found["torch"] == torch.__version__
    assert re.match(r"\d+\.\d+", found["faiss"])

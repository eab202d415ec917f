"""From vector files to an index folder that answers vectors, by the verbs that do so for texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from index import Searcher
from launch.main import main
from launch.serving.config import ServeConfig
from launch.serving.metrics import Metrics
from launch.serving.service import SearchJob, SearchService
from retriever import DualEncoder
from training import load_experiment
from training.trainer import Trainer

DIM = 8


def call(*words: object) -> int:
    """Return the exit code of `endex words...` in this process."""
    return main([str(word) for word in words])


def make_recipe(data: Path, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "model": {"encoder": "vectors"},
        "head": {
            "class_path": "ProductQuantizerConfig",
            "init_args": {"num_codebooks": 4, "codebook_bits": 4, "rotation": "none"},
        },
        "loss": {"class_path": "ReconstructionConfig"},
        "data": {"source": str(data)},
        "optimization": {"steps": 6, "batch_size": 32, "head_lr": 0.01, "dense_warmup": 0.0},
        "evaluation": {"metric": "compressed/recall@1", "queries": 0, "documents": 0},
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, recipe.yaml, run/ and index/."""
    work = tmp_path_factory.mktemp("vectors")
    (work / "data").mkdir()
    random = np.random.default_rng(0)
    for name, count in (("base", 300), ("learn", 200), ("query", 40)):
        np.save(work / "data" / f"{name}.npy", random.normal(5, 20, (count, DIM)).astype(np.float16))
    (work / "recipe.yaml").write_text(yaml.safe_dump(make_recipe(work / "data", work / "run")))
    assert call("train", work / "recipe.yaml", "--json") == 0
    assert call("export", work / "run/last", work / "data", "--out", work / "index", "--json") == 0
    return work


def tables(work: Path) -> dict[str, np.ndarray]:
    return {name: np.load(work / "data" / f"{name}.npy").astype(np.float64) for name in ("base", "query")}


def decoded(work: Path) -> np.ndarray:
    """Codes of base, decoded and put back into the space of the files."""
    model = DualEncoder.load(work / "run/last")
    tower = model.document_encoder.backbone
    codes = np.load(work / "data/base.npy").astype(np.float32)
    y = model.head.decode(model.compress(tower(torch.from_numpy(codes))))
    return (y * tower.scale + tower.mean).detach().double().numpy()


def distances(q: np.ndarray, x: np.ndarray) -> np.ndarray:
    return ((q[:, None] - x) ** 2).sum(2)


def test_the_index_ranks_by_the_distance_to_decoded_vectors(work: Path) -> None:
    expected = distances(tables(work)["query"], decoded(work))
    _, ids = Searcher(work / "index").search(list(np.load(work / "data/query.npy").astype(np.float32)), 5)
    for row, found in zip(expected, ids, strict=True):
        assert np.allclose(row[[int(name) for name in found]], np.sort(row)[:5], rtol=1e-4)


def test_the_measures_are_recall_of_the_true_nearest_neighbour(work: Path, capsys: Any) -> None:
    """Equal codes make equal scores, which trec_eval orders by id, falling."""
    t, codes = tables(work), decoded(work).round(3)
    nearest, names = distances(t["query"], t["base"]).argmin(1), np.array([str(row) for row in range(300)])
    place = np.array(
        [
            (row < row[n] - 1e-6).sum() + ((abs(row - row[n]) <= 1e-6) & (names > names[n])).sum()
            for row, n in zip(distances(t["query"], codes), nearest, strict=True)
        ]
    )
    capsys.readouterr()
    for folder in ("run/last", "index"):
        assert call("evaluate", work / folder, work / "data", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        prefix = "compressed/" if folder == "run/last" else ""
        for k in (1, 10, 100):
            assert found[f"{prefix}recall@{k}"] == pytest.approx((place < k).mean())
    assert json.loads((work / "run/metrics.jsonl").read_text().splitlines()[-1])["eval/dense/recall@1"] == 1


def test_an_exported_file_is_named_by_row_and_has_no_texts(work: Path) -> None:
    searcher = Searcher(work / "index")
    assert list(searcher.document_ids) == [str(row) for row in range(300)]
    assert searcher.document(0) is None


def test_a_file_of_queries_is_searched_into_a_run(work: Path, tmp_path: Path) -> None:
    queries = work / "data/query.npy"
    assert call("search", work / "index", "--queries", queries, "--k", 3, "--run", tmp_path / "run.txt") == 0
    lines = [line.split() for line in (tmp_path / "run.txt").read_text().splitlines()]
    assert [(line[0], line[3]) for line in lines] == [(str(q), str(r)) for q in range(40) for r in (1, 2, 3)]


def test_a_search_prints_the_rows_of_queries(work: Path, capsys: Any) -> None:
    assert call("search", work / "index", "--queries", work / "data", "--k", 1) == 0
    assert capsys.readouterr().out.startswith("query 0\n")


def test_a_text_is_no_query_of_vectors(work: Path, capsys: Any) -> None:
    assert call("search", work / "index", "--query", "hello") == 2
    assert "takes vectors of 8 dimensions, got the text 'hello'" in capsys.readouterr().err


def test_vectors_of_another_dimension_are_no_queries(work: Path, tmp_path: Path, capsys: Any) -> None:
    np.save(tmp_path / "other.npy", np.zeros((2, DIM + 1), np.float32))
    assert call("search", work / "index", "--queries", tmp_path / "other.npy") == 2
    assert "takes vectors of 8 dimensions, got one of shape (9,)" in capsys.readouterr().err


def test_shards_of_vectors_make_the_same_index(work: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "base.npy", np.random.default_rng(1).normal(size=(5000, DIM)))
    model = work / "run/last"
    assert call("export", model, tmp_path / "base.npy", "--out", tmp_path / "whole", "--json") == 0
    for part in (1, 2):
        words = ("--out", tmp_path / f"{part}", "--shard", f"{part}/2", "--json")
        assert call("export", model, tmp_path / "base.npy", *words) == 0
    assert call("merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "joined", "--json") == 0
    for name in ("codes.u8", "docid", "index"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_half_encoded_file_is_not_continued_with_other_vectors(work: Path, tmp_path: Path) -> None:
    from index.encode import encode_corpus
    from retriever import InputError, read_corpus

    model, path = DualEncoder.load(work / "run/last"), tmp_path / "base.npy"
    x = np.random.default_rng(1).normal(size=(20, DIM))
    np.save(path, x)
    encode_corpus(model, read_corpus(path), tmp_path / "part", progress=False)
    np.save(path, x + 1)
    with pytest.raises(InputError, match="the corpus is not the one"):
        encode_corpus(model, read_corpus(path), tmp_path / "part", progress=False)


def test_a_server_answers_vectors_of_the_files_kind_and_refuses_texts(work: Path) -> None:
    queries = np.load(work / "data/query.npy").astype(np.float32)
    searcher, config = Searcher(work / "index"), ServeConfig(index=str(work / "index"))
    service = SearchService("index", work / "index", config, Metrics())
    service.live.swap()
    text, vectors = service._answer([SearchJob(texts=("hello",)), SearchJob(vectors=queries[:3], k=4)])
    assert "is searched by vectors, got texts" in str(text)
    assert [[searcher.document_ids[row] for row in rows] for rows in vectors.rows] == (
        searcher.search(list(queries[:3]), 4)[1]
    )


def test_training_lowers_the_error(work: Path) -> None:
    rows = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    first = rows[0]["head/distortion"]
    recipe = make_recipe(work / "data", work / "longer")
    recipe["optimization"] |= {"steps": 60, "schedule": "constant"}
    (work / "longer.yaml").write_text(yaml.safe_dump(recipe))
    assert call("train", work / "longer.yaml", "--json") == 0
    rows = [json.loads(line) for line in (work / "longer/metrics.jsonl").read_text().splitlines()]
    assert [row["head/distortion"] for row in rows if "head/distortion" in row][-1] < 0.95 * first


def test_a_stopped_run_continues_bit_for_bit(work: Path) -> None:
    recipe = make_recipe(work / "data", work / "stopped")
    recipe["checkpoint"] = {"every": 3}
    (work / "stopped.yaml").write_text(yaml.safe_dump(recipe))
    experiment = load_experiment(work / "stopped.yaml")
    Trainer(experiment, progress=False).fit()
    for name in ("last", "best", "checkpoints/step-00000006"):
        shutil.rmtree(work / "stopped" / name, ignore_errors=True)
    steps = [path.name for path in (work / "stopped/checkpoints").iterdir()]
    assert steps == ["step-00000003"]
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(experiment, progress=False).fit(resume=True)
    name = "last/head/model.safetensors"
    assert (work / "stopped" / name).read_bytes() == (work / "run" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--optimization.dense_warmup", 0.3), "vectors leaves only the head to train"),
        (("--head", "NoCompressionConfig"), "the head none leaves nothing to train"),
        (("--head.estimator", "identity"), "the loss reaches no parameter of the head"),
    ],
)
def test_a_run_in_which_nothing_would_learn_is_refused(
    work: Path, tmp_path: Path, capsys: Any, options: tuple[object, ...], fault: str
) -> None:
    assert call("train", work / "recipe.yaml", "--output", tmp_path / "run", "--json", *options) == 2
    assert fault in capsys.readouterr().err


def test_a_head_trains_by_its_own_losses_alone(work: Path, tmp_path: Path) -> None:
    own = ("--loss.weight", 0, "--head.distortion_weight", 1, "--head.estimator", "identity")
    assert call("train", work / "recipe.yaml", "--output", tmp_path / "own", "--json", *own) == 0
    states = [(run / "last/head/model.safetensors").read_bytes() for run in (tmp_path / "own", work / "run")]
    assert states[0] == states[1]  # the same error, whoever states it

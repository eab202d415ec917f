"""A recipe whose encoder is a static one goes from training to search, in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

from index import Searcher
from launch.main import main
from retriever import DualEncoder, Encoder, static_encoder
from retriever.token_bag import TokenBag


@pytest.fixture(scope="module")
def static_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "model"
    static_encoder(Encoder.load(tiny_model)).save(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def work(
    request: pytest.FixtureRequest,
    static_model: Path,
    tiny_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with run/ and index/, made by `endex train` and `endex export`."""
    work = tmp_path_factory.mktemp("work")
    recipe = {
        "output": str(work / "run"),
        "model": {
            "encoder": str(static_model),
            "tie": request.param,
            "query_max_length": 16,
            "document_max_length": 32,
        },
        "head": {
            "class_path": "ProductQuantizerConfig",
            "init_args": {"num_codebooks": 8, "codebook_bits": 4},
        },
        "loss": {"class_path": "MCLConfig"},
        "data": {"source": str(tiny_data)},
        "optimization": {"steps": 30, "batch_size": 16, "lr": 0.01},
        "tracking": {"every": 1},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert call("train", work / "recipe.yaml", "--json") == 0
    assert call("export", work / "run/last", tiny_data, "--out", work / "index", "--json") == 0
    return work


def call(*words: object) -> int:
    return main([str(word) for word in words])


def towers(model: DualEncoder) -> list[Encoder]:
    return [model.query_encoder, model.document_encoder]


def test_training_lowers_the_loss(work: Path) -> None:
    rows = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_training_moves_the_token_vectors_of_both_towers(work: Path, static_model: Path) -> None:
    before = Encoder.load(static_model).backbone.state_dict()["embedding.weight"]
    for tower in towers(DualEncoder.load(work / "run/last")):
        assert isinstance(tower.backbone, TokenBag)
        assert (tower.backbone.embedding.weight - before).abs().max() > 1e-3


def test_the_trained_towers_open_in_sentence_transformers(work: Path) -> None:
    texts = ["w1 w2 w3", "w7", ""]
    model = DualEncoder.load(work / "run/last")
    folder = work / "run/last" / ("encoder" if model.tied else "document_encoder")
    theirs = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    with torch.no_grad():
        ours = model.document_encoder(model.document_encoder.tokenize(texts)).numpy()
    assert np.abs(theirs.encode(texts, show_progress_bar=False) - ours).max() < 1e-6


def test_search_finds_a_document_by_its_words(work: Path, tiny_data: Path) -> None:
    documents = [json.loads(line) for line in (tiny_data / "corpus.jsonl").read_text().splitlines()]
    _, found = Searcher(work / "index").search([document["text"] for document in documents], 10)
    hits = [document["_id"] in ids for document, ids in zip(documents, found, strict=True)]
    assert np.mean(hits) > 0.7  # by chance 0.125


def test_the_command_line_searches_and_evaluates(
    work: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("search", work / "index", "--query", "w1 w2 w3", "--k", 3, "--json") == 0
    assert capsys.readouterr().out
    assert call("evaluate", work / "run/last", tiny_data, "--json") == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert "ndcg@10" in json.dumps(printed)


def test_a_query_without_tokens_is_answered(work: Path) -> None:
    scores, _ = Searcher(work / "index").search([""], 3)
    assert np.isfinite(np.asarray(scores)).all()

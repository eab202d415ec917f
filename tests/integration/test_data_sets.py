"""Runs on a corpus that stays on disk, on several sets, and on a teacher's scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from retriever import DualEncoderConfig, InputError
from retriever.heads import NoCompressionConfig, ProductQuantizerConfig
from training import Experiment, Trainer, TrainingReport, dump_experiment, load_experiment
from training.experiment import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LiveNegativesConfig,
    OptimizationConfig,
    SourceConfig,
    TrackingConfig,
)
from training.losses import ContrastiveConfig, DistillationConfig, LossConfig
from training.preemption import Preempted, StopRequest


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ENDEX_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_experiment(
    model: Path, output: Path, data: DataConfig, loss: LossConfig | None = None, **optimization: Any
) -> Experiment:
    return Experiment(
        output=str(output),
        model=DualEncoderConfig(encoder=str(model), query_max_length=16, document_max_length=32),
        head=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4),
        loss=loss or ContrastiveConfig(),
        data=data,
        live_negatives=LiveNegativesConfig(per_query=1, depth=4, refresh=2),
        optimization=OptimizationConfig(
            **{"steps": 5, "batch_size": 8, "lr": 1e-3, "warm_start_documents": 60, **optimization}
        ),
        evaluation=EvaluationConfig(documents=40),
        checkpoint=CheckpointConfig(every=0),
        tracking=TrackingConfig(every=1),
    )


def train(experiment: Experiment, *, resume: bool = False) -> TrainingReport:
    return Trainer(experiment, progress=False).fit(resume=resume)


def weights(report: TrainingReport) -> list[bytes]:
    return [
        (report.last / name).read_bytes() for name in ("encoder/model.safetensors", "head/model.safetensors")
    ]


def rows(report: TrainingReport, name: str) -> list[float]:
    lines = (report.last.parent / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def test_a_corpus_on_disk_gives_the_model_of_one_in_memory(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    memory, disk = (
        train(
            make_experiment(
                tiny_model,
                tmp_path / texts,
                DataConfig(source=str(tiny_data), negatives_per_query=2, texts=texts),
            )
        )
        for texts in ("memory", "disk")
    )
    assert weights(disk) == weights(memory)
    assert disk.metrics == memory.metrics


def test_mixed_sets_train_and_a_stopped_run_goes_on_with_the_same_bytes(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(
        source=str(tiny_data),
        max_pairs=24,
        mixed_with=[SourceConfig(source=str(tiny_data), train_split="dev", weight=3.0)],
    )
    experiment = make_experiment(tiny_model, tmp_path / "whole", data)
    (tmp_path / "recipe.yaml").write_text(dump_experiment(experiment))
    assert load_experiment(tmp_path / "recipe.yaml") == experiment
    whole = train(experiment)
    with monkeypatch.context() as patch:
        asked = iter([False, False, True])
        patch.setattr(StopRequest, "agreed", lambda *_: next(asked))
        with pytest.raises(Preempted):
            train(replace(experiment, output=str(tmp_path / "parts")))
    assert (tmp_path / "parts" / "checkpoints" / "step-00000003").is_dir()
    parts = train(replace(experiment, output=str(tmp_path / "parts")), resume=True)
    assert weights(parts) == weights(whole)


@pytest.fixture
def scored_data(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny data with two negatives a query and a teacher's scores."""
    folder = tmp_path / "scored"
    shutil.copytree(tiny_data, folder)
    lines = [
        {
            "query-id": f"q{row}",
            "negatives": [f"d{(row + 3) % 80}", f"d{(row + 9) % 80}"],
            "scores": [0.1, row / 100],
            "positives": [f"d{row}"],
            "positive_scores": [0.9],
        }
        for row in range(56)
    ]
    (folder / "negatives.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_scores_of_a_teacher_are_learned_in_chunks_as_in_whole_batches(
    tiny_model: Path, scored_data: Path, tmp_path: Path
) -> None:
    data = DataConfig(source=str(scored_data), negatives_per_query=2)
    loss = DistillationConfig(teacher="given", objective="margin_mse", temperature=1.0)
    whole, chunked = (
        train(
            make_experiment(
                tiny_model, tmp_path / str(chunk), data, loss, chunk_size=chunk, dropout=False, steps=8
            )
        )
        for chunk in (0, 4)
    )
    found = rows(whole, "train/loss_compressed")
    assert found == pytest.approx(rows(chunked, "train/loss_compressed"), rel=1e-4)
    assert found[7] < found[0]


def test_given_scores_without_given_negatives_are_refused(
    tiny_model: Path, scored_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"teacher given .* Set data\.negatives_per_query to at least 1"):
        make_experiment(
            tiny_model,
            tmp_path / "run",
            DataConfig(source=str(scored_data)),
            DistillationConfig(teacher="given"),
        )


def test_the_share_of_padding_is_that_of_the_token_matrices(tiny_model: Path, tmp_path: Path) -> None:
    """Eight queries of a word, four documents of a word and four of nine; each text has two special tokens more.

    24 places of queries hold 24 tokens, 8 x 11 places of documents hold 4 x 3 + 4 x 11.
    """
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    texts = [f"w{row}" if row % 2 else " ".join(f"w{row + word}" for word in range(9)) for row in range(8)]
    lines = [json.dumps({"_id": f"d{row}", "text": text}) + "\n" for row, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{row}", "text": f"w{row}"}) + "\n" for row in range(8))
    )
    for split in ("train", "dev"):
        (folder / f"qrels/{split}.tsv").write_text("".join(f"q{row}\td{row}\t1\n" for row in range(8)))
    experiment = make_experiment(tiny_model, tmp_path / "run", DataConfig(source=str(folder)), steps=2)
    plain = replace(experiment, live_negatives=LiveNegativesConfig(), head=NoCompressionConfig())
    assert rows(train(plain), "perf/padding_share") == pytest.approx([1 - 80 / 112] * 2)

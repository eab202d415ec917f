"""A run that was killed continues bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retriever import DualEncoderConfig, InputError
from retriever.heads import ProductQuantizerConfig
from training import Experiment, Trainer, TrainingReport, dump_experiment
from training.experiment import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizationConfig,
    TrackingConfig,
)
from training.losses import MCLConfig

ROOT = Path(__file__).parents[2]
WEIGHTS = ("encoder/model.safetensors", "head/model.safetensors")

KILLED = textwrap.dedent("""
    import os, signal, sys
    import training.trainer
    from launch.main import main

    log = training.trainer.RunLog.log

    def log_or_die(self, step, values):
        log(self, step, values)
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    training.trainer.RunLog.log = log_or_die
    main(["train", sys.argv[1], "--json"])
""")


@pytest.fixture(scope="module")
def experiment(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Ten steps with dropout, a checkpoint each five, the warm start at step 3."""
    return Experiment(
        output=str(tmp_path_factory.mktemp("resume") / "run"),
        model=DualEncoderConfig(encoder=str(tiny_model), query_max_length=16, document_max_length=32),
        head=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, restart_window=5.0),
        loss=MCLConfig(),
        data=DataConfig(source=str(tiny_data), negatives_per_query=1),
        optimization=OptimizationConfig(
            steps=10, batch_size=16, lr=1e-3, accumulation=2, warm_start_documents=50
        ),
        evaluation=EvaluationConfig(every=2),
        checkpoint=CheckpointConfig(every=5, keep=5),
        tracking=TrackingConfig(every=1),
    )


@pytest.fixture(scope="module")
def whole(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingReport]:
    """A copy of the run that was never interrupted, and its report."""
    report = Trainer(experiment, progress=False).fit()
    copy = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(experiment.output, copy)
    return copy, report


@pytest.fixture(scope="module")
def killed(
    experiment: Experiment, whole: tuple[Path, TrainingReport], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the same run in another process leaves behind when it is killed after step 7."""
    shutil.rmtree(experiment.output)
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(dump_experiment(experiment))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(recipe)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    copy = tmp_path_factory.mktemp("killed") / "run"
    shutil.move(experiment.output, copy)
    return copy


@pytest.fixture
def output(experiment: Experiment, killed: Path) -> Iterator[Path]:
    """The output folder as the kill left it."""
    folder = Path(experiment.output)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(killed, folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def resume(experiment: Experiment) -> TrainingReport:
    return Trainer(experiment, progress=False).fit(resume=True)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows without wall-clock figures."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in row.items() if not name.startswith("perf/")} for row in found]


Whole = tuple[Path, TrainingReport]


def test_the_kill_left_a_checkpoint_and_no_last_model(output: Path) -> None:
    """What the other tests start from."""
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-00000005"]
    assert not (output / "last").exists()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_resumed_run_ends_with_the_same_bytes(
    experiment: Experiment, output: Path, whole: Whole, name: str
) -> None:
    report = resume(experiment)
    assert (report.last / name).read_bytes() == (whole[0] / "last" / name).read_bytes()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_resumed_run_has_the_same_best_model(
    experiment: Experiment, output: Path, whole: Whole, name: str
) -> None:
    report = resume(experiment)
    assert (report.best / name).read_bytes() == (whole[0] / "best" / name).read_bytes()


def test_a_resumed_run_has_the_same_rows_of_metrics(
    experiment: Experiment, output: Path, whole: Whole
) -> None:
    resume(experiment)
    assert metrics(output) == metrics(whole[0])


def test_a_resumed_run_reports_the_same(experiment: Experiment, output: Path, whole: Whole) -> None:
    assert resume(experiment) == whole[1]


def test_a_half_written_checkpoint_is_ignored(experiment: Experiment, output: Path, whole: Whole) -> None:
    half = output / "checkpoints" / "step-00000007"
    shutil.copytree(output / "checkpoints" / "step-00000005", half)
    (half / "manifest.json").unlink()
    report = resume(experiment)
    assert (report.last / WEIGHTS[0]).read_bytes() == (whole[0] / "last" / WEIGHTS[0]).read_bytes()


def test_a_temporary_folder_of_a_killed_checkpoint_is_ignored(
    experiment: Experiment, output: Path, whole: Whole
) -> None:
    folder = output / "checkpoints"
    shutil.copytree(folder / "step-00000005", folder / ".step-00000010.0a1b2c3d.tmp")
    report = resume(experiment)
    assert (report.last / WEIGHTS[0]).read_bytes() == (whole[0] / "last" / WEIGHTS[0]).read_bytes()


def test_a_run_without_a_checkpoint_starts_again(experiment: Experiment, output: Path, whole: Whole) -> None:
    shutil.rmtree(output / "checkpoints")
    resume(experiment)
    assert metrics(output) == metrics(whole[0])


def test_a_run_killed_before_its_last_model_was_written_reports_its_metrics(
    experiment: Experiment, output: Path, whole: Whole
) -> None:
    shutil.rmtree(output)
    shutil.copytree(whole[0], output)
    shutil.rmtree(output / "last")
    assert resume(experiment).metrics == whole[1].metrics


def test_without_resume_a_killed_run_is_left_alone(experiment: Experiment, output: Path) -> None:
    with pytest.raises(InputError, match=r"holds a run already.* add --resume"):
        Trainer(experiment, progress=False).fit()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimization": {"batch_size": 8}}, "batch_size"),
        ({"optimization": {"lr": 0.5}}, "lr"),
        ({"head": {"codebook_bits": 3}}, "codebook_bits"),
        ({"seed": 3}, "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_experiment_is_refused_and_the_change_named(
    experiment: Experiment, output: Path, changes: dict[str, Any], named: str
) -> None:
    parts = {
        name: replace(getattr(experiment, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    with pytest.raises(InputError, match=rf"step-00000005 was written with another .*\b{named}\b"):
        resume(replace(experiment, **parts))


def test_a_refused_resume_leaves_the_metrics_as_they_were(experiment: Experiment, output: Path) -> None:
    before = (output / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError):
        resume(replace(experiment, seed=3))
    assert (output / "metrics.jsonl").read_bytes() == before


def test_tracking_and_checkpoints_may_change(experiment: Experiment, output: Path, whole: Whole) -> None:
    changed = replace(
        experiment, tracking=TrackingConfig(every=3), checkpoint=CheckpointConfig(every=2, keep=1)
    )
    report = resume(changed)
    assert (report.last / WEIGHTS[0]).read_bytes() == (whole[0] / "last" / WEIGHTS[0]).read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json"])
def test_a_damaged_checkpoint_is_refused_with_the_files_name(
    experiment: Experiment, output: Path, name: str
) -> None:
    path = output / "checkpoints" / "step-00000005" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is damaged"):
        resume(experiment)

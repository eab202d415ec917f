"""metrics.jsonl over kills and resumes, and trackers behind one call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retriever import DualEncoderConfig, InputError
from retriever.heads import ProductQuantizerConfig
from training import Experiment
from training.checkpoint import Progress
from training.experiment import DataConfig, TrackingConfig
from training.losses import MCLConfig
from training.tracking import RunLog, check_tracking

ROWS = [
    {"step": 1, "train/loss": 4.5},
    {"step": 2, "train/loss": 4.25},
    {"step": 2, "eval/dense/ndcg@10": 0.5},
    {"step": 3, "train/loss": 4.0},
    {"step": 4, "train/loss": 3.75},
]
LINES = [json.dumps(row) + "\n" for row in ROWS]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def experiment(**tracking: object) -> Experiment:
    return Experiment(
        output="run",
        model=DualEncoderConfig(encoder="model"),
        head=ProductQuantizerConfig(),
        loss=MCLConfig(),
        data=DataConfig(source="data"),
        tracking=TrackingConfig(**tracking),
    )


def log_again(folder: Path, accelerator: Accelerator, text: str, step: int) -> str:
    """Put text into metrics.jsonl, start a log at a step, and return what the file holds then."""
    path = folder / "metrics.jsonl"
    path.write_text(text, encoding="utf-8")
    RunLog(folder, experiment(), accelerator, Progress(step=step))
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (9, 5)])
def test_a_resumed_run_keeps_exactly_the_rows_up_to_its_step(
    tmp_path: Path, accelerator: Accelerator, step: int, kept: int
) -> None:
    assert log_again(tmp_path, accelerator, "".join(LINES), step) == "".join(LINES[:kept])


@pytest.mark.parametrize("left", [1, 8, 12, 22])
def test_a_last_line_cut_by_a_kill_is_dropped(tmp_path: Path, accelerator: Accelerator, left: int) -> None:
    assert log_again(tmp_path, accelerator, "".join(LINES) + LINES[0][:left], 4) == "".join(LINES)


def test_a_row_logged_after_a_cut_line_begins_a_new_line(tmp_path: Path, accelerator: Accelerator) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(LINES)[:-4], encoding="utf-8")
    RunLog(tmp_path, experiment(), accelerator, Progress(step=3)).log(4, {"train/loss": 1.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [*ROWS[:4], {"step": 4, "train/loss": 1.0}]


def test_every_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path, accelerator: Accelerator) -> None:
    log = RunLog(tmp_path, experiment(), accelerator, Progress())
    log.log(1, {"train/loss": 2.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": 2.5}


def test_no_temporary_file_stays(tmp_path: Path, accelerator: Accelerator) -> None:
    log_again(tmp_path, accelerator, "".join(LINES), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "starts.jsonl"]


def test_only_the_main_process_writes(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    log = RunLog(tmp_path, experiment(), accelerator, Progress())
    log.log(1, {"train/loss": 2.5})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tensorboard_folder(tmp_path: Path, accelerator: Accelerator) -> Path:
    """A run that logged two rows to tensorboard."""
    tracked = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=str(tmp_path))
    log = RunLog(tmp_path, experiment(trackers=["tensorboard"], tags=["a", "b"]), tracked, Progress())
    log.log(1, {"train/loss": 2.5})
    log.log(2, {"train/loss": 1.25})
    log.close()
    return tmp_path


def read_events(folder: Path) -> list[tuple[int, float]]:
    events: list[tuple[int, float]] = []
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        accumulator = EventAccumulator(str(path))
        accumulator.Reload()
        if "train/loss" in accumulator.Tags()["scalars"]:
            events += [(event.step, event.value) for event in accumulator.Scalars("train/loss")]
    return events


def test_tensorboard_gets_every_row_through_the_same_call(tensorboard_folder: Path) -> None:
    assert read_events(tensorboard_folder) == [(1, 2.5), (2, 1.25)]


def test_metrics_jsonl_is_written_beside_a_tracker(tensorboard_folder: Path) -> None:
    lines = (tensorboard_folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_every_start_leaves_a_line_about_what_it_runs_on(tmp_path: Path, accelerator: Accelerator) -> None:
    for step in (0, 3):
        RunLog(tmp_path, experiment(), accelerator, Progress(step=step))
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 3]
    assert starts[1]["torch"] == torch.__version__.split("+")[0] or starts[1]["torch"] == torch.__version__
    assert (starts[1]["device"], starts[1]["processes"]) == ("cpu", "1")


def test_tensorboard_hides_the_rows_that_a_resumed_run_writes_again(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    for step, values in ((0, (2.5, 1.25, 0.5)), (1, (1.25, 0.75))):
        tracked = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=str(tmp_path))
        log = RunLog(tmp_path, experiment(trackers=["tensorboard"]), tracked, Progress(step=step))
        for number, value in enumerate(values, start=step + 1):
            log.log(number, {"train/loss": value})
        log.close()
    accumulator = EventAccumulator(str(tmp_path / "endex"), purge_orphaned_data=True)
    accumulator.Reload()
    found = [(event.step, event.value) for event in accumulator.Scalars("train/loss")]
    assert found == [(1, 2.5), (2, 1.25), (3, 0.75)]


def test_a_model_artifact_needs_wandb() -> None:
    with pytest.raises(
        InputError, match=r"log_model sends the model to wandb. Put wandb into tracking.trackers"
    ):
        check_tracking(TrackingConfig(log_model=True, trackers=["tensorboard"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_continues_the_same_run_and_gets_the_model(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, as on a cluster without a network; its files hold Protocol Buffers, whose texts stand there plain."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors").write_bytes(b"weights")
    progress = Progress()
    for step in (0, 1):
        tracked = Accelerator(cpu=True, log_with=["wandb"], project_dir=str(tmp_path))
        progress.step = step
        log = RunLog(
            tmp_path, experiment(trackers=["wandb"], log_model=True, tags=["a tag"]), tracked, progress
        )
        log.log(step + 1, {"train/loss": 2.5})
        if step:
            log.log_model(tmp_path / "best", {"dense/ndcg@10": 0.5})
        log.close()
    wandb.teardown()  # as when the process ends: its service writes the files
    files = sorted(tmp_path.rglob("run-*.wandb"))
    assert [path.name for path in files] == 2 * [f"run-{progress.run_id}.wandb"]
    first, second = (path.read_bytes() for path in files)
    for text in (b"init_args.num_codebooks", b"system.device", b"a tag", b"train/loss"):
        assert text in first
    artifact = (f"model-{progress.run_id}".encode(), b"model.safetensors", b"dense/ndcg@10")
    assert [text in first for text in artifact] == [False, False, False]
    assert [text in second for text in artifact] == [True, True, True]

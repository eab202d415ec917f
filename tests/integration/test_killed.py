"""Runs that are killed at random moments, stopped by signals, or continued by another number of processes.

This file is also the program of the processes that are killed: see `kill_often`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from index import FaissFit
from index._faiss import load_faiss
from launch.main import main
from retriever import DualEncoderConfig, InputError
from retriever.heads import ProductQuantizerConfig
from training import Experiment, Trainer, dump_experiment, load_experiment
from training.checkpoint import latest_checkpoint
from training.evaluate import measure
from training.experiment import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LiveNegativesConfig,
    OptimizationConfig,
    TrackingConfig,
)
from training.losses import MCLConfig
from training.preemption import PREEMPTED, Preempted, StopRequest
from training.run import TrainingRun
from training.run_folder import clear_leftovers, depends_on_processes
from training.tracking import RunLog

ROOT = Path(__file__).parents[2]
KILLS = 20
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
WEIGHTS = ("encoder/model.safetensors", "head/model.safetensors")


def kill_often(recipe: Path, output: Path, kept: Path, seed: int) -> None:
    """Run the recipe once, then runs that are killed at KILLS random moments; keep every run that ended.

    Each process is a fork of this one, which has read the recipe and imported everything and has run nothing: what
    `endex train --resume` is after its imports. A run is killed near four random steps, one after the other, and then
    let end; the next one starts from nothing, so that kills meet every part of a run: its start, its checkpoints,
    its end. Prints the number of steps that each kill found done.
    """
    torch.set_num_threads(1)
    experiment, draw, steps = load_experiment(recipe), random.Random(seed), []
    experiment.model.build(experiment.head)
    measure({"q": {"d": 1}}, {"q": {"d": 1.0}})
    load_faiss()
    _, _, used = os.wait4(start(experiment), 0)
    shutil.move(output, kept / "whole")
    while len(steps) < KILLS:
        for target in [*sorted(draw.sample(range(experiment.optimization.steps), 4)), None]:
            child = start(experiment)
            if target is not None and len(steps) < KILLS:
                wait(child, output, target, draw.random() * (used.ru_utime + used.ru_stime) / 4)
                time.sleep(draw.uniform(0, 0.02))  # or none would fall into waiting for the disk
                os.kill(child, signal.SIGKILL)  # of one that has ended, too: it is not waited for yet
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                break
            steps.append(steps_done(output))
        shutil.move(output, kept / str(len(list(kept.iterdir()))))
    print(json.dumps(steps))


def steps_done(output: Path) -> int:
    """Return the number of training steps in a run's metrics, -1 where there are none yet."""
    rows = output / "metrics.jsonl"
    return rows.read_text().count('"train/loss"') if rows.exists() else -1


def start(experiment: Experiment) -> int:
    """Train in a fork; return its process id."""
    child = os.fork()
    if child == 0:
        try:
            Trainer(experiment, progress=False).fit(resume=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def wait(child: int, output: Path, step: int, seconds: float) -> None:
    """Wait for a step, then for so many seconds of the process's CPU, which other load does not change, or its end."""
    clock = (~child << 3) | 2  # Linux's id of the clock, as clock_getcpuclockid(3) gives it

    def running() -> bool:
        time.sleep(0.001)
        return os.waitid(os.P_PID, child, ENDED) is None

    while step and steps_done(output) < step and running():
        pass
    until = time.clock_gettime(clock) + seconds
    while time.clock_gettime(clock) < until and running():
        pass


def make_experiment(model: Path, data: Path, output: Path, **optimization: Any) -> Experiment:
    """Twelve steps with dropout, live negatives, evaluations and a checkpoint each second step."""
    return Experiment(
        output=str(output),
        model=DualEncoderConfig(encoder=str(model), query_max_length=16, document_max_length=32),
        head=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, restart_window=5.0),
        loss=MCLConfig(),
        data=DataConfig(source=str(data), negatives_per_query=1),
        live_negatives=LiveNegativesConfig(per_query=1, depth=5, refresh=3),
        optimization=OptimizationConfig(
            **{
                "steps": 12,
                "batch_size": 8,
                "lr": 1e-3,
                "warm_start_documents": 50,
                "dense_warmup": 0.25,
                **optimization,
            }
        ),
        evaluation=EvaluationConfig(every=3),
        checkpoint=CheckpointConfig(every=2, keep=2),
        tracking=TrackingConfig(every=1),
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def rows(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.jsonl without wall-clock figures."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in row.items() if not name.startswith("perf/")} for row in found]


def content(folder: Path) -> dict[str, Any]:
    """Return everything that a run left and that is not a time or a random name."""
    files = {
        f"{name}/{part}": (folder / name / part).read_bytes() for name in ("best", "last") for part in WEIGHTS
    }
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    for part in ("model.safetensors", "optimizer.safetensors"):
        files[part] = (checkpoint / part).read_bytes()
    return {**files, "rows": rows(folder), "checkpoint": checkpoint.name}


@pytest.fixture(scope="module")
def killed(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of an uninterrupted run, of the runs that ended after kills, and where the kills fell."""
    folder = tmp_path_factory.mktemp("killed")
    output, recipe = folder / "run", folder / "recipe.yaml"
    recipe.write_text(dump_experiment(make_experiment(tiny_model, tiny_data, output)))
    (folder / "kept").mkdir()
    done = subprocess.run(
        [sys.executable, __file__, str(recipe), str(output), str(folder / "kept"), "2025"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ended = {path.name: content(path) for path in (folder / "kept").iterdir()}
    return {
        "whole": ended.pop("whole"),
        "ended": list(ended.values()),
        "steps": json.loads(done.stdout.splitlines()[-1]),
    }


def test_twenty_kills_leave_runs_that_end_with_the_same_bytes(killed: dict[str, Any]) -> None:
    """Weights, the last checkpoint's model and optimizer, and every row of metrics."""
    assert len(killed["steps"]) == KILLS
    assert killed["ended"]
    for found in killed["ended"]:
        assert found == killed["whole"]


def test_the_kills_met_different_parts_of_a_run(killed: dict[str, Any]) -> None:
    assert len(set(killed["steps"])) >= 5


def test_what_a_kill_left_is_cleared_and_a_best_model_moved_aside_comes_back(tmp_path: Path) -> None:
    for name in (
        ".best.0a.old",
        ".last.0b.tmp",
        "checkpoints/.step-00000002.0c.tmp",
        "checkpoints/step-00000004",
        "checkpoints/step-00000003",
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "checkpoints/step-00000003/manifest.json").write_text("{}")
    clear_leftovers(tmp_path)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_dir())
    assert left == ["best", "checkpoints", "checkpoints/step-00000003"]


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Return a function after which this process sends itself a signal when it logs a step, once."""

    def arrange(step: int, name: signal.Signals) -> None:
        def log_and_send(log: RunLog, at: int, values: dict[str, float]) -> None:
            original(log, at, values)
            if at == step and "train/loss" in values:
                os.kill(os.getpid(), name)
                monkeypatch.setattr(RunLog, "log", original)

        original = RunLog.log
        monkeypatch.setattr(RunLog, "log", log_and_send)

    return arrange


@pytest.fixture(scope="module")
def whole(
    tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, dict[str, Any]]:
    """An experiment without dropout, its output folder empty, and what its uninterrupted run leaves there."""
    output = tmp_path_factory.mktemp("whole") / "run"
    experiment = make_experiment(tiny_model, tiny_data, output, dropout=False, steps=6)
    experiment = replace(experiment, live_negatives=LiveNegativesConfig(per_query=2, depth=2, refresh=2))
    Trainer(experiment, progress=False).fit()
    found = content(output)
    shutil.rmtree(output)
    return experiment, found


Whole = tuple[Experiment, dict[str, Any]]
SignalAt = Callable[[int, signal.Signals], None]


@pytest.fixture
def output(whole: Whole) -> Iterator[Path]:
    yield Path(whole[0].output)
    shutil.rmtree(whole[0].output, ignore_errors=True)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_stopped_by_a_signal_has_a_checkpoint_of_that_step_and_ends_with_the_same_bytes(
    whole: Whole, output: Path, signal_at: SignalAt, name: signal.Signals
) -> None:
    """Step 3 is one of evaluation, which comes after the resume, and none of a checkpoint."""
    signal_at(3, name)
    with pytest.raises(Preempted) as stop:
        Trainer(whole[0], progress=False).fit()
    assert (stop.value.step, stop.value.checkpoint.name) == (3, "step-00000003")
    assert not any("eval/dense/ndcg@10" in row for row in rows(output))
    Trainer(whole[0], progress=False).fit(resume=True)
    assert content(output) == whole[1]


def test_a_signal_in_the_last_step_loses_nothing(whole: Whole, output: Path, signal_at: SignalAt) -> None:
    signal_at(6, signal.SIGTERM)
    with pytest.raises(Preempted):
        Trainer(whole[0], progress=False).fit()
    Trainer(whole[0], progress=False).fit(resume=True)
    assert content(output) == whole[1]


def test_the_verb_exits_with_75_and_says_how_to_continue(
    whole: Whole, output: Path, tmp_path: Path, signal_at: SignalAt, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text(dump_experiment(whole[0]))
    signal_at(2, signal.SIGTERM)
    assert main(["train", str(recipe), "--seed", "0", "--json"]) == PREEMPTED == 75
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"Continue with: endex train '{recipe}' --seed 0 --json --resume")


def test_signals_have_their_effect_again_after_a_run() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(torch.device("cpu"))
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_on_a_device_that_is_not_waited_for_the_answer_is_that_of_the_step_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The meta device stands for it; of two processes the other one is asked to stop at the second step."""
    others = iter([0, 1, 0])
    full = torch.full
    monkeypatch.setattr("training.preemption.world_size", lambda: 2)
    monkeypatch.setattr(torch, "full", lambda size, value, device: full(size, value))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, _: x.clamp_(min=next(others)))
    stop = StopRequest()
    assert [stop.agreed(torch.device("meta")) for _ in range(3)] == [False, False, True]


STOPPED = """
import os, signal, sys
from launch.main import main
from training.tracking import RunLog

log = RunLog.log

def log_and_send(self, step, values):
    log(self, step, values)
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)

RunLog.log = log_and_send
sys.exit(main(["train", sys.argv[1], "--json"]))
"""


def test_a_signal_to_one_of_two_processes_stops_both_and_one_process_continues(
    whole: Whole, output: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_experiment(whole[0]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "--no-python", sys.executable, "-c", STOPPED, str(recipe)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert len(re.findall(r"exitcode +: 75 ", done.stderr)) >= 1
    assert done.stderr.count("stopped by a signal after step 3") == 1
    assert [path.name for path in sorted((output / "checkpoints").iterdir())][-1] == "step-00000003"
    Trainer(whole[0], progress=False).fit(resume=True)
    for name in ("train/loss", "train/grad_norm_towers"):
        found, expected = ([row[name] for row in r if name in row] for r in (rows(output), whole[1]["rows"]))
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("part", "values", "named"),
    [
        ("optimization", {"dropout": True}, "dropout"),
        ("live_negatives", {"per_query": 1, "depth": 2}, "live negatives"),
        ("optimization", {"cross_device": "in_batch"}, "in_batch"),
        ("optimization", {"cross_device": "detached"}, "detached"),
        ("optimization", {"cross_device": "full", "world_scale": "ddp_mean"}, "ddp_mean"),
    ],
)
def test_what_depends_on_the_number_of_processes_is_named(
    whole: Whole, part: str, values: dict[str, Any], named: str
) -> None:
    assert depends_on_processes(whole[0]) is None
    reason = depends_on_processes(replace(whole[0], **{part: replace(getattr(whole[0], part), **values)}))
    assert reason is not None
    assert named in reason


def test_another_number_of_processes_is_refused_where_it_would_change_the_run(
    whole: Whole, output: Path, signal_at: SignalAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = replace(whole[0], optimization=replace(whole[0].optimization, dropout=True))
    signal_at(2, signal.SIGTERM)
    with pytest.raises(Preempted):
        Trainer(experiment, progress=False).fit()
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(
        InputError, match=r"by 1 processes and cannot continue exactly on 2: each .* own dropout"
    ):
        TrainingRun(experiment, FaissFit()).restore(resume=True)


if __name__ == "__main__":
    kill_often(*map(Path, sys.argv[1:4]), seed=int(sys.argv[4]))

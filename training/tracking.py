"""metrics.jsonl, starts.jsonl and experiment trackers. The only place that knows trackers' names.

Metric names: `train/...`, `head/...`, `perf/...`, `eval/dense/...`, `eval/compressed/...`.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from retriever import InputError
from training.checkpoint import Progress
from training.experiment import Experiment, TrackingConfig
from training.recipe import dump_experiment
from training.system import describe_system

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["RunLog", "check_tracking", "flatten"]


def check_tracking(config: TrackingConfig) -> None:
    """Raise InputError if no tracker can do what is asked of it."""
    if config.log_model and "wandb" not in config.trackers:
        raise InputError("tracking.log_model sends the model to wandb. Put wandb into tracking.trackers.")


class RunLog:
    """Writes rows of metrics to `metrics.jsonl` and to the trackers that accelerate was given.

    What the run runs on goes to `starts.jsonl`, a line for each start or resume, and to the trackers' configuration.

    Args:
        folder: The run's folder.
        experiment: Its configuration, sent to the trackers.
        accelerator: Made with `log_with=experiment.tracking.trackers`.
        progress: Rows after its step are dropped, as a resumed run writes them again; its run id names the run.
    """

    def __init__(
        self, folder: Path, experiment: Experiment, accelerator: Accelerator, progress: Progress
    ) -> None:
        self._path = folder / "metrics.jsonl"
        self._accelerator = accelerator
        if not accelerator.is_main_process:
            return
        system = describe_system(accelerator)
        with (folder / "starts.jsonl").open("a", encoding="utf-8") as file:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(json.dumps({"step": progress.step, "time": started, **system}) + "\n")
        _truncate(self._path, progress.step)
        if experiment.tracking.trackers:
            self._start_trackers(folder, experiment, progress, system)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one row, on the main process."""
        if self._accelerator.is_main_process:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log(values, step=step)

    def log_model(self, folder: Path, metrics: dict[str, float]) -> None:
        """Send a model folder to Weights & Biases as an artifact, on the main process."""
        if not self._accelerator.is_main_process:
            return
        import wandb

        run = self._accelerator.get_tracker("wandb", unwrap=True)
        artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=metrics)
        artifact.add_dir(str(folder))
        run.log_artifact(artifact, aliases=[folder.name])

    def close(self) -> None:
        """Finish the trackers."""
        self._accelerator.end_training()

    def _start_trackers(
        self, folder: Path, experiment: Experiment, progress: Progress, system: dict[str, str]
    ) -> None:
        tracking = experiment.tracking
        options = {
            "wandb": {
                "name": tracking.name or folder.name,
                "tags": tracking.tags,
                "id": progress.run_id,
                "resume": "allow",
                "dir": str(folder),
            },
            "tensorboard": {
                "purge_step": progress.step + 1
            },  # rows that a kill left behind, and that come again
        }
        config = flatten(yaml.safe_load(dump_experiment(experiment)) | {"system": system})
        self._accelerator.init_trackers(tracking.project, config=config, init_kwargs=options)


def _truncate(path: Path, step: int) -> None:
    """Keep the rows up to `step`."""
    if not path.is_file():
        return
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line cut by a kill
        return float("inf")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted names and plain values, as every tracker takes them."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat

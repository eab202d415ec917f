"""Checkpoints: everything that a run needs to continue bit for bit, without pickle.

Order of pairs and random numbers are functions of seed and step, so weights, optimizer and step are enough.
"""

from __future__ import annotations

import re
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from retriever.errors import InputError
from retriever.folder import check_folder, publish_folder, read_json, write_json
from training.sharding import shards_like

__all__ = ["Progress", "checkpoint_folder", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]

STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps done.
        run_id: Names the run at trackers, through every resume.
        evaluated: Step of the last evaluation.
        best_metric: Best value of the metric that names the best model; None before the first evaluation.
        best_step: Its step.
        worse: Evaluations since then.
        processes: Processes of the run.
        stopped: The run ended early by `patience`.
        metrics: Those of the last evaluation.
    """

    step: int = 0
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    evaluated: int = 0
    best_metric: float | None = None
    best_step: int = 0
    worse: int = 0
    processes: int = 1
    stopped: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is written."""
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    *,
    weights: dict[str, torch.Tensor],
    moments: dict[str, Any],
    progress: Progress,
    experiment_yaml: str,
    scaler: dict[str, Any] | None,
    keep: int,
) -> None:
    """Publish `folder/step-N` with the whole states of model and optimizer; remove all but the newest `keep`."""
    with publish_folder(checkpoint_folder(folder, progress.step), "checkpoint", overwrite=True) as path:
        save_file(_unshared(weights), path / "model.safetensors")
        tensors, scalars = _split_optimizer(moments)
        save_file(tensors, path / "optimizer.safetensors")
        write_json(path / "trainer.json", {**asdict(progress), "optimizer": scalars, "scaler": scaler})
        (path / "experiment.yaml").write_text(experiment_yaml, encoding="utf-8")
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Any] | None]:
    """Restore model and optimizer; return the progress and the state of the gradient scaler.

    Raises:
        InputError: If a file is missing or damaged, or the checkpoint is of another model.
    """
    check_folder(path, "checkpoint")
    stored = read_json(path / "trainer.json")
    optimizer_scalars, scaler = stored.pop("optimizer"), stored.pop("scaler")
    weights = shards_like(load_file(path / "model.safetensors"), model.state_dict())
    missing, unexpected = model.load_state_dict(weights, strict=False)
    shared = set(model.state_dict()) - set(_unshared(model.state_dict()))
    if unexpected or set(missing) - shared:
        wrong = [*unexpected, *(set(missing) - shared)][0]
        raise InputError(
            f"{path} is of another model: it differs in {wrong!r}. Resume with the experiment that wrote it."
        )
    tensors = load_file(path / "optimizer.safetensors")
    moments = _join_optimizer(tensors, optimizer_scalars)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in moments["state"].items():
        moments["state"][number] = shards_like(values, dict.fromkeys(values, parameters[number]))
    optimizer.load_state_dict(moments)
    return Progress(**stored), scaler


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(path for path in found if (path / "manifest.json").is_file())


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict with tensors that tied towers share kept once, as safetensors needs it."""
    seen: set[int] = set()
    kept = {}
    for name, value in state.items():
        if value.data_ptr() not in seen or value.numel() == 0:
            kept[name] = value.contiguous()
            seen.add(value.data_ptr())
    return kept


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of an optimizer state by `parameter.name`, and the rest, which JSON can hold."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{parameter}.{name}"] = value
            else:
                scalars[f"{parameter}.{name}"] = value
    return tensors, {"state": scalars, "param_groups": state["param_groups"]}


def _join_optimizer(tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars["state"]}.items():
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = value
    return {"state": state, "param_groups": scalars["param_groups"]}

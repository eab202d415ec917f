"""The folder of a run: what may be started, continued, and written there."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from retriever import InputError
from retriever.folder import MANIFEST
from training.checkpoint import STEP_FOLDER, latest_checkpoint
from training.experiment import Experiment
from training.recipe import dump_experiment, load_experiment
from training.tracking import flatten

__all__ = ["checkpoint_to_continue", "clear_leftovers", "depends_on_processes", "refuse_finished"]

MAY_CHANGE = ("tracking", "checkpoint", "evaluation")  # parts of an experiment that a resumed run may change


def refuse_finished(folder: Path, resume: bool) -> None:
    """Raise InputError if a folder holds a run already, or, when resuming, a finished one."""
    if not resume:
        for name in ("metrics.jsonl", "checkpoints", "best", "last"):
            if (folder / name).exists():
                raise InputError(
                    f"{folder} holds a run already. Choose another output, add --resume to continue it, "
                    "or delete it first."
                )
    elif (folder / "last").exists():
        raise InputError(f"{folder} is a finished run. Choose another output to train again.")


def checkpoint_to_continue(folder: Path, experiment: Experiment) -> Path | None:
    """Return the newest checkpoint of a run, or None.

    Raises:
        InputError: If it was written with another experiment.
    """
    path = latest_checkpoint(folder / "checkpoints")
    if path is None:
        return None
    stored, current = (
        flatten(yaml.safe_load(dump_experiment(version)))
        for version in (load_experiment(path / "experiment.yaml"), experiment)
    )
    names = sorted(stored.keys() | current.keys())
    changed = [n for n in names if n.split(".")[0] not in MAY_CHANGE and stored.get(n) != current.get(n)]
    if changed:
        raise InputError(
            f"{path} was written with another {', '.join(changed)}. Resume with the same experiment "
            f"({', '.join(MAY_CHANGE)} may change), or choose another output."
        )
    return path


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process was about to write or to delete; put back a model that it had moved aside."""
    checkpoints = folder / "checkpoints"
    for old in folder.glob(".best.*.old"):
        if not (folder / "best").exists():
            old.rename(folder / "best")
    half = [path for path in checkpoints.glob("*") if STEP_FOLDER.fullmatch(path.name)]
    half = [path for path in half if not (path / MANIFEST).is_file()]
    for parent in (folder, checkpoints):
        half += [*parent.glob(".*.tmp"), *parent.glob(".*.old")]
    for path in half:
        shutil.rmtree(path)


def depends_on_processes(experiment: Experiment) -> str | None:
    """Return what makes a run's numbers depend on the number of processes by more than rounding, or None."""
    optimization, live = experiment.optimization, experiment.live_negatives
    if optimization.dropout and optimization.freeze != "both":
        return "each process draws its own dropout (optimization.dropout)"
    if live.per_query and live.per_query < live.depth:
        return "each process draws its own live negatives (live_negatives.per_query below depth)"
    if optimization.cross_device in ("in_batch", "detached"):
        return f"negatives are shared another way (optimization.cross_device {optimization.cross_device})"
    if optimization.cross_device == "full" and optimization.world_scale == "ddp_mean":
        return "gradients are divided by the number of processes (optimization.world_scale ddp_mean)"
    return None

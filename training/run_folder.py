"""The folder of a run: what may be started, continued, and written there."""

from __future__ import annotations

from pathlib import Path

import yaml

from retriever import InputError
from training.checkpoint import latest_checkpoint
from training.experiment import Experiment
from training.recipe import dump_experiment, load_experiment
from training.tracking import flatten

__all__ = ["checkpoint_to_continue", "refuse_finished"]

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

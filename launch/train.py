"""`endex train CONFIG.yaml [--dotted.option value ...] [--resume]`."""

from __future__ import annotations

import json
import os
import shlex
import sys

from launch.distributed import start_processes, take_options
from training import Trainer, parse_experiment
from training.preemption import PREEMPTED, Preempted
from training.recipe import experiment_parser

__all__ = ["run"]

USAGE = """usage: endex train CONFIG.yaml [--dotted.option value ...] [--resume] [--json] [--print_config]
                   [--accelerate_config NAME|FILE [--num_processes N] [--num_machines M]
                    [--machine_rank R] [--main_process_ip HOST] [--main_process_port PORT]]

Trains the experiment that the YAML file describes; options override its fields. Writes metrics.jsonl, best/, last/
and checkpoints/ into its `output` folder. Under torchrun: torchrun --no-python endex train CONFIG.yaml.
On SIGTERM or SIGUSR1 it finishes the step, writes a checkpoint and exits with code 75: start it again with --resume.
NAME is one of single_gpu, multi_gpu, multi_node, fsdp2, cpu_gloo (launch/accelerate/); it starts the processes itself.
"""


def run(words: list[str]) -> int:
    """Train; print where the model is."""
    if not words or "--help" in words or "-h" in words:
        print(USAGE)
        experiment_parser(prog="endex train CONFIG.yaml").print_help()
        return 0 if words else 2
    given = [word for word in words if word != "--resume"]
    rest, devices = take_options(words)
    if devices is not None:
        start_processes(devices, ["train", *words])
    words = rest
    flags = {name: f"--{name}" in words for name in ("resume", "json")}
    words = [word for word in words if word not in ("--resume", "--json")]
    if not words[0].startswith("-"):
        words = ["--config", *words]
    if any(word.startswith("--print_config") for word in words):
        experiment_parser().parse_args(words)
    trainer = Trainer(parse_experiment(words), progress=sys.stderr.isatty() or not flags["json"])
    try:
        report = trainer.fit(resume=flags["resume"])
    except Preempted as stop:
        return _stopped(stop, given)
    if not _is_first_process():
        return 0
    result = {
        "best": str(report.best),
        "last": str(report.last),
        "steps": report.steps,
        "metrics": report.metrics,
    }
    if flags["json"]:
        print(json.dumps(result))
        return 0
    print(f"trained {report.steps} steps; best (step {report.best_step}): {report.best}, last: {report.last}")
    for name, value in report.metrics.items():
        print(f"  {name:<24}{value:.4f}")
    return 0


def _stopped(stop: Preempted, given: list[str]) -> int:
    """Say how a stopped run continues."""
    if _is_first_process():
        command = shlex.join(["endex", "train", *given, "--resume"])
        print(f"endex: {stop}. Continue with: {command}", file=sys.stderr)
    return PREEMPTED


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # the process group has ended

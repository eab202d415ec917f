"""`endex train CONFIG.yaml [--dotted.option value ...] [--resume]`."""

from __future__ import annotations

import json
import sys

from training import Trainer, parse_experiment
from training.recipe import experiment_parser

__all__ = ["run"]

USAGE = """usage: endex train CONFIG.yaml [--dotted.option value ...] [--resume] [--json] [--print_config]

Trains the experiment that the YAML file describes; options override its fields. Writes metrics.jsonl, best/, last/
and checkpoints/ into its `output` folder. Under torchrun: torchrun --no-python endex train CONFIG.yaml.
"""


def run(words: list[str]) -> int:
    """Train; print where the model is."""
    if not words or "--help" in words or "-h" in words:
        print(USAGE)
        experiment_parser(prog="endex train CONFIG.yaml").print_help()
        return 0 if words else 2
    flags = {name: f"--{name}" in words for name in ("resume", "json")}
    words = [word for word in words if word not in ("--resume", "--json")]
    if not words[0].startswith("-"):
        words = ["--config", *words]
    if any(word.startswith("--print_config") for word in words):
        experiment_parser().parse_args(words)
    report = Trainer(parse_experiment(words), progress=sys.stderr.isatty() or not flags["json"]).fit(
        resume=flags["resume"]
    )
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

"""Train on a Ray cluster: one worker a GPU, each of which is a process of `endex train`.

    python launch/ray/train.py --workers 16 [--cpu] -- recipe.yaml --output /shared/runs/model

Words after `--` are those of `endex train`. Ray places the workers and tells them of each other by the variables that
torchrun sets, so the same program runs. Endex is installed on every node; recipe, data and output lie on storage that
all of them share, by absolute paths. When a worker or its node dies, Ray starts all of them again, and they continue
from the newest checkpoint.
"""

from __future__ import annotations

import sys
from typing import Any

from launch.arguments import parse, verb_parser
from launch.main import main
from retriever import InputError

__all__ = ["run", "train_on_worker"]

RETRIES = 10  # of the whole run, when a worker dies


def train_on_worker(config: dict[str, Any]) -> None:
    """Run `endex train` as one process of the run. Runs in a Ray worker.

    Raises:
        RuntimeError: If it fails; what was wrong is in the worker's log, in one line.
    """
    code = main(["train", *config["words"], "--resume"])
    if code:
        raise RuntimeError(
            f"endex train ended with exit code {code}; its message is above, in the worker's log."
        )


def run(words: list[str]) -> int:
    """Train on the cluster; return once the run is done."""
    end = words.index("--") if "--" in words else len(words)
    parser = verb_parser("train", "Train on a Ray cluster; words of endex train after --.")
    parser.prog = "launch/ray/train.py"
    parser.add_argument("--workers", type=int, required=True, help="Processes, one a GPU.")
    parser.add_argument("--cpu", action="store_true", help="Train on CPUs, by gloo.")
    parser.add_argument("--cpus_per_worker", type=float, default=8.0, help="CPU cores reserved for a worker.")
    parser.add_argument("--storage", type=str | None, default=None, help="Folder of Ray's own files, shared.")
    options = parse(parser, words[:end])
    if not words[end + 1 :]:
        raise InputError("there is nothing to train. Put the words of endex train behind --.")
    trainer = make_trainer(words[end + 1 :], options)
    trainer.fit()
    return 0


def make_trainer(words: list[str], options: Any) -> Any:
    """Return Ray's trainer, which starts nothing before `fit`.

    Raises:
        InputError: If Ray is missing.
    """
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ModuleNotFoundError:
        raise InputError("the Ray recipe needs ray. Run: pip install 'endex[ray]'") from None

    return TorchTrainer(
        train_on_worker,
        train_loop_config={"words": words},
        scaling_config=ScalingConfig(
            num_workers=options.workers,
            use_gpu=not options.cpu,
            resources_per_worker={"CPU": options.cpus_per_worker, **({} if options.cpu else {"GPU": 1})},
        ),
        torch_config=TorchConfig(backend="gloo" if options.cpu else "nccl"),
        run_config=RunConfig(
            storage_path=options.storage, failure_config=FailureConfig(max_failures=RETRIES)
        ),
    )


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except InputError as error:
        print(f"endex: {error}", file=sys.stderr)
        sys.exit(2)

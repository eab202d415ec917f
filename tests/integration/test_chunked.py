"""A batch in chunks has the gradient of the whole batch, on one process and on several.

This file is also the program of the worker processes: see `worker`.

Shapes: B queries, H negatives a query, L tokens, I inputs, D dimensions.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import training.chunked
from retriever import DualEncoder, DualEncoderConfig, InputError, TokenBatch
from retriever.data import document_key
from retriever.heads import (
    CNTConfig,
    HeadConfig,
    IVFProductQuantizerConfig,
    IVFResidualQuantizerConfig,
    NoCompressionConfig,
    PCAConfig,
    ProductQuantizerConfig,
)
from training import Experiment, Trainer
from training.chunked import ChunkedRound, RandomState
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
    ReconstructionConfig,
)
from training.rounds import RoundResult, WholeRound
from training.scoring import score_batch
from training.tracking import RunLog

ROOT = Path(__file__).parents[2]
B, H, L, D = 24, 1, 5, 8
VOCABULARY = 2000
SMALL: dict[str, Any] = {"num_codebooks": 4, "codebook_bits": 2, "rotation": "none"}
OWN: dict[str, Any] = {"distortion_weight": 0.2, "commitment_weight": 0.1}
HEADS: dict[str, HeadConfig] = {
    "none": NoCompressionConfig(),
    "pq-codeword": ProductQuantizerConfig(estimator="codeword", distortion_reduction="sum", **SMALL, **OWN),
    "pq-softmax": ProductQuantizerConfig(estimator="softmax", **SMALL),
    "pq-sinkhorn": ProductQuantizerConfig(balance="sinkhorn", sinkhorn_epsilon=0.05, **SMALL, **OWN),
    "ivfpq-identity": IVFProductQuantizerConfig(num_lists=3, estimator="identity", **SMALL, **OWN),
    "ivfrq-codeword": IVFResidualQuantizerConfig(num_lists=3, num_codebooks=3, codebook_bits=2, **OWN),
    "ivfpq-softmax": IVFProductQuantizerConfig(num_lists=3, estimator="softmax", **SMALL),
    "pca-codeword": PCAConfig(components=4, inner=ProductQuantizerConfig(**SMALL, commitment_weight=0.1)),
    "cnt-softmax": CNTConfig(
        expansion=2, tokens=2, inner=ProductQuantizerConfig(estimator="softmax", **SMALL)
    ),
}
RETRIEVAL: dict[str, LossConfig] = {
    "contrastive": ContrastiveConfig(temperature=0.5),
    "mcl": MCLConfig(temperature=0.5, reconstruction_weight=0.3),
    "mcl-assignment": MCLConfig(temperature=0.5, assignment_weight=0.5, reconstruction_weight=0.3),
    "hinge": HingeConfig(margin=3.0),
    "lambda_rank": LambdaRankConfig(temperature=0.5, depth=9),
    "distillation": DistillationConfig(temperature=0.5, dense_weight=0.5, label_weight=0.7),
    "reconstruction": ReconstructionConfig(),
    "inrp": INRPConfig(task=MCLConfig(temperature=0.5, reconstruction_weight=0.3), inrp_weight=0.5),
    "distillation-ranknet": DistillationConfig(temperature=0.5, objective="ranknet", list_weight=0.3),
}
PAIRS = [
    (loss, head)
    for loss, head in itertools.product(RETRIEVAL, HEADS)
    if (head.endswith("softmax") or loss in ("mcl", "contrastive"))
    and not (loss == "mcl-assignment" and head != "pq-softmax")
    and (loss == "inrp") == (head == "cnt-softmax")
]
FEW = [  # every loss and every head once
    *((loss, "pq-softmax") for loss in RETRIEVAL if loss not in ("distillation", "inrp")),
    ("distillation", "ivfpq-softmax"),
    ("inrp", "cnt-softmax"),
    *(("mcl", head) for head in HEADS if head not in ("pq-softmax", "cnt-softmax")),
]
BLOCK = 250  # scores at a time: those of five queries, so that five blocks make a batch
TOLERANCE = 1e-12  # of the length of a parameter's gradient, in float64


@dataclass(frozen=True)
class Case:
    """What one process, or several, compute together."""

    loss: str
    head: str
    chunk: int  # queries, 0 for a whole round
    mode: str = "rows"
    accumulation: int = 1
    dropout: float = 0.0
    checkpointed: bool = False
    freeze: str = "none"
    precision: str = "no"
    loss_scale: float = 0.0  # of a gradient scaler, as fp16 has it

    def __str__(self) -> str:
        defaults = {field.name: field.default for field in fields(self)}
        return "-".join(str(value) for name, value in vars(self).items() if value != defaults[name])


class Tower(nn.Module):
    """A bag of token vectors with dropout: small, and as random as a transformer."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.tokens, self.linear = nn.Embedding(VOCABULARY, D), nn.Linear(D, D, bias=False)
        self.dropout, self.checkpointed = nn.Dropout(case.dropout), case.checkpointed

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        mask = tokens["attention_mask"].unsqueeze(-1)
        mean = (self.tokens(tokens["input_ids"]) * mask).sum(1) / mask.sum(1)
        if self.checkpointed:
            return checkpoint(self.rest, mean, use_reentrant=False)  # type: ignore[no-any-return]
        return self.rest(mean)

    def rest(self, mean: Tensor) -> Tensor:
        return nn.functional.normalize(self.linear(self.dropout(mean)).float(), dim=-1)


def make_tokens(seed: int, part: slice) -> TokenBatch:
    """Return some queries of the whole batch, and their documents; some repeat or are relevant to several queries."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randint(40, (B, 1 + H), generator=generator)
    documents[-1] = documents[0]
    keys = torch.tensor([document_key(f"d{i}") for i in range(40)])
    texts = torch.randint(1, VOCABULARY, (40 + B, L), generator=generator)
    lengths = torch.randint(2, L + 1, (40 + B, 1), generator=generator)
    relevant = torch.cat([keys[documents[:, :1]], keys[torch.randint(40, (B, 2), generator=generator)]], 1)
    rows = documents[part].flatten()

    def tokens(which: Tensor) -> dict[str, Tensor]:
        return {"input_ids": texts[which], "attention_mask": (torch.arange(L) < lengths[which]).long()}

    return TokenBatch(
        queries=tokens(40 + torch.arange(B)[part]),
        documents=tokens(rows),
        document_keys=keys[rows],
        relevant_keys=relevant[part],
        positives=torch.arange(part.stop - part.start) * (1 + H),
    )


class Teacher:
    """The candidates of a run whose only addition is a frozen teacher."""

    def __init__(self, model: DualEncoder | None) -> None:
        self.model = model

    def extend(self, tokens: TokenBatch, _: DualEncoder, *, compressed: bool) -> TokenBatch:
        return tokens

    def renew(self, _: Tensor, __: Tensor) -> None:
        pass

    def known_vectors(self, _: TokenBatch) -> None:
        return None

    @torch.no_grad()
    def teach(self, tokens: TokenBatch, _: None) -> tuple[Tensor, Tensor] | None:
        if self.model is None:
            return None
        return self.model.encode_queries(tokens.queries), self.model.encode_documents(tokens.documents)


def make_run(case: Case, seed: int) -> Any:
    """Return what a round needs of a `TrainingRun`; the same weights for all cases of a head."""
    torch.manual_seed(seed)
    head = HEADS[case.head].build(D)
    student, teacher = (DualEncoder(Tower(case), Tower(case), head) for _ in range(2))  # type: ignore[arg-type]
    for tower in ("query_encoder", "document_encoder"):
        if case.freeze in (tower, "both"):
            getattr(student, tower).requires_grad_(False)
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=case.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if case.loss_scale:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=case.loss_scale)
    optimization = OptimizationConfig(
        batch_size=B,
        accumulation=case.accumulation,
        chunk_size=case.chunk,
        cross_device=case.mode,  # type: ignore[arg-type]
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=student,
        wrapped=accelerator.prepare(student),
        candidates=Teacher(teacher.eval() if RETRIEVAL[case.loss].needs_teacher else None),
        loss=RETRIEVAL[case.loss].build(),
        processes=accelerator.num_processes,
        experiment=SimpleNamespace(optimization=optimization),
    )


@contextmanager
def float64() -> Iterator[None]:
    """Compute in float64 what asks for float32, so that rounding cannot hide an error, or look like one."""
    default, single = torch.get_default_dtype(), Tensor.float
    torch.set_default_dtype(torch.float64)
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        Tensor.float = single  # type: ignore[method-assign]


def step(case: Case, seed: int) -> dict[str, Tensor]:
    """Return the loss and the gradients by name of a step, averaged over processes as DDP does."""
    if case.precision != "no":
        return _step(case, seed)
    with float64():
        return _step(case, seed)


def _step(case: Case, seed: int) -> dict[str, Tensor]:
    run = make_run(case, seed)
    size = B // (case.accumulation * run.processes)
    one_round = (ChunkedRound if case.chunk else WholeRound)(run)
    values: dict[str, Tensor] = {}
    for number in range(case.accumulation):
        start = (number * run.processes + run.accelerator.process_index) * size
        ends = [*range(start, start + size, case.chunk or size), start + size]
        chunks = [make_tokens(seed, slice(a, b)) for a, b in itertools.pairwise(ends)]
        result: RoundResult = one_round(chunks, compress=True, last=number == case.accumulation - 1)
        loss = torch.stack(list(result.parts.values())).sum() / case.accumulation
        values["loss"] = values.get("loss", torch.tensor(0.0)) + run.accelerator.reduce(loss, "mean")
    named = run.model.named_parameters()
    found = {**values, **{name: p.grad for name, p in named if p.grad is not None}}
    return {name: value for name, value in found.items() if bool(value.any())}  # none and 0 are one


def whole(case: Case, seed: int) -> dict[str, Tensor]:
    """Return loss and gradients of one process without chunks."""
    same = {name: getattr(case, name) for name in ("loss", "head", "accumulation", "freeze")}
    return step(Case(chunk=0, **same), seed)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest distance relative to the length of what is expected, and where it is."""
    assert found.keys() == expected.keys()
    lengths = {name: max(value.norm().item(), 1e-6) for name, value in expected.items()}
    moved = [
        name for name in expected if not name.endswith("embed.linear.bias")
    ]  # 0: a batch norm takes it out again
    return max(((found[n] - expected[n]).norm().item() / lengths[n], n) for n in moved)


# --- one process ---


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(training.chunked, "SCORES_AT_ONCE", BLOCK)


@pytest.fixture(scope="module")
def seed() -> int:
    drawn = int(np.random.default_rng().integers(2**31))
    print("seed", drawn)
    return drawn


def test_every_registered_loss_is_tested_here() -> None:
    assert {config.name for config in RETRIEVAL.values()} == set(LOSSES)


every_pair = pytest.mark.parametrize(("loss", "head"), PAIRS, ids=[f"{loss}-{head}" for loss, head in PAIRS])


@every_pair
def test_chunks_have_the_loss_and_the_gradients_of_the_whole_batch(seed: int, loss: str, head: str) -> None:
    case = Case(loss, head, chunk=7)  # the last chunk has 3 queries
    assert worst(step(case, seed), whole(case, seed))[0] < TOLERANCE


@pytest.mark.parametrize("freeze", ["query_encoder", "document_encoder", "both"])
def test_chunks_have_the_gradients_of_the_whole_batch_with_frozen_towers(seed: int, freeze: str) -> None:
    case = Case("mcl", "pq-codeword", chunk=7, freeze=freeze)
    assert worst(step(case, seed), whole(case, seed))[0] < TOLERANCE


def test_accumulated_rounds_have_the_mean_gradient_of_the_rounds(seed: int) -> None:
    """Negatives are shared within a round, so this is another gradient than that of one round of all queries."""
    case = Case("mcl", "pq-codeword", chunk=5, accumulation=2)
    assert worst(step(case, seed), whole(case, seed))[0] < TOLERANCE
    assert worst(step(case, seed), whole(replace(case, accumulation=1), seed))[0] > 1e-2


def test_without_negatives_accumulated_rounds_have_the_gradient_of_one_round(seed: int) -> None:
    case = Case("reconstruction", "pq-softmax", chunk=0, accumulation=2)
    assert worst(step(case, seed), whole(replace(case, accumulation=1), seed))[0] < TOLERANCE


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_the_second_pass_has_the_dropout_of_the_first(seed: int, checkpointed: bool) -> None:
    case = Case("mcl", "pq-codeword", chunk=7, dropout=0.4, checkpointed=checkpointed)
    found = step(case, seed)
    with float64():
        run = make_run(case, seed)  # draws from here on what the chunks drew
        ends = [*range(0, B, 7), B]
        parts = [run.model(make_tokens(seed, slice(a, b)), False) for a, b in itertools.pairwise(ends)]
        queries, documents = (torch.cat([getattr(p, n) for p in parts]) for n in ("queries", "documents"))
        tokens = make_tokens(seed, slice(0, B))
        vectors = run.model(tokens, True, documents, queries)
        scored = score_batch(vectors, tokens, metric=run.model.head.metric, mode="rows")
        loss = sum(run.loss(scored).values()) + sum(vectors.compressed.losses.values())
        loss.backward()
        expected = {"loss": loss.detach(), **{n: p.grad for n, p in run.model.named_parameters()}}
    assert worst(found, expected)[0] < TOLERANCE


def test_random_numbers_go_on_after_a_replay_as_if_there_had_been_none() -> None:
    state = RandomState(torch.device("cpu"))
    first = torch.rand(3)
    with state.replayed():
        again = torch.rand(3)
    next_ones = torch.rand(3)
    torch.set_rng_state(state._cpu)
    assert torch.equal(again, first)
    assert torch.equal(torch.rand(6)[3:], next_ones)


def test_a_gradient_scaler_scales_every_gradient_of_the_chunks_once(seed: int) -> None:
    case = Case("mcl", "pq-codeword", chunk=7, loss_scale=1024.0)
    found, expected = step(case, seed), whole(case, seed)
    scaled = {name: value * (1 if name == "loss" else 1024.0) for name, value in expected.items()}
    assert worst(found, scaled)[0] < TOLERANCE


def test_chunks_in_bf16_have_about_the_gradients_of_the_whole_batch_in_bf16(seed: int) -> None:
    case = Case("mcl", "pq-softmax", chunk=7, precision="bf16")
    assert worst(step(case, seed), step(replace(case, chunk=0), seed))[0] < 0.02


def test_towers_that_do_not_repeat_themselves_are_refused(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)  # is not replayed
    monkeypatch.setattr(Tower, "rest", lambda _, mean: mean + torch.randn(mean.shape, generator=generator))
    with pytest.raises(InputError, match=r"give the same vectors twice .* Set optimization.dropout false"):
        step(Case("mcl", "none", chunk=7), seed)


def test_a_tower_that_normalizes_by_the_batch_is_refused_before_the_first_step(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = DualEncoderConfig.build

    def build_normalizing(*given: Any, **named: Any) -> DualEncoder:
        model = build(*given, **named)
        model.document_encoder.norm = nn.BatchNorm1d(D)
        return model

    monkeypatch.setattr(DualEncoderConfig, "build", build_normalizing)
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "data").symlink_to(tiny_data)
    with pytest.raises(
        InputError, match=r"the tower's norm normalizes by the whole batch, got 3\. Set chunk_size 0"
    ):
        train("chunks", tmp_path)


# --- several processes ---

TOGETHER = [
    *(Case(*pair, chunk=2, mode=mode, accumulation=2) for pair in FEW for mode in ("rows", "full")),
    *(Case(*pair, chunk=0, accumulation=2) for pair in FEW),
    *(
        Case("mcl", "pq-codeword", chunk=2, freeze=tower)
        for tower in ("query_encoder", "document_encoder", "both")
    ),
    Case("mcl", "pq-codeword", chunk=2, checkpointed=True),
]
"""With W processes a round has 12 / W queries each, so that the last chunk of four processes is smaller."""


def worker(rank: int, processes: int, folder: Path, seed: int) -> None:
    """Write the steps of all cases and, with two processes, train."""
    torch.set_num_threads(1)
    training.chunked.SCORES_AT_ONCE = BLOCK
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=200),
    )
    results: dict[str, Tensor] = {}
    for case in TOGETHER:
        found = step(case, seed)
        for name, value in found.items():
            dist.all_reduce(largest := value.clone(), dist.ReduceOp.MAX)
            assert torch.equal(largest, value), f"{case}: processes differ in {name}"
        results |= {f"{case}/{name}": value for name, value in found.items()}
    if rank == 0:
        np.savez(folder / "results.npz", **{name: v.numpy() for name, v in results.items()})
    if processes == 2:
        RunLog.close = lambda _: None  # type: ignore[method-assign]  # would end the process group
        for name in TWO:
            train(name, folder)
    dist.barrier()
    dist.destroy_process_group()


def start_workers(processes: int, folder: Path, seed: int) -> None:
    """Fork the processes of a group, which saves each the imports; end all when one fails."""
    children: set[int] = set()
    for rank in range(processes):
        if child := os.fork():
            children.add(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        worker(rank, processes, folder, seed)
        os._exit(0)
    while children:
        child, status = os.wait()
        children.discard(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def run_workers(processes: int, folder: Path, seed: int) -> str:
    """Run a group of processes; return what they say if one fails."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "localhost",  # accelerate looks for it; the store is a file
    }
    command = [sys.executable, __file__, str(processes), str(folder), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    return done.stderr if done.returncode else ""


@pytest.fixture(scope="module")
def workers(
    seed: int, tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """The folder of so many workers, who work once."""

    @functools.cache
    def work(processes: int) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("workers")
        (folder / "model").symlink_to(tiny_model)
        (folder / "data").symlink_to(tiny_data)
        return folder, run_workers(processes, folder, seed)

    def folder_of(processes: int) -> Path:
        folder, errors = work(processes)
        assert not errors, errors
        return folder

    return folder_of


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_processes_together_have_the_gradients_of_one_without_chunks(
    workers: Callable[[int], Path], seed: int, case: Case, processes: int
) -> None:
    prefix = f"{case}/"
    with np.load(workers(processes) / "results.npz") as stored:
        found = {n.removeprefix(prefix): torch.from_numpy(stored[n]) for n in stored if n.startswith(prefix)}
    assert worst(found, whole(case, seed))[0] < TOLERANCE


# --- loss trajectories ---

ONE: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"chunk_size": 3},
    "accumulated": {"accumulation": 2},
    "accumulated-chunks": {"accumulation": 2, "chunk_size": 3},
}
TWO: dict[str, dict[str, Any]] = {
    "two": {},
    "two-chunks": {"chunk_size": 3},
    "two-accumulated": {"accumulation": 2},
    "two-apart": {"cross_device": "in_batch"},
    "two-apart-chunks": {"cross_device": "in_batch", "chunk_size": 3},
}
CLASSES = [  # the first of each is what the others equal: negatives are those of 16 queries, or of 8
    ("whole", "chunks", "two", "two-chunks"),
    ("accumulated", "accumulated-chunks", "two-accumulated", "two-apart", "two-apart-chunks"),
]


def train(name: str, folder: Path) -> None:
    """Train 56 pairs in batches of 16: the 8 that are left over in every epoch are others each time."""
    experiment = Experiment(
        output=str(folder / name),
        model=DualEncoderConfig(
            encoder=str(folder / "model"), query_max_length=16, document_max_length=32, tie=False
        ),
        head=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, rotation="none", distortion_weight=0.1),
        loss=MCLConfig(),
        data=DataConfig(source=str(folder / "data"), negatives_per_query=1),
        optimization=OptimizationConfig(
            steps=8, batch_size=16, dense_warmup=0.25, lr=1e-3, dropout=False, **(ONE | TWO)[name]
        ),
        evaluation=EvaluationConfig(queries=4, documents=20),
        tracking=TrackingConfig(every=1),
    )
    Trainer(experiment, progress=False).fit()


@pytest.fixture(scope="module")
def trajectories(workers: Callable[[int], Path]) -> dict[str, np.ndarray]:
    """The losses of every run."""
    folder = workers(2)
    for name in ONE:
        train(name, folder)
    rows = {name: (folder / name / "metrics.jsonl").read_text().splitlines() for name in ONE | TWO}
    return {
        name: np.array([json.loads(row)["train/loss"] for row in found if "train/loss" in row])
        for name, found in rows.items()
    }


@pytest.mark.parametrize(
    ("first", "other"), [(names[0], name) for names in CLASSES for name in names[1:]], ids=lambda n: n
)
def test_equal_configurations_have_one_loss_trajectory(
    trajectories: dict[str, np.ndarray], first: str, other: str
) -> None:
    residual = trajectories[other] / trajectories[first] - 1
    assert len(residual) == 8
    assert np.abs(residual).max() < 1e-4
    assert abs(residual.mean()) < 2e-5  # errors to one side would add up


def test_accumulation_has_other_negatives_and_another_trajectory(trajectories: dict[str, np.ndarray]) -> None:
    assert np.abs(trajectories["accumulated"] / trajectories["whole"] - 1).min() > 1e-2


if __name__ == "__main__":
    start_workers(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

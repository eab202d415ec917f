"""On a machine with an NVIDIA card: training, encoding and resuming do what they do on the CPU.

Towers and heads run in float32 without TF32, so that a run on the card follows the CPU's to rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

import training.trainer
from index import IndexConfig, Searcher, export_index
from retriever import (
    Document,
    DualEncoder,
    DualEncoderConfig,
    embed_documents,
    embed_queries,
    read_corpus,
    read_data,
)
from retriever.heads import (
    CNTConfig,
    HeadConfig,
    IVFProductQuantizerConfig,
    IVFResidualQuantizerConfig,
    NoCompressionConfig,
    PCAConfig,
    ProductQuantizerConfig,
    ProjectionConfig,
    QINCo2Config,
    QINCoConfig,
    ResidualQuantizerConfig,
    UNQConfig,
)
from training import Experiment, Trainer, TrainingReport
from training.experiment import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LiveNegativesConfig,
    OptimizationConfig,
    TrackingConfig,
)
from training.losses import (
    ContrastiveConfig,
    DistillationConfig,
    HingeConfig,
    INRPConfig,
    LambdaRankConfig,
    LossConfig,
    MCLConfig,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
    # at its first use of cuBLAS in a thread of backward PyTorch says that it takes the primary context
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

SIZE: dict[str, Any] = {"num_codebooks": 4, "codebook_bits": 4}
HEADS: dict[str, HeadConfig] = {
    "none": NoCompressionConfig(),
    "pq": ProductQuantizerConfig(**SIZE),
    "pq-softmax": ProductQuantizerConfig(estimator="softmax", **SIZE),
    "pq-sinkhorn": ProductQuantizerConfig(balance="sinkhorn", **SIZE),
    "ivfpq": IVFProductQuantizerConfig(num_lists=5, **SIZE),
    "rq": ResidualQuantizerConfig(**SIZE),
    "ivfrq": IVFResidualQuantizerConfig(num_lists=5, **SIZE),
    "pca": PCAConfig(components=16, inner=IVFProductQuantizerConfig(num_lists=5, **SIZE)),
    "projection": ProjectionConfig(components=16, inner=IVFProductQuantizerConfig(num_lists=5, **SIZE)),
    "cnt": CNTConfig(expansion=2, tokens=2, inner=ProductQuantizerConfig(**SIZE)),
    "qinco": QINCoConfig(**SIZE, hidden=8, num_blocks=1),
    "qinco2": QINCo2Config(**SIZE, hidden=8, num_blocks=1, candidates=4, beam=2),
    "unq": UNQConfig(**SIZE, code_dim=8, hidden=16, start_steps=20),
}
LOSSES: dict[str, LossConfig] = {
    "distillation": DistillationConfig(label_weight=1.0),
    "hinge": HingeConfig(),
    "lambda_rank": LambdaRankConfig(),
}
STEPS = 6


def make_experiment(model: Path, source: Path, output: Path, /, **parts: Any) -> Experiment:
    """A run of a few steps; `parts` are fields of `Experiment`, or of one of its groups as a dict."""
    groups: dict[str, Any] = {
        "model": DualEncoderConfig(encoder=str(model), query_max_length=16, document_max_length=32),
        "head": HEADS["pq"],
        "loss": MCLConfig(),
        "data": DataConfig(source=str(source)),
        "live_negatives": LiveNegativesConfig(),
        "optimization": OptimizationConfig(
            steps=STEPS, batch_size=16, lr=1e-3, head_lr=1e-3, dropout=False, dense_warmup=0.0
        ),
        "evaluation": EvaluationConfig(),
        "checkpoint": CheckpointConfig(every=0),
        "tracking": TrackingConfig(every=1),
    }
    for name, value in parts.items():
        groups[name] = replace(groups[name], **value) if isinstance(value, dict) else value
    return Experiment(output=str(output), **groups)


def train(experiment: Experiment, *, resume: bool = False, **options: Any) -> TrainingReport:
    report = Trainer(experiment, progress=False, **options).fit(resume=resume)
    AcceleratorState._reset_state(reset_partial_state=True)
    return report


def losses(folder: str) -> Tensor:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["train/loss"] for row in rows if "train/loss" in row])


def weights(report: TrainingReport) -> dict[str, Tensor]:
    return {name: value.float() for name, value in DualEncoder.load(report.last).state_dict().items()}


def assert_near(found: TrainingReport, expected: TrainingReport, tolerance: float) -> None:
    """Assert that floating point weights are equal to a tolerance."""
    other = weights(expected)
    for name, value in weights(found).items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "name", [name for name in (*HEADS, *LOSSES) if name != "unq"]
)  # UNQ draws its noise where it trains
def test_a_run_follows_the_cpus(
    name: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both start from the same vectors: k-means may take another way where they differ in the last bit."""
    documents = list(read_corpus(str(tiny_data)))
    towers: DualEncoder = DualEncoderConfig(encoder=str(tiny_model), document_max_length=32).build(
        HEADS["none"]
    )
    vectors = dict(zip((d.id for d in documents), embed_documents(towers, documents), strict=True))

    def start_vectors(wanted: Sequence[Document]) -> Tensor:
        return torch.stack([vectors[document.id] for document in wanted])

    parts: dict[str, Any] = {"head": HEADS.get(name, HEADS["pq"]), "loss": LOSSES.get(name, MCLConfig())}
    if name == "none":
        parts["loss"] = ContrastiveConfig()
    if name == "cnt":
        parts["loss"] = INRPConfig(task=MCLConfig())
    on_card = make_experiment(tiny_model, tiny_data, tmp_path / "card", **parts)
    train(on_card, start_vectors=start_vectors)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    on_cpu = make_experiment(tiny_model, tiny_data, tmp_path / "cpu", **parts)
    train(on_cpu, start_vectors=start_vectors)
    found, expected = losses(on_card.output), losses(on_cpu.output)
    assert len(found) == STEPS
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found, expected, rtol=5e-2, atol=5e-3
    )  # a code may fall the other way, and stay so


@pytest.mark.parametrize("by", ["compressed", "dense"])
def test_live_negatives_are_searched_on_the_card(
    by: Any, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    frozen = by == "dense"
    report = train(
        make_experiment(
            tiny_model,
            tiny_data,
            tmp_path / "run",
            model={"tie": not frozen},
            optimization={"freeze": "documents" if frozen else "none"},
            live_negatives=LiveNegativesConfig(per_query=3, depth=5, by=by, refresh=2),
        )
    )
    assert report.steps == STEPS


@pytest.mark.parametrize("head", ["pq", "ivfpq", "rq"])
def test_chunks_give_the_weights_of_whole_batches(
    head: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    whole = train(make_experiment(tiny_model, tiny_data, tmp_path / "whole", head=HEADS[head]))
    chunked = train(
        make_experiment(
            tiny_model, tiny_data, tmp_path / "chunks", head=HEADS[head], optimization={"chunk_size": 4}
        )
    )
    assert_near(chunked, whole, 2e-3)  # AdamW's first steps are the gradient's sign


def test_chunks_with_dropout_repeat_the_cards_random_numbers(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Else the second pass would refuse: it compares the towers' outputs of both."""
    report = train(
        make_experiment(
            tiny_model, tiny_data, tmp_path / "run", optimization={"chunk_size": 4, "dropout": True}
        )
    )
    assert report.steps == STEPS


@pytest.mark.parametrize("dropout", [False, True])
def test_a_run_that_broke_off_continues_with_the_same_numbers(
    dropout: bool, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"optimization": {"dropout": dropout}, "checkpoint": CheckpointConfig(every=2)}
    whole = train(make_experiment(tiny_model, tiny_data, tmp_path / "whole", **parts))
    broken = make_experiment(tiny_model, tiny_data, tmp_path / "broken", **parts)
    log = training.trainer.RunLog.log

    def log_or_fail(self: Any, step: int, values: Any) -> None:
        log(self, step, values)
        if step == 5:
            raise RuntimeError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr(training.trainer.RunLog, "log", log_or_fail)
        with pytest.raises(RuntimeError, match="the power failed"):
            train(broken)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_near(train(broken, resume=True), whole, 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_exports_and_searches(
    precision: Any, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        head=HEADS["ivfpq"],
        optimization={"precision": precision, "steps": 30},
    )
    report = train(experiment)
    found = losses(experiment.output)
    assert found.isfinite().all()
    assert found[-5:].mean() < found[:5].mean()
    documents = list(read_corpus(str(tiny_data)))
    export_index(report.last, documents, tmp_path / "index", config=IndexConfig(), progress=False)
    searcher = Searcher(tmp_path / "index")
    queries = list(read_data(tiny_data, "test").queries.values())[:4]
    scores, ids = searcher.search(queries, k=5)
    assert scores.shape == (4, 5)
    assert all(len(row) == 5 for row in ids)


@pytest.mark.parametrize("head", [name for name in HEADS if name != "none"])
def test_the_card_gives_documents_the_cpus_codes(
    head: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    report = train(make_experiment(tiny_model, tiny_data, tmp_path / "run", head=HEADS[head]))
    model = DualEncoder.load(report.last)
    documents = list(read_corpus(str(tiny_data)))
    vectors = embed_documents(model, documents)
    codes = model.head.encode(vectors)
    queries = embed_queries(model, ["w1 w2", "w3 w4"])
    on_card = model.to("cuda")
    torch.testing.assert_close(embed_documents(on_card, documents).cpu(), vectors, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        embed_queries(on_card, ["w1 w2", "w3 w4"]).cpu(), queries, rtol=1e-5, atol=1e-5
    )
    found = on_card.head.encode(vectors.to("cuda")).cpu()
    assert (found == codes).float().mean() >= 0.98
    torch.testing.assert_close(
        on_card.head.decode(codes.to("cuda")).cpu(), model.cpu().head.decode(codes), rtol=1e-5, atol=1e-5
    )


def test_a_step_leaves_the_card_when_the_run_is_over(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Two runs in one process hold no more memory than one: nothing of the first is kept."""
    held = []
    for turn in range(3):
        train(make_experiment(tiny_model, tiny_data, tmp_path / f"run-{turn}"))
        shutil.rmtree(tmp_path / f"run-{turn}")
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1] * 1.05

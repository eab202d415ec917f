"""Published methods as experiments on tiny data: what each one trains, freezes, adds to a batch, and exports.

Shapes: B queries a step, n documents.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from faiss.contrib.inspect_tools import get_invlist
from torch import Tensor

from index import IndexConfig, Searcher, export_index
from index.builders import inverted_file
from retriever import (
    DualEncoder,
    DualEncoderConfig,
    embed_documents,
    embed_queries,
    read_corpus,
    read_data,
)
from retriever.heads import (
    HeadConfig,
    IVFProductQuantizerConfig,
    IVFResidualQuantizerConfig,
    ProductQuantizerConfig,
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
    DistillationConfig,
    HingeConfig,
    LambdaRankConfig,
    MCLConfig,
    ScoredBatch,
)
from training.run import TrainingRun
from training.scoring import score_batch

B, DOCUMENTS = 16, 80
SIZE: dict[str, Any] = {"num_codebooks": 4, "codebook_bits": 4}
PQ = ProductQuantizerConfig(**SIZE)
IVFPQ = IVFProductQuantizerConfig(**SIZE, num_lists=5)
APART = {"tie": False}
STARTED = {"dense_warmup": 0.0}


def make_experiment(model: Path, source: Path, output: Path, /, **parts: Any) -> Experiment:
    """A run of 6 steps; `parts` are fields of `Experiment`, or of one of its groups as a dict."""
    groups: dict[str, Any] = {
        "model": DualEncoderConfig(encoder=str(model), query_max_length=16, document_max_length=32),
        "head": PQ,
        "loss": MCLConfig(),
        "data": DataConfig(source=str(source)),
        "live_negatives": LiveNegativesConfig(),
        "optimization": OptimizationConfig(steps=6, batch_size=B, lr=1e-3, head_lr=1e-2),
        "evaluation": EvaluationConfig(),
        "checkpoint": CheckpointConfig(every=0),
        "tracking": TrackingConfig(every=1),
    }
    for name, value in parts.items():
        groups[name] = replace(groups[name], **value) if isinstance(value, dict) else value
    return Experiment(output=str(output), **groups)


def train(experiment: Experiment) -> TrainingReport:
    return Trainer(experiment, progress=False).fit()


def towers(model: DualEncoder) -> dict[str, list[Tensor]]:
    return {
        "query": list(model.query_encoder.state_dict().values()),
        "document": list(model.document_encoder.state_dict().values()),
    }


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def series(folder: Path, name: str) -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in found if name in row]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ScoredBatch]]:
    """Every batch that a trainer scores, as tokens and as scores."""
    seen: list[tuple[Any, ScoredBatch]] = []

    def record(vectors: Any, batch: Any, **options: Any) -> ScoredBatch:
        scored = score_batch(vectors, batch, **options)
        seen.append((batch, scored))
        return scored

    monkeypatch.setattr("training.rounds.score_batch", record)
    return seen


# --- methods from end to end ---

METHODS: dict[str, dict[str, Any]] = {
    "poeem": {
        "head": replace(IVFPQ, estimator="identity", rotation="givens_greedy", distortion_weight=1.0),
        "loss": HingeConfig(),
    },
    "mopq": {"head": replace(PQ, estimator="softmax", start="uniform", rotation="none"), "loss": MCLConfig()},
    "distill-vq": {
        "model": APART,
        "head": replace(IVFPQ, estimator="softmax", list_assignment="frozen"),
        "loss": DistillationConfig(),
        "data": {"labels": "teacher"},
        "live_negatives": LiveNegativesConfig(per_query=3, depth=10, by="dense"),
        "optimization": {"freeze": "documents", **STARTED},
    },
    "jpq": {
        "model": APART,
        "head": replace(PQ, assignment="frozen"),
        "loss": LambdaRankConfig(depth=20),
        "live_negatives": LiveNegativesConfig(per_query=3, depth=3, refresh=2),
        "optimization": {"freeze": "documents", **STARTED},
    },
    "repconc": {
        "head": replace(PQ, balance="sinkhorn", sinkhorn_epsilon=0.01),
        "live_negatives": LiveNegativesConfig(per_query=1, depth=20, refresh=3),
    },
    "rq": {"head": ResidualQuantizerConfig(**SIZE, distortion_weight=1.0, distortion_steps="all")},
    "qinco": {"head": QINCoConfig(**SIZE, hidden=16, task_gradient=True)},
    "qinco in lists": {"head": QINCoConfig(**SIZE, hidden=16, num_lists=5)},
    "qinco2": {"head": QINCo2Config(**SIZE, hidden=16, width=12, candidates=4, beam=2, eval_beam=4)},
    "ivfrq": {"head": IVFResidualQuantizerConfig(**SIZE, num_lists=5, estimator="softmax")},
    "gno-imi": {"head": replace(IVFPQ, num_lists=16, list_structure="gno_imi", distortion_weight=1.0)},
    "unq": {"head": UNQConfig(**SIZE, hidden=32, code_dim=8, start_steps=20, start_batch=32)},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_exports_and_answers(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, method: str
) -> None:
    report = train(make_experiment(tiny_model, tiny_data, tmp_path / "run", **METHODS[method]))
    documents = list(read_corpus(tiny_data))
    export_index(
        report.last, documents, tmp_path / "index", config=IndexConfig(), device="cpu", progress=False
    )  # proves that FAISS's scores are the model's
    scores, ids = Searcher(tmp_path / "index").search(["w1 w2 w3"], k=5)
    assert len(ids[0]) == 5
    assert np.isfinite(scores).all()
    assert np.isfinite(series(tmp_path / "run", "train/loss")).all()


@pytest.mark.parametrize(
    "head",
    [
        QINCoConfig(**SIZE, hidden=16, task_gradient=True),
        QINCo2Config(**SIZE, hidden=16, width=12, candidates=4, beam=2, num_lists=5),
    ],
    ids=lambda head: head.name,
)
def test_every_network_of_a_neural_head_learns_beside_the_towers(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, head: HeadConfig
) -> None:
    report = train(make_experiment(tiny_model, tiny_data, tmp_path / "run", head=head))
    networks = DualEncoder.load(report.last).head.networks
    # both start at zero; 6 steps, of which the head has 4
    assert all(block.down.weight.abs().max() > 0 for network in networks for block in network.blocks)
    assert all(network.concat.weight.abs().max() > 0 for network in networks)
    assert np.isfinite(series(tmp_path / "run", "train/loss_head_distortion")).all()


@pytest.mark.parametrize("rotation", ["givens_greedy", "givens_random", "givens_steepest", "cayley"])
def test_training_turns_a_learned_rotation_and_keeps_it_orthonormal(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotation: str
) -> None:
    starts: list[Tensor] = []
    warm_start = TrainingRun.warm_start
    monkeypatch.setattr(
        TrainingRun,
        "warm_start",
        lambda self: (warm_start(self), starts.append(self.model.head.rotation.detach().clone())),
    )
    head = replace(PQ, rotation=rotation, distortion_weight=1.0, estimator="identity", rotation_lr=1.0)
    experiment = make_experiment(tiny_model, tiny_data, tmp_path / "run", head=head)
    end = DualEncoder.load(train(experiment).last).head.rotation.detach()
    assert (end - starts[0]).abs().max() > 1e-3
    torch.testing.assert_close(end @ end.T, torch.eye(32), rtol=0, atol=1e-4)


# --- what is frozen ---


def test_frozen_documents_keep_their_tower_to_the_bit_and_train_the_query_tower(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    experiment = make_experiment(
        tiny_model, tiny_data, tmp_path / "run", model=APART, optimization={"freeze": "documents"}
    )
    start = towers(experiment.model.build(experiment.head))
    end = towers(DualEncoder.load(train(experiment).last))
    assert equal(end["document"], start["document"])
    assert not equal(end["query"], start["query"])


@pytest.mark.parametrize("tie", [True, False])
def test_frozen_towers_leave_only_the_head_to_train(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, tie: bool
) -> None:
    frozen = {"freeze": "both", **STARTED}
    experiment = make_experiment(
        tiny_model, tiny_data, tmp_path / "run", model={"tie": tie}, optimization=frozen
    )
    start = towers(experiment.model.build(experiment.head))
    Trainer(experiment, progress=False).fit()
    model = DualEncoder.load(tmp_path / "run" / "last")
    end = towers(model)
    assert equal(end["query"], start["query"])
    assert equal(end["document"], start["document"])
    assert len(series(tmp_path / "run", "train/grad_norm_head")) == 6
    assert series(tmp_path / "run", "train/grad_norm_towers") == []


def test_a_run_with_frozen_documents_has_the_first_loss_of_one_that_encodes_them(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Known vectors are those that the tower would give for the batch's documents."""
    losses = []
    for freeze in ("none", "documents"):
        options = {"freeze": freeze, "dropout": False, **STARTED}
        output = tmp_path / freeze
        train(make_experiment(tiny_model, tiny_data, output, model=APART, optimization=options))
        losses.append(series(output, "train/loss")[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def codes_at_start(monkeypatch: pytest.MonkeyPatch, source: Path) -> list[np.ndarray]:
    """Return a list that the warm start of a trainer fills with the packed codes of the corpus."""
    found: list[np.ndarray] = []
    warm_start, documents = TrainingRun.warm_start, list(read_corpus(source))

    def record(self: TrainingRun) -> None:
        warm_start(self)
        head = self.model.head
        found.append(head.pack(head.encode(embed_documents(self.model, documents))))

    monkeypatch.setattr(TrainingRun, "warm_start", record)
    return found


def exported(report: TrainingReport, source: Path, folder: Path) -> Any:
    documents = list(read_corpus(source))
    export_index(report.last, documents, folder, config=IndexConfig(), device="cpu", progress=False)
    return faiss.read_index(str(folder / "index"))


@pytest.mark.parametrize(
    ("assignment", "kept"), [("frozen", True), ("frozen_in_training", False), ("live", False)]
)
def test_codes_of_the_start_are_those_of_the_export_only_if_frozen(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assignment: str,
    kept: bool,
) -> None:
    """JPQ: codewords train, codes do not."""
    before = codes_at_start(monkeypatch, tiny_data)
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        model=APART,
        head=replace(PQ, assignment=assignment),
        optimization={"freeze": "documents", "head_lr": 0.1, **STARTED},
    )
    index = exported(train(experiment), tiny_data, tmp_path / "index")
    inner = faiss.downcast_index(index.index)
    codes = faiss.vector_to_array(inner.codes).reshape(DOCUMENTS, -1)
    assert np.array_equal(codes, before[0]) == kept


@pytest.mark.parametrize(
    ("assignment", "kept"), [("frozen", True), ("frozen_in_training", False), ("live", False)]
)
def test_lists_of_the_start_are_those_of_the_export_only_if_frozen(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assignment: str,
    kept: bool,
) -> None:
    """Distill-VQ: centroids train, lists do not."""
    before = codes_at_start(monkeypatch, tiny_data)
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        model=APART,
        head=replace(IVFPQ, list_assignment=assignment),
        optimization={"freeze": "documents", "head_lr": 0.3, **STARTED},
    )
    index = exported(train(experiment), tiny_data, tmp_path / "index")
    lists = np.empty(DOCUMENTS, dtype=np.int64)
    for number in range(5):
        lists[get_invlist(inverted_file(index).invlists, number)[0]] = number
    assert np.array_equal(lists, before[0][:, 0]) == kept


# --- what is in a batch ---


def test_live_negatives_by_codes_come_with_the_heads_start(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, batches: list[tuple[Any, ScoredBatch]]
) -> None:
    live = LiveNegativesConfig(per_query=3, depth=10)
    experiment = make_experiment(
        tiny_model, tiny_data, tmp_path / "run", live_negatives=live, optimization={"dense_warmup": 0.5}
    )
    train(experiment)
    assert [scored.dense.shape for _, scored in batches] == [(B, B)] * 3 + [(B, 4 * B)] * 3


def test_live_negatives_by_vectors_come_from_the_first_step(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, batches: list[tuple[Any, ScoredBatch]]
) -> None:
    live = LiveNegativesConfig(per_query=2, depth=10, by="dense")
    options = {"freeze": "documents", "dense_warmup": 0.5}
    experiment = make_experiment(
        tiny_model, tiny_data, tmp_path / "run", model=APART, live_negatives=live, optimization=options
    )
    train(experiment)
    assert [scored.dense.shape for _, scored in batches] == [(B, 3 * B)] * 6


def test_live_negatives_are_the_best_documents_that_are_not_relevant(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, batches: list[tuple[Any, ScoredBatch]]
) -> None:
    """In the first step the towers are those of the start."""
    live = LiveNegativesConfig(per_query=2, depth=2, by="dense")
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        model=APART,
        live_negatives=live,
        optimization={"freeze": "documents", "dropout": False, "steps": 1, **STARTED},
    )
    trainer = Trainer(experiment, progress=False)
    trainer.fit()
    model, data = experiment.model.build(experiment.head).eval(), read_data(tiny_data, "train")
    vectors = embed_documents(model, list(data.documents.values())).double()
    batch = batches[0][0]
    keys = trainer.run.corpus.rows(batch.document_keys)
    relevant = trainer.run.corpus.rows(batch.relevant_keys[:, 0])
    names = {row: name for name, found in data.qrels.items() for row in [list(data.documents).index(*found)]}
    for query, row in enumerate(relevant.tolist()):
        q = embed_queries(model, [data.queries[names[row]]]).double()
        order = torch.cdist(q, vectors)[0].argsort().tolist()
        expected = [document for document in order if document != row][:2]
        assert keys[B + 2 * query : B + 2 * query + 2].tolist() == expected


def test_live_negatives_change_the_loss(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    losses = []
    for count in (0, 3):
        live = LiveNegativesConfig(per_query=count, depth=5)
        options = {"dropout": False, **STARTED}
        output = tmp_path / str(count)
        train(make_experiment(tiny_model, tiny_data, output, live_negatives=live, optimization=options))
        losses.append(series(output, "train/loss_compressed")[0])
    assert losses[1] > losses[0] + 0.1


@pytest.fixture
def other_judgements(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny data with wrong judgements in the training split."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    lines = "".join(f"q{row}\td{(row * 7 + 3) % 80}\t1\n" for row in range(56))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


@pytest.mark.parametrize(("labels", "read"), [("teacher", False), ("judged", True)])
def test_judgements_are_read_only_if_they_are_the_labels(
    tiny_model: Path, tiny_data: Path, other_judgements: Path, tmp_path: Path, labels: str, read: bool
) -> None:
    found = []
    for number, source in enumerate((tiny_data, other_judgements)):
        output = tmp_path / f"run{number}"
        data = {"labels": labels, "evaluation_source": str(tiny_data)}
        experiment = make_experiment(tiny_model, source, output, data=data)
        found.append(weights(train(experiment).last))
    assert (found[0] != found[1]) == read


def test_labels_of_the_teacher_are_the_documents_that_the_towers_rank_first(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    experiment = make_experiment(
        tiny_model, tiny_data, tmp_path / "run", data={"labels": "teacher"}, optimization={"steps": 1}
    )
    trainer = Trainer(experiment, progress=False)
    trainer.fit()
    model, data = experiment.model.build(experiment.head).eval(), read_data(tiny_data, "train")
    x = embed_documents(model, list(data.documents.values())).double()
    q = embed_queries(model, [data.queries[name] for name in data.qrels]).double()
    best = torch.cdist(q, x).argmin(1)
    ids = list(data.documents)
    assert trainer.run.data.qrels == {
        name: {ids[row]: 1} for name, row in zip(data.qrels, best.tolist(), strict=True)
    }


@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_a_frozen_teacher_is_the_towers_at_the_heads_start(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    starts: list[dict[str, list[Tensor]]] = []
    warm_start = TrainingRun.warm_start

    def record(self: TrainingRun) -> None:
        warm_start(self)
        starts.append({side: [v.clone() for v in values] for side, values in towers(self.model).items()})

    monkeypatch.setattr(TrainingRun, "warm_start", record)
    loss = DistillationConfig(teacher=kind, label_weight=1.0)
    trainer = Trainer(
        make_experiment(
            tiny_model, tiny_data, tmp_path / "run", loss=loss, optimization={"dense_warmup": 0.5}
        ),
        progress=False,
    )
    trainer.fit()
    if kind == "live":
        assert trainer.run.candidates.teacher is None
        return
    teacher = towers(trainer.run.candidates.teacher)
    assert all(equal(teacher[side], starts[0][side]) for side in teacher)
    assert not equal(teacher["query"], towers(trainer.run.model)["query"])


# --- resuming ---

RESUMED: dict[str, dict[str, Any]] = {
    "towers train": {
        "head": replace(IVFPQ, rotation="givens_greedy", distortion_weight=1.0, restart_window=5.0),
        "loss": DistillationConfig(dense_weight=0.5, label_weight=1.0),
        "live_negatives": LiveNegativesConfig(per_query=2, depth=10, refresh=3),
        "optimization": {"steps": 8, "dense_warmup": 0.2},
    },
    "documents are frozen": {
        "model": APART,
        "head": replace(IVFPQ, assignment="frozen", list_assignment="frozen"),
        "loss": DistillationConfig(objective="kl"),
        "data": {"labels": "teacher"},
        "live_negatives": LiveNegativesConfig(per_query=2, depth=10, refresh=3),
        "optimization": {"steps": 8, "freeze": "documents", **STARTED},
    },
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_run_with_a_frozen_teacher_and_live_negatives_continues_bit_for_bit(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, name: str
) -> None:
    experiment = make_experiment(
        tiny_model, tiny_data, tmp_path / "run", checkpoint={"every": 4, "keep": 9}, **RESUMED[name]
    )
    whole = train(experiment)
    losses, expected = series(tmp_path / "run", "train/loss"), weights(whole.last)
    shutil.move(tmp_path / "run", tmp_path / "whole")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer._step

        def stop(self: Trainer, number: int, rounds: Any) -> dict[str, float]:
            if number == 6:
                raise KeyboardInterrupt
            return step(self, number, rounds)

        patch.setattr(Trainer, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(experiment)
    AcceleratorState._reset_state(reset_partial_state=True)
    report = Trainer(experiment, progress=False).fit(resume=True)
    assert series(tmp_path / "run", "train/loss") == losses
    assert weights(report.last) == expected

"""A run from recipe to model folder, on a tiny model and tiny data."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel

from retriever import (
    DualEncoder,
    DualEncoderConfig,
    InputError,
    embed_documents,
    embed_queries,
    read_data,
)
from retriever.heads import (
    HeadConfig,
    NoCompressionConfig,
    ProductQuantizerConfig,
    Projection,
    ProjectionConfig,
)
from training import (
    Experiment,
    Trainer,
    TrainingReport,
    evaluate_model,
    load_experiment,
)
from training.experiment import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizationConfig,
    TrackingConfig,
)
from training.losses import ContrastiveConfig, MCLConfig
from training.negatives import BatchPlan, PairDataset
from training.optimizer import parameter_groups

ROOT = Path(__file__).parents[2]


def make_experiment(model: Path, source: Path, output: Path, **parts: Any) -> Experiment:
    """A run of 10 steps; `parts` are fields of `Experiment`, or of one of its groups as a dict."""
    groups: dict[str, Any] = {
        "data": DataConfig(source=str(source)),
        "optimization": OptimizationConfig(steps=10, batch_size=16, lr=1e-3),
        "evaluation": EvaluationConfig(),
        "checkpoint": CheckpointConfig(),
        "tracking": TrackingConfig(every=1),
    }
    for name, value in parts.items():
        groups[name] = replace(groups[name], **value) if isinstance(value, dict) else value
    return Experiment(
        **{
            "output": str(output),
            "model": DualEncoderConfig(encoder=str(model), query_max_length=16, document_max_length=32),
            "head": ProductQuantizerConfig(num_codebooks=4, codebook_bits=4),
            "loss": MCLConfig(),
            **groups,
        }
    )


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(folder: Path, name: str) -> list[float]:
    return [row[name] for row in rows(folder) if name in row]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return every file's bytes; None for folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def run(
    tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, TrainingReport]:
    """One run with defaults that several tests look at."""
    experiment = make_experiment(
        tiny_model, tiny_data, tmp_path_factory.mktemp("run") / "run", evaluation={"every": 5}
    )
    return experiment, Trainer(experiment, progress=False).fit()


Run = tuple[Experiment, TrainingReport]


def test_a_run_leaves_metrics_checkpoints_and_two_models(run: Run) -> None:
    names = {path.name for path in Path(run[0].output).iterdir()}
    assert names == {"metrics.jsonl", "starts.jsonl", "checkpoints", "best", "last"}


def test_every_step_has_a_row_of_metrics(run: Run) -> None:
    folder = Path(run[0].output)
    assert [row["step"] for row in rows(folder) if "train/loss" in row] == list(range(1, 11))


def test_the_logged_loss_is_the_sum_of_its_parts(run: Run) -> None:
    for row in rows(Path(run[0].output)):
        if "train/loss" in row:
            parts = sum(value for name, value in row.items() if name.startswith("train/loss_"))
            assert row["train/loss"] == pytest.approx(parts, rel=1e-9)


def test_metrics_are_named_by_the_documented_groups(run: Run) -> None:
    names = {name for row in rows(Path(run[0].output)) for name in row} - {"step"}
    assert {name.partition("/")[0] for name in names} == {"train", "head", "perf", "eval"}


def test_the_report_holds_the_last_evaluation(run: Run) -> None:
    last = [row for row in rows(Path(run[0].output)) if "eval/dense/ndcg@10" in row][-1]
    assert {f"eval/{name}": value for name, value in run[1].metrics.items()} == {
        name: value for name, value in last.items() if name != "step"
    }


@pytest.mark.parametrize("name", ["best", "last"])
def test_the_model_card_has_metadata_that_parses(run: Run, name: str) -> None:
    card = (Path(run[0].output) / name / "README.md").read_text(encoding="utf-8")
    front_matter = re.match(r"---\n(.*?)\n---\n", card, re.S)
    assert front_matter
    assert "endex" in yaml.safe_load(front_matter[1])["tags"]


@pytest.mark.parametrize("name", ["best", "last"])
def test_the_model_folder_holds_the_experiment_that_made_it(run: Run, name: str) -> None:
    assert load_experiment(Path(run[0].output) / name / "experiment.yaml") == run[0]


def test_the_last_model_evaluates_as_reported(run: Run) -> None:
    model = DualEncoder.load(run[1].last)
    data = read_data(run[0].data.source, "dev")
    assert evaluate_model(model, data) == pytest.approx(run[1].metrics, abs=1e-9)


def test_the_best_model_evaluates_as_logged_at_the_best_step(run: Run) -> None:
    name = "compressed/ndcg@10"
    logged = [
        row for row in rows(Path(run[0].output)) if row["step"] == run[1].best_step and f"eval/{name}" in row
    ]
    found = evaluate_model(DualEncoder.load(run[1].best), read_data(run[0].data.source, "dev"))
    assert found[name] == pytest.approx(logged[0][f"eval/{name}"], abs=1e-9)


def test_the_best_model_is_the_best_of_all_evaluations(run: Run) -> None:
    values = {
        row["step"]: row["eval/compressed/ndcg@10"]
        for row in rows(Path(run[0].output))
        if "eval/compressed/ndcg@10" in row
    }
    assert values[run[1].best_step] == max(values.values())


def test_the_trained_towers_differ_from_the_start(run: Run) -> None:
    start = run[0].model.build(run[0].head).query_encoder.backbone.embeddings.word_embeddings.weight
    end = DualEncoder.load(run[1].last).query_encoder.backbone.embeddings.word_embeddings.weight
    assert (start - end).abs().max() > 1e-4


def test_a_second_run_into_the_same_output_is_refused(run: Run) -> None:
    with pytest.raises(InputError, match=r"holds a run already.* add --resume"):
        Trainer(run[0], progress=False).fit()


def test_a_refused_second_run_leaves_the_output_as_it_was(run: Run) -> None:
    folder = Path(run[0].output)
    before = snapshot(folder)
    with pytest.raises(InputError):
        Trainer(replace(run[0], seed=5), progress=False).fit()
    assert snapshot(folder) == before


def test_a_finished_run_is_not_resumed(run: Run) -> None:
    with pytest.raises(InputError, match=r"is a finished run"):
        Trainer(run[0], progress=False).fit(resume=True)


def test_equal_experiments_give_equal_models(
    run: Run, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    again = make_experiment(tiny_model, tiny_data, tmp_path / "run", evaluation={"every": 5})
    report = Trainer(again, progress=False).fit()
    for name in ("encoder/model.safetensors", "head/model.safetensors"):
        assert (report.last / name).read_bytes() == (run[1].last / name).read_bytes()


def test_another_seed_gives_another_model(
    run: Run, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    other = make_experiment(tiny_model, tiny_data, tmp_path / "run", evaluation={"every": 5}, seed=1)
    report = Trainer(other, progress=False).fit()
    name = "encoder/model.safetensors"
    assert (report.last / name).read_bytes() != (run[1].last / name).read_bytes()


@pytest.mark.parametrize("estimator", ["identity", "codeword", "softmax"])
def test_training_lowers_the_loss(tiny_model: Path, tiny_data: Path, tmp_path: Path, estimator: str) -> None:
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        head=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, estimator=estimator),
        optimization={"steps": 40, "lr": 2e-3, "dense_warmup": 0.1},
    )
    Trainer(experiment, progress=False).fit()
    losses = series(tmp_path / "run", "train/loss_compressed")
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[4:9])  # the first four steps are not compressed


def test_a_model_without_compression_trains(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    experiment = make_experiment(
        tiny_model, tiny_data, tmp_path / "run", head=NoCompressionConfig(), loss=ContrastiveConfig()
    )
    report = Trainer(experiment, progress=False).fit()
    assert {name.partition("/")[0] for name in report.metrics} == {"dense"}


HEADS = [ProductQuantizerConfig(num_codebooks=4, codebook_bits=4), NoCompressionConfig()]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_the_best_model_is_that_of_the_best_evaluation(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: HeadConfig
) -> None:
    values = iter([0.1, 0.5, 0.3, 0.4])
    monkeypatch.setattr("training.trainer.evaluate_model", lambda *_, **__: {"dense/ndcg@10": next(values)})
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        head=head,
        loss=ContrastiveConfig(),
        optimization={"steps": 4, "dense_warmup": 0.0},
        evaluation={"every": 1, "metric": "dense/ndcg@10"},
    )
    assert Trainer(experiment, progress=False).fit().best_step == 2


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_patience_stops_a_run_that_does_not_get_better(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, head: Any
) -> None:
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        head=head,
        loss=ContrastiveConfig(),
        optimization={"lr": 1e-12, "head_lr": 1e-12, "dense_warmup": 0.0},
        evaluation={"every": 1, "patience": 2, "metric": "dense/ndcg@10"},
    )
    assert Trainer(experiment, progress=False).fit().steps == 3


def test_a_head_before_its_warm_start_does_not_win(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        optimization={"dense_warmup": 0.5},
        evaluation={"every": 1, "metric": "dense/ndcg@10"},
    )
    assert Trainer(experiment, progress=False).fit().best_step >= 5


def test_only_the_newest_checkpoints_are_kept(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    experiment = make_experiment(tiny_model, tiny_data, tmp_path / "run", checkpoint={"every": 2, "keep": 3})
    Trainer(experiment, progress=False).fit()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008", "step-00000010"]


def test_runs_of_different_precision_follow_each_other_in_one_process(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    for precision in ("fp32", "bf16"):
        experiment = make_experiment(
            tiny_model,
            tiny_data,
            tmp_path / precision,
            optimization={"steps": 2, "precision": precision},
        )
        assert Trainer(experiment, progress=False).fit().steps == 2


@pytest.fixture(scope="module")
def still_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without dropout, so that the loss of a batch can be computed beside the trainer."""
    folder = tmp_path_factory.mktemp("still") / "model"
    shutil.copytree(tiny_model, folder)
    still = AutoModel.from_pretrained(tiny_model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    still.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_with_negatives(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data with three given negatives a query, and a second relevant document for some queries."""
    folder = tmp_path_factory.mktemp("negatives") / "data"
    shutil.copytree(tiny_data, folder)
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.writelines(f"q{row}\td{row + 1}\t1\n" for row in range(0, 40, 2))
    lines = [
        json.dumps({"query-id": f"q{row}", "negatives": [f"d{(row + i) % 80}" for i in (10, 20, 30)]})
        for row in range(80)
    ]
    (folder / "negatives.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(("accumulation", "negatives"), [(1, 0), (2, 0), (1, 2), (4, 2)])
def test_the_first_logged_loss_is_the_formula_on_the_planned_batch(
    still_model: Path, data_with_negatives: Path, tmp_path: Path, accumulation: int, negatives: int
) -> None:
    """-log softmax over the different documents of a round, other relevant ones left out; mean over rounds."""
    experiment = make_experiment(
        still_model,
        data_with_negatives,
        tmp_path / "run",
        head=NoCompressionConfig(),
        loss=ContrastiveConfig(temperature=0.1),
        data={"negatives_per_query": negatives},
        optimization={"steps": 1, "accumulation": accumulation},
    )
    Trainer(experiment, progress=False).fit()
    dataset = PairDataset(read_data(data_with_negatives, "train"), negatives)
    lengths = [dataset.length(row) for row in range(len(dataset))]
    batch = next(BatchPlan(lengths=lengths, batch_size=16, seed=0).steps(0, 1, slice(None)))
    model = experiment.model.build(experiment.head)
    size, losses = 16 // accumulation, []
    for start in range(0, 16, size):
        pairs = [dataset[draw] for draw in batch[start : start + size]]
        documents = [document for pair in pairs for document in (pair.positive, *pair.negatives)]
        q = embed_queries(model, [pair.query for pair in pairs]).double().numpy()
        x = embed_documents(model, documents).double().numpy()
        for number, pair in enumerate(pairs):
            terms = {  # by name: a document that occurs twice counts once
                document.id: np.exp(q[number] @ x[column] / 0.1)
                for column, document in enumerate(documents)
                if document.id == pair.positive.id or document.id not in pair.relevant_ids
            }
            losses.append(-np.log(terms[pair.positive.id] / sum(terms.values())))
    assert series(tmp_path / "run", "train/loss")[0] == pytest.approx(np.mean(losses), rel=1e-5)


def test_no_step_uses_a_gradient_longer_than_the_limit(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Towers and head apart; groups of the optimizer are matrices and vectors of the towers, then the head."""
    norms: list[tuple[float, float]] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *words: Any, **options: Any) -> Any:
        gradients = [[p.grad.norm() for p in g["params"] if p.grad is not None] for g in self.param_groups]
        towers, head = gradients[0] + gradients[1], gradients[2]
        norms.append(tuple(torch.stack(part).norm().item() if part else 0.0 for part in (towers, head)))
        return step(self, *words, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    experiment = make_experiment(
        tiny_model, tiny_data, tmp_path / "run", optimization={"max_grad_norm": 0.01}
    )
    Trainer(experiment, progress=False).fit()
    assert len(norms) == 10
    assert np.max(norms, axis=0) == pytest.approx([0.01, 0.01], rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "fall"),
    [
        ("constant", lambda share: 1.0),
        ("linear", lambda share: 1 - share),
        ("cosine", lambda share: (1 + np.cos(np.pi * share)) / 2),
        ("quarter_cosine", lambda share: np.cos(np.pi * share / 2)),
    ],
)
def test_learning_rates_rise_linearly_and_fall_as_the_schedule_says(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, schedule: str, fall: Callable[[float], float]
) -> None:
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        optimization={"steps": 10, "lr": 0.001, "warmup": 0.4, "schedule": schedule},
    )
    Trainer(experiment, progress=False).fit()
    rates = 1000 * np.array(series(tmp_path / "run", "train/lr"))
    expected = [0.2, 0.4, 0.6, 0.8, *(fall(step / 6) for step in range(6))]
    np.testing.assert_allclose(rates, expected, rtol=1e-9)


def test_weight_decay_pulls_matrices_of_the_towers_only(tiny_model: Path, tiny_data: Path) -> None:
    model = make_experiment(tiny_model, tiny_data, tiny_data).model.build(HEADS[0])
    groups = parameter_groups(model, OptimizationConfig(weight_decay=0.3))
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.3 for p in group["params"]}
    others = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    expected = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("head.")}
    assert decayed == expected
    assert others == {id(p) for p in model.parameters()} - expected


def test_given_negatives_train_with_the_quantizer(
    tiny_model: Path, data_with_negatives: Path, tmp_path: Path
) -> None:
    experiment = make_experiment(
        tiny_model, data_with_negatives, tmp_path / "run", data={"negatives_per_query": 3}
    )
    assert Trainer(experiment, progress=False).fit().steps == 10


def test_accumulation_trains_with_the_quantizer(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    experiment = make_experiment(tiny_model, tiny_data, tmp_path / "run", optimization={"accumulation": 4})
    assert Trainer(experiment, progress=False).fit().steps == 10


def test_separate_towers_are_saved_separately(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    experiment = make_experiment(tiny_model, tiny_data, tmp_path / "run", optimization={"steps": 3})
    experiment = replace(experiment, model=replace(experiment.model, tie=False))
    report = Trainer(experiment, progress=False).fit()
    weights = [
        (report.last / f"{side}_encoder/model.safetensors").read_bytes() for side in ("query", "document")
    ]
    assert weights[0] != weights[1]


TWICE = textwrap.dedent("""
    import sys
    from launch.main import main
    raise SystemExit(sum(main(["train", recipe, "--json"]) for recipe in sys.argv[1:]))
""")


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_on_only_if_asked_for(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, dropout: bool
) -> None:
    """A learning rate of nearly zero: without dropout, two epochs of one batch have one loss."""
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        head=NoCompressionConfig(),
        loss=ContrastiveConfig(),
        data={"max_pairs": 16},
        optimization={"steps": 2, "lr": 1e-12, "dropout": dropout},
    )
    Trainer(experiment, progress=False).fit()
    first, second = series(tmp_path / "run", "train/loss")
    assert (abs(first - second) > 1e-3) == dropout


def test_max_pairs_limits_the_pairs(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """20 pairs are one batch of 16: one epoch is one step."""
    experiment = make_experiment(
        tiny_model, tiny_data, tmp_path / "run", data={"max_pairs": 20}, optimization={"steps": None}
    )
    assert Trainer(experiment, progress=False).fit().steps == 1


@pytest.mark.parametrize("documents", [80, 40])
def test_a_head_that_learns_from_queries_is_given_those_of_the_training_pairs(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, documents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never one of another split; not more than the warm start has documents. Crops are of its documents."""
    seen: list[list[torch.Tensor]] = []

    def record(head: Projection, sample: torch.Tensor, queries: list[torch.Tensor], *rest: Any) -> None:
        seen.append(queries)
        head.warm_start(sample, *rest)

    monkeypatch.setattr(Projection, "warm_start_to_rank", record)
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        head=ProjectionConfig(components=8, inner=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)),
        optimization={"steps": 1, "dense_warmup": 0.0, "warm_start_documents": documents},
    )
    torch.manual_seed(experiment.seed)
    towers = experiment.model.build(experiment.head)
    data = read_data(tiny_data, split="train")
    allowed = embed_queries(towers, [data.queries[name] for name in data.qrels])
    Trainer(experiment, progress=False).fit()
    ((queries, crops),) = seen
    near = torch.cdist(queries.float(), allowed).min(1)
    assert len(queries) == min(documents, 56)
    assert near.values.max() < 1e-3
    assert len(near.indices.unique()) == len(queries)
    texts = [document.text.split() for document in data.documents.values()]
    runs = {" ".join(words[a : a + n]) for words in texts for n in range(4, 13) for a in range(len(words))}
    of_documents = embed_queries(towers, sorted(runs))
    assert len(crops) == 8 * documents
    assert torch.cdist(crops.float(), of_documents).min(1).values.max() < 1e-3


@pytest.mark.parametrize(
    ("below", "labels", "wanted"),
    [
        (57, "judged", True),
        (56, "judged", False),
        (57, "teacher", True),
        (1, "pseudo", True),
        (0, "pseudo", False),
    ],
)
def test_crops_are_made_where_training_queries_are_few(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    below: int,
    labels: str,
    wanted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """56 queries are judged; those made of titles do not count."""
    kinds: list[int] = []

    def record(head: Projection, sample: torch.Tensor, queries: list[torch.Tensor], *rest: Any) -> None:
        kinds.append(len(queries))
        head.warm_start(sample, *rest)

    monkeypatch.setattr(Projection, "warm_start_to_rank", record)
    quantizer = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)
    experiment = make_experiment(
        tiny_model,
        tiny_data,
        tmp_path / "run",
        head=ProjectionConfig(components=8, inner=quantizer, fit_crops_below=below),
        data={"labels": labels},
        optimization={"steps": 1, "dense_warmup": 0.0},
    )
    Trainer(experiment, progress=False).fit()
    assert kinds == [2 if wanted else 1]

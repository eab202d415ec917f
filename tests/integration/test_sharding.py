"""Towers in shards over two processes train as they do whole in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertModel

from retriever import DualEncoderConfig
from retriever.heads import ProductQuantizerConfig
from training import Experiment, Trainer, dump_experiment
from training.experiment import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizationConfig,
    TrackingConfig,
)
from training.losses import MCLConfig

ROOT = Path(__file__).parents[2]
STEPS = 5
PROGRAM = """
import sys
from torch.distributed.tensor import DTensor
import training.trainer
from launch.main import main
saved = training.trainer.Trainer._finish
def check(self):
    kinds = {name: isinstance(p, DTensor) for name, p in self.run.model.named_parameters()}
    assert all(kind == (".backbone." in name) for name, kind in kinds.items()), kinds
    return saved(self)
training.trainer.Trainer._finish = check
sys.exit(main(["train", *sys.argv[1:]]))
"""  # the towers' weights and nothing else are sharded


@pytest.fixture(scope="module")
def towers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model and a smaller one, both without dropout."""
    folder = tmp_path_factory.mktemp("towers")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for name in ("large", "small"):
        shutil.copytree(tiny_model, folder / name)
    AutoModel.from_pretrained(tiny_model, **still).save_pretrained(folder / "large")
    torch.manual_seed(3)
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "type_vocab_size": 1,
    }  # a matrix of one row: an empty shard
    config = BertConfig.from_pretrained(tiny_model, **size, **still)
    BertModel(config).save_pretrained(folder / "small")
    return folder / "small", folder / "large"


def make_experiment(towers: tuple[Path, Path], data: Path, output: Path) -> Experiment:
    small, large = map(str, towers)
    return Experiment(
        output=str(output),
        model=DualEncoderConfig(
            encoder=small,
            document_encoder=large,
            projection=32,
            query_max_length=16,
            document_max_length=32,
            checkpoint_activations=True,
        ),
        head=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, estimator="codeword"),
        loss=MCLConfig(),
        data=DataConfig(source=str(data), negatives_per_query=1),
        optimization=OptimizationConfig(
            steps=STEPS,
            batch_size=32,
            accumulation=2,
            chunk_size=4,
            dense_warmup=0.4,
            lr=1e-3,
            max_grad_norm=0.5,
            warm_start_documents=69,
        ),
        evaluation=EvaluationConfig(every=4, documents=75, queries=11),
        checkpoint=CheckpointConfig(every=3, keep=5),
        tracking=TrackingConfig(every=1),
    )


def train_in_shards(recipe: Path, *words: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--no-python", sys.executable, "-c", PROGRAM, str(recipe), *words],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_CPU": "true",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(
    towers: tuple[Path, Path], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run in this process, one in shards, and the latter killed after step 3 and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    Trainer(make_experiment(towers, tiny_data, folder / "one"), progress=False).fit()
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_experiment(make_experiment(towers, tiny_data, folder / "run")))
    train_in_shards(recipe, "--accelerate_config", "fsdp2")
    shutil.copytree(folder / "run", folder / "whole")
    shutil.rmtree(folder / "run" / "last")
    shutil.rmtree(folder / "run" / "checkpoints" / f"step-{STEPS:08d}")
    train_in_shards(recipe, "--accelerate_config", "fsdp2", "--resume")
    return {"one": folder / "one", "shards": folder / "whole", "resumed": folder / "run"}


def series(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("name", ["train/loss", "train/loss_compressed"])
def test_shards_have_the_losses_of_whole_towers(runs: dict[str, Path], name: str) -> None:
    assert len(series(runs["one"], name)) == STEPS
    assert series(runs["shards"], name) == pytest.approx(series(runs["one"], name), rel=1e-5)


@pytest.mark.parametrize("name", ["train/grad_norm_towers", "train/grad_norm_head"])
def test_shards_have_the_gradient_norms_of_whole_towers(runs: dict[str, Path], name: str) -> None:
    """Clipped: they are above the limit."""
    assert max(series(runs["one"], name)) > 0.5
    assert series(runs["shards"], name) == pytest.approx(series(runs["one"], name), rel=1e-4)


@pytest.mark.parametrize("name", ["eval/dense/ndcg@10", "eval/compressed/ndcg@10"])
def test_shards_evaluate_as_whole_towers(runs: dict[str, Path], name: str) -> None:
    """Also where the processes do not divide the documents."""
    assert series(runs["shards"], name) == pytest.approx(series(runs["one"], name), abs=1e-6)


FILES = [
    "query_encoder/model.safetensors",
    "query_encoder/2_Dense/model.safetensors",
    "document_encoder/model.safetensors",
    "head/model.safetensors",
]


@pytest.mark.parametrize("name", FILES)
def test_shards_are_saved_as_one_model(runs: dict[str, Path], name: str) -> None:
    found, expected = (load_file(runs[run] / "last" / name) for run in ("shards", "one"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_a_resumed_run_in_shards_ends_with_the_same_bytes(runs: dict[str, Path], name: str) -> None:
    found, expected = ((runs[run] / "last" / name).read_bytes() for run in ("resumed", "shards"))
    assert found == expected

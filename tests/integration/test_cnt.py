"""A compression network from training to answers: with float vectors, and with codes behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from index import FaissFit, IndexConfig, Searcher, export_index, merge_indexes
from index.decoded import write_npy
from index.interchange import read_bundle, write_bundle
from launch.main import main
from retriever import (
    DualEncoder,
    DualEncoderConfig,
    embed_documents,
    embed_queries,
    map_queries,
    read_corpus,
    read_data,
)
from retriever.dual_encoder import load_query_map
from retriever.heads import (
    CNTConfig,
    HeadConfig,
    IVFFlatConfig,
    ProductQuantizerConfig,
    QINCoConfig,
    ResidualQuantizerConfig,
)
from training import Experiment, Trainer, dump_experiment, evaluate_model, load_experiment
from training.experiment import (
    CheckpointConfig,
    DataConfig,
    LiveNegativesConfig,
    OptimizationConfig,
    TrackingConfig,
)
from training.losses import INRPConfig, MCLConfig

SIZE: dict[str, Any] = {"expansion": 2, "tokens": 4}  # 32 dimensions to 16
PQ = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, rotation="none")
HEADS = {
    "float": CNTConfig(**SIZE),
    "lists": CNTConfig(**SIZE, inner=IVFFlatConfig(num_lists=5)),
    "codes": CNTConfig(**SIZE, start="sparse", inner=PQ),
}
QUERIES = ["w1 w2 w3", "w4", "w9 w8 w7"]


@pytest.fixture(scope="module")
def models(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders of 6 steps by MCL and INRP; the codes also rank live negatives."""
    folders = {}
    for name, head in HEADS.items():
        output = tmp_path_factory.mktemp("cnt") / name
        experiment = Experiment(
            output=str(output),
            model=DualEncoderConfig(encoder=str(tiny_model), query_max_length=16, document_max_length=32),
            head=head,
            loss=INRPConfig(task=MCLConfig(), inrp_weight=0.1),
            data=DataConfig(source=str(tiny_data)),
            live_negatives=LiveNegativesConfig(per_query=1, depth=10, refresh=2),
            optimization=OptimizationConfig(steps=6, batch_size=16, lr=1e-3, head_lr=1e-2),
            checkpoint=CheckpointConfig(every=0),
            tracking=TrackingConfig(every=1),
        )
        folders[name] = Trainer(experiment, progress=False).fit().last
    return folders


def export(model: Path, data: Path, out: Path, kind: str = "auto") -> Path:
    config = IndexConfig(kind=kind)  # type: ignore[arg-type]
    export_index(model, list(read_corpus(data)), out, config=config, device="cpu", progress=False)
    return out


@pytest.mark.parametrize(
    ("name", "kind"),
    [("codes", "auto"), ("lists", "auto"), ("float", "auto"), ("float", "sq8"), ("float", "hnsw")],
)
def test_an_index_answers_with_the_scores_of_the_model(
    models: dict[str, Path], tiny_data: Path, tmp_path: Path, name: str, kind: str
) -> None:
    searcher = Searcher(export(models[name], tiny_data, tmp_path / "index", kind))
    if name == "lists":
        searcher.probe(5)
    scores, rows = searcher.search_vectors(embed_queries(DualEncoder.load(models[name]), QUERIES).numpy(), 5)
    head = DualEncoder.load(models[name]).head
    x = head.decode(head.encode(document_vectors(models[name], tiny_data)))
    q = head.map_queries(embed_queries(DualEncoder.load(models[name]), QUERIES))
    expected = (1 - torch.cdist(q, x) ** 2 / 2).detach().numpy()
    found = np.take_along_axis(expected, rows, 1)
    np.testing.assert_allclose(scores, found, rtol=0, atol=2e-2 if kind == "sq8" else 1e-4)
    assert (found[:, 0] >= expected.max(1) - (2e-2 if kind == "sq8" else 1e-4)).all()


@pytest.mark.parametrize(
    "inner",
    [
        ResidualQuantizerConfig(num_codebooks=3, codebook_bits=4),
        QINCoConfig(num_codebooks=3, codebook_bits=4, hidden=16),
    ],
    ids=lambda inner: inner.name,
)
def test_every_kind_of_quantizer_goes_behind_the_network(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, inner: HeadConfig
) -> None:
    """Additive codes, and codes that a network decodes."""
    config = CNTConfig(**SIZE, inner=inner)
    model = DualEncoderConfig(encoder=str(tiny_model), document_max_length=32).build(config)
    model.head.warm_start(embed_documents(model, list(read_corpus(tiny_data))), FaissFit(), 0)
    model.save(tmp_path / "model")
    searcher = Searcher(export(tmp_path / "model", tiny_data, tmp_path / "index"))
    assert len(searcher.search(QUERIES, 5)[1][0]) == 5


def document_vectors(model: Path, data: Path) -> torch.Tensor:
    return embed_documents(DualEncoder.load(model), list(read_corpus(data)))


def test_searcher_takes_vectors_of_the_towers_and_searches_fewer_dimensions(
    models: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    searcher = Searcher(export(models["float"], tiny_data, tmp_path / "index"))
    assert (searcher.dim, searcher.faiss_index.d) == (32, 16)


@pytest.mark.parametrize("name", HEADS)
def test_a_merged_index_answers_as_before(
    models: dict[str, Path], tiny_data: Path, tmp_path: Path, name: str
) -> None:
    index = export(models[name], tiny_data, tmp_path / "index", "sq8" if name == "float" else "auto")
    merge_indexes([index], tmp_path / "merged", config=IndexConfig())
    kept = Searcher(tmp_path / "merged").search(QUERIES, 5)
    assert len(kept[1][0]) == 5
    if name != "float":
        np.testing.assert_array_equal(kept[0], Searcher(index).search(QUERIES, 5)[0])


def test_model_is_evaluated_in_the_space_of_the_network(models: dict[str, Path], tiny_data: Path) -> None:
    metrics = evaluate_model(DualEncoder.load(models["float"]), read_data(str(tiny_data), "dev"))
    assert {name.partition("/")[0] for name in metrics} == {"dense", "compressed"}


def test_experiment_with_nested_head_and_loss_survives_yaml(models: dict[str, Path], tmp_path: Path) -> None:
    experiment = load_experiment(models["codes"] / "experiment.yaml")
    assert experiment.head == HEADS["codes"]
    assert experiment.loss == INRPConfig(task=MCLConfig(), inrp_weight=0.1)
    (tmp_path / "again.yaml").write_text(dump_experiment(experiment))
    assert load_experiment(tmp_path / "again.yaml") == experiment


@pytest.mark.parametrize("name", HEADS)
def test_written_vectors_come_with_the_map_of_queries(
    models: dict[str, Path], tiny_data: Path, tmp_path: Path, name: str
) -> None:
    index = export(models[name], tiny_data, tmp_path / "index")
    report = write_npy(index, tmp_path / "vectors")
    assert (report.dim, "pass queries through head/ first" in report.note) == (16, True)
    queries = Searcher(index).embed(QUERIES)
    query_map = load_query_map(tmp_path / "vectors" / "head")
    q = map_queries(query_map, torch.from_numpy(queries)).numpy()
    x = np.load(tmp_path / "vectors" / "vectors.npy")
    scores = 1 - ((q[:, None] - x) ** 2).sum(-1) / 2
    expected, rows = Searcher(index, nprobe=5 if name == "lists" else None).search_vectors(queries, 5)
    np.testing.assert_allclose(np.take_along_axis(scores, rows, 1), expected, rtol=0, atol=1e-4)


def test_bundle_holds_the_map_of_queries(models: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    index = export(models["codes"], tiny_data, tmp_path / "index")
    report = write_bundle(index, tmp_path / "bundle")
    assert "pass queries through head/ first" in report.note
    assert read_bundle(tmp_path / "bundle").decode(0, 3).shape == (3, 16)
    assert load_query_map(tmp_path / "bundle" / "head") is not None


def test_an_estimate_counts_the_dimensions_of_the_index(
    models: dict[str, Path], tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(models["float"]), str(tiny_data), "--out", "unused", "--dry_run", "--json"]
    assert main(words) == 0
    assert f'"code_bytes": {80 * 16 * 4}' in capsys.readouterr().out

"""Trained together, towers and codebooks rank better than codebooks that were not.

Synthetic texts: a document is a set of random words, a query a few of a document's words. Two queries a document:
one trains, the other is ranked. Seconds a run; the claims hold for every seed with a margin.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from index import FaissFit
from retriever import DualEncoder, DualEncoderConfig, RetrievalData, embed_documents, read_data
from retriever.heads import CompressionHead, HeadConfig, NoCompressionConfig, ProductQuantizerConfig
from training import Experiment, Trainer, evaluate_model
from training.experiment import DataConfig, OptimizationConfig
from training.losses import ContrastiveConfig, LossConfig, MCLConfig

SEEDS = (0, 1, 2)
NUM_WORDS, NUM_DOCUMENTS, DIM = 300, 400, 32
SIZE = {"num_codebooks": 4, "codebook_bits": 4}  # 2 bytes a document instead of 128
MOPQ = ProductQuantizerConfig(**SIZE, metric="l2", estimator="softmax", selection_temperature=0.05)
MEASURE = "compressed/ndcg@10"


def write_data(folder: Path, seed: int) -> None:
    """Write a BEIR folder whose splits train and dev have one query of each document."""
    (folder / "qrels").mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    corpus, queries, judgements = [], [], {"train": [], "dev": []}
    for row in range(NUM_DOCUMENTS):
        words = [f"w{i}" for i in torch.randperm(NUM_WORDS, generator=generator)[:12].tolist()]
        corpus.append({"_id": f"d{row}", "title": words[0], "text": " ".join(words[1:])})
        for split, lines in judgements.items():
            chosen = [words[i] for i in torch.randperm(12, generator=generator)[:4].tolist()]
            queries.append({"_id": f"{split}{row}", "text": " ".join(chosen)})
            lines.append(f"{split}{row}\td{row}\t1\n")
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, lines in judgements.items():
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))


def write_model(folder: Path, seed: int) -> None:
    """Write a BERT of one layer with random weights."""
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(NUM_WORDS))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="module", params=SEEDS)
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def folder(seed: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    write_data(folder / "data", seed)
    write_model(folder / "model", seed)
    return folder


@pytest.fixture(scope="module")
def dev(folder: Path) -> RetrievalData:
    return read_data(folder / "data", "dev")


def train(
    folder: Path, name: str, seed: int, head: HeadConfig, loss: LossConfig, steps: int = 200
) -> DualEncoder:
    experiment = Experiment(
        output=str(folder / name),
        model=DualEncoderConfig(encoder=str(folder / "model"), query_max_length=8, document_max_length=16),
        head=head,
        loss=loss,
        data=DataConfig(source=str(folder / "data")),
        optimization=OptimizationConfig(steps=steps, batch_size=64, lr=3e-3),
        seed=seed,
    )
    return DualEncoder.load(Trainer(experiment, progress=False).fit().last)


@pytest.fixture(scope="module")
def joint(folder: Path, seed: int) -> DualEncoder:
    """Towers and codebooks trained together in MoPQ's way."""
    return train(folder, "joint", seed, MOPQ, MCLConfig(temperature=0.1))


@pytest.fixture(scope="module")
def default(folder: Path, seed: int) -> DualEncoder:
    """Towers and codebooks trained together with every default."""
    return train(folder, "default", seed, ProductQuantizerConfig(**SIZE), MCLConfig(), steps=100)


@pytest.fixture(scope="module")
def dense(folder: Path, seed: int) -> DualEncoder:
    """Towers trained for as many steps without compression."""
    return train(folder, "dense", seed, NoCompressionConfig(), ContrastiveConfig())


def with_head(model: DualEncoder, head: CompressionHead) -> DualEncoder:
    return DualEncoder(model.query_encoder, model.document_encoder, head).eval()


def post_hoc(model: DualEncoder, data: RetrievalData, config: ProductQuantizerConfig, seed: int) -> float:
    """Return the quality of the model's vectors behind FAISS's OPQ of them: what one does without Endex."""
    head = config.build(DIM)
    head.warm_start(embed_documents(model, list(data.documents.values())), FaissFit(), seed)
    return evaluate_model(with_head(model, head), data)[MEASURE]


def random_codebooks(model: DualEncoder, data: RetrievalData, seed: int) -> float:
    """Return the quality of the model's vectors behind codewords drawn with the spread of the vectors."""
    vectors = embed_documents(model, list(data.documents.values()))
    head = ProductQuantizerConfig(**SIZE, rotation="none", metric=model.head.metric).build(DIM)
    draws = torch.randn(head.codebooks.shape, generator=torch.Generator().manual_seed(seed))
    head.codebooks.data.copy_(draws * vectors.std())
    return evaluate_model(with_head(model, head), data)[MEASURE]


def test_joint_training_beats_random_codebooks_under_the_same_towers(
    joint: DualEncoder, dev: RetrievalData, seed: int
) -> None:
    assert evaluate_model(joint, dev)[MEASURE] > random_codebooks(joint, dev, seed) + 0.1


def test_joint_training_beats_quantizing_a_dense_model_afterwards(
    joint: DualEncoder, dense: DualEncoder, dev: RetrievalData, seed: int
) -> None:
    afterwards = max(
        post_hoc(dense, dev, ProductQuantizerConfig(**SIZE, metric=metric), seed)
        for metric in ("inner_product", "l2")
    )
    assert evaluate_model(joint, dev)[MEASURE] > afterwards + 0.02


def test_default_training_beats_random_codebooks_under_the_same_towers(
    default: DualEncoder, dev: RetrievalData, seed: int
) -> None:
    assert evaluate_model(default, dev)[MEASURE] > random_codebooks(default, dev, seed) + 0.05

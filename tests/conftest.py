"""Fixtures: a tiny random BERT and a tiny data folder, made on the spot; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import BertConfig, BertModel, BertTokenizerFast

from retriever import DualEncoder, DualEncoderConfig
from retriever.heads import ProductQuantizerConfig

WORDS = [f"w{i}" for i in range(120)]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Waiting OpenMP threads of two libraries slow each other down a hundredfold on a busy machine."""
    torch.set_num_threads(1)
    with suppress(ImportError):  # a machine with a card may have no FAISS
        import faiss

        faiss.omp_set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """A test's run leaves no devices and no precision to the next test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain transformers folder: BERT of 2 layers and 32 dimensions over 120 words."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder: 80 documents of random words, a query of three of a document's words each."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    (folder / "qrels").mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    corpus, queries, pairs = [], [], []
    for row in range(80):
        words = [WORDS[i] for i in torch.randperm(len(WORDS), generator=generator)[:12].tolist()]
        corpus.append({"_id": f"d{row}", "title": words[0], "text": " ".join(words[1:])})
        queries.append({"_id": f"q{row}", "text": " ".join(words[2:5])})
        pairs.append(f"q{row}\td{row}\t1")
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for split, part in (("train", pairs[:56]), ("dev", pairs[56:68]), ("test", pairs[68:])):
        text = "query-id\tcorpus-id\tscore\n" + "\n".join(part) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def tiny_dual_encoder(tiny_model: Path) -> DualEncoder:
    """Tied towers with a product quantizer of 4 codebooks and 4 bits, not warm-started."""
    torch.manual_seed(0)
    config = DualEncoderConfig(encoder=str(tiny_model), query_max_length=16, document_max_length=32)
    return config.build(ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)).eval()

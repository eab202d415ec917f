"""Write the archive of a model and an index folder per head that `test_older_folders` opens ever after.

Run once when the layout of a folder changes, before it does: python tests/folders/make_folders.py DATE.tar.gz
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from index import FaissFit, IndexConfig, Searcher, export_index
from retriever import Document, DualEncoderConfig, embed_documents
from retriever.heads import IVFProductQuantizerConfig, ProductQuantizerConfig

SMALL = {"num_codebooks": 4, "codebook_bits": 4}
HEADS = {"pq": ProductQuantizerConfig(**SMALL), "ivfpq": IVFProductQuantizerConfig(**SMALL, num_lists=4)}
QUERIES = ["w1 w2", "w17", "w29 w3 w5"]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_backbone(folder / "backbone")
        documents = [
            Document(f"d{row}", f"w{row}", f"w{row * 7 % 30} w{row * 11 % 30} w{row * 13 % 30}")
            for row in range(30)
        ]
        for head, config in HEADS.items():
            towers = DualEncoderConfig(
                encoder=str(folder / "backbone"), query_max_length=16, document_max_length=16
            )
            model = towers.build(config).eval()
            model.head.warm_start(embed_documents(model, documents), FaissFit(), 0)
            out = folder / head
            model.save(out / "model")
            options = {"config": IndexConfig(), "device": "cpu", "progress": False}
            export_index(out / "model", documents, out / "index", **options)
            scores, ids = Searcher(out / "index").search(QUERIES, 5)
            hits = {"queries": QUERIES, "scores": scores.round(6).tolist(), "ids": ids}
            (out / "hits.json").write_text(json.dumps(hits, indent=1) + "\n", encoding="utf-8")
        with tarfile.open(sys.argv[1], "x:gz") as archive:
            for head in HEADS:
                archive.add(folder / head, head)


def write_backbone(folder: Path) -> None:
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{row}" for row in range(30))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)


if __name__ == "__main__":
    main()

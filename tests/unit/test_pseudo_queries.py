"""Queries made of titles and first sentences, and a run on a corpus that has no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from retriever import Document, DualEncoderConfig, InputError
from retriever.heads import ProductQuantizerConfig
from retriever.pseudo_queries import crop, pseudo_queries
from training import Experiment, Trainer
from training.data import read_pseudo
from training.experiment import DataConfig, LiveNegativesConfig, OptimizationConfig
from training.losses import DistillationConfig


def made(*documents: tuple[str, str]) -> dict[str, str]:
    """Return document id -> query."""
    data = pseudo_queries({f"d{n}": Document(f"d{n}", *texts) for n, texts in enumerate(documents)})
    assert set(data.qrels) == set(data.queries)
    found = {}
    for name, relevant in data.qrels.items():
        ((document, score),) = relevant.items()
        assert score == 1
        found[document] = data.queries[name]
    return found


def test_a_title_of_its_own_is_the_query() -> None:
    assert made(("On  birds", "They fly."), ("On fish", "They swim.")) == {"d0": "On birds", "d1": "On fish"}


def test_a_shared_or_missing_title_gives_way_to_the_first_sentence() -> None:
    documents = (
        ("ls: list", "Sort by size. Then by name."),
        ("ls: list", "Is it hidden? Show it."),
        ("", "def f(x):\n    return x"),
        ("", "version 1.2 is out"),
    )
    assert list(made(*documents).values()) == [
        "Sort by size.",
        "Is it hidden?",
        "def f(x):",
        "version 1.2 is out",
    ]


def test_the_second_document_of_a_query_and_one_without_text_get_none() -> None:
    documents = (("", "The same. One."), ("", "The same. Two."), ("a", ""), ("", " \n The same."))
    assert made(*documents) == {"d0": "The same.", "d2": "a"}


def test_a_query_has_at_most_32_words() -> None:
    assert made(("", "w " * 50)) == {"d0": " ".join(["w"] * 32)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_crop_is_some_words_of_the_text_that_follow_each_other(seed: int) -> None:
    words = [f"w{n}" for n in range(40)]
    documents = [Document("d", "title", " ".join(words))] * 50
    crops = crop(documents, seed)
    starts, lengths = [], []
    for found in crops:
        start = words.index(found.split()[0])
        starts.append(start)
        lengths.append(len(found.split()))
        assert found.split() == words[start : start + lengths[-1]]
    assert len(crops) == 8 * 50
    assert set(lengths) == set(range(4, 13))
    assert min(starts) == 0
    assert max(start + length for start, length in zip(starts, lengths, strict=True)) == 40
    assert crops == crop(documents, seed)
    assert crops != crop(documents, seed + 1)


@pytest.mark.parametrize(("documents", "expected"), [(3, 12), (7, 14), (11, 11), (50, 16)])
def test_many_documents_give_fewer_crops_each(
    documents: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever.pseudo_queries.CROPS", 16)
    monkeypatch.setattr("retriever.pseudo_queries.CROPS_OF_A_TEXT", 4)
    assert len(crop([Document("d", "", "some words that are a text")] * documents, 0)) == expected


def test_crops_of_a_short_text_of_one_without_spaces_and_of_none() -> None:
    unbroken = "向量檢索把文字變成數字並且在其中尋找最近的鄰居"
    texts = ("two\nwords", unbroken, " ")
    crops = crop([Document(str(n), "title", text) for n, text in enumerate(texts)], 0)
    assert crops[:8] == ["two words"] * 8
    assert len(crops) == 16
    assert all(part in unbroken and 4 <= len(part) <= 12 for part in crops[8:])


def test_a_corpus_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="none of 2 documents"):
        made(("", " "), ("", "\n"))


def test_vectors_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "base.npy", np.ones((4, 8), dtype=np.float32))
    with pytest.raises(InputError, match="makes queries of texts"):
        read_pseudo(str(tmp_path / "base.npy"))


def test_several_sets_are_refused() -> None:
    with pytest.raises(InputError, match=r"data\.labels pseudo takes one set"):
        DataConfig(source="a", mixed_with=[DataConfig(source="b").sets[0]], labels="pseudo")


@pytest.mark.parametrize("texts", ["memory", "disk"])
def test_a_run_needs_nothing_but_the_corpus(
    texts: Literal["memory", "disk"], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    source = tmp_path / "corpus-only"
    source.mkdir()
    shutil.copy(tiny_data / "corpus.jsonl", source)
    report = Trainer(
        Experiment(
            output=str(tmp_path / "run"),
            model=DualEncoderConfig(
                encoder=str(tiny_model), tie=False, query_max_length=16, document_max_length=32
            ),
            head=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4),
            loss=DistillationConfig(),
            data=DataConfig(source=str(source), labels="pseudo", texts=texts),
            live_negatives=LiveNegativesConfig(per_query=4, depth=8, by="dense"),
            optimization=OptimizationConfig(steps=4, batch_size=16, dense_warmup=0.0, freeze="documents"),
        ),
        progress=False,
    ).fit()
    assert report.steps == 4
    assert 0 < report.metrics["compressed/recall@100"] <= 1
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert any("train/loss_compressed" in row for row in rows)

"""Hard negatives through an index are the best of a brute-force search that are not relevant.

Shapes: n documents, B queries.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from index import FaissFit, IndexConfig, Searcher, export_index
from launch.main import main
from retriever import (
    DualEncoder,
    DualEncoderConfig,
    InputError,
    embed_documents,
    read_corpus,
    read_data,
    read_qrels,
    read_queries,
)
from retriever.heads import ProductQuantizerConfig
from training.mining import MinedNegatives, Miner, MiningConfig

COPIES = {"d0": "e0", "d3": "e3", "d9": "e9"}  # documents and their copies under other ids


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data folder with three copies in its corpus; one query has two relevant documents."""
    folder = tmp_path_factory.mktemp("mining") / "data"
    shutil.copytree(tiny_data, folder)
    with (folder / "corpus.jsonl").open("a", encoding="utf-8") as file:
        for document in [d for d in read_corpus(tiny_data) if d.id in COPIES]:
            row = {"_id": COPIES[document.id], "title": document.title, "text": document.text}
            file.write(json.dumps(row) + "\n")
    with (folder / "qrels" / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("q1\td2\t1\n")
    return folder


@pytest.fixture(scope="module")
def index(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mining")
    torch.manual_seed(0)
    head = ProductQuantizerConfig(num_codebooks=8, codebook_bits=6)
    built = DualEncoderConfig(encoder=str(tiny_model), query_max_length=16, document_max_length=32).build(
        head
    )
    documents = list(read_corpus(data))
    built.eval().head.warm_start(embed_documents(built, documents), FaissFit(), 0)
    built.save(folder / "model", files={"experiment.yaml": "seed: 1"})
    export_index(
        folder / "model", documents, folder / "index", config=IndexConfig(), device="cpu", progress=False
    )
    return folder / "index"


@pytest.fixture(scope="module")
def searcher(index: Path) -> Searcher:
    return Searcher(index)


Ranking = dict[str, list[tuple[str, float]]]


@pytest.fixture(scope="module")
def ranking(searcher: Searcher, data: Path) -> Ranking:
    """All documents of each query by the scores of the decoded codes in float64, best first."""
    head = DualEncoder.load(searcher.folder.parent / "model").head
    decoded = head.decode(
        head.encode(
            embed_documents(DualEncoder.load(searcher.folder.parent / "model"), list(read_corpus(data)))
        )
    )
    queries, ids = read_queries(data), [document.id for document in read_corpus(data)]
    vectors = torch.from_numpy(searcher.embed(list(queries.values()))).double()
    x = decoded.detach().double()
    scores = vectors @ x.T if head.metric == "inner_product" else -torch.cdist(vectors, x).square()
    return {
        name: sorted(zip(ids, row, strict=True), key=lambda hit: -hit[1])
        for name, row in zip(queries, scores.tolist(), strict=True)
    }


def mine(
    searcher: Searcher, data: Path, batch_size: int = 7, teacher: Any = None, **config: Any
) -> dict[str, MinedNegatives]:
    queries = read_queries(data)
    miner = Miner(searcher, read_qrels(data, "train"), MiningConfig(**config), teacher=teacher)
    return {found.query: found for found in miner.mine(queries, batch_size=batch_size)}


def names(searcher: Searcher, found: MinedNegatives) -> list[str]:
    return [searcher.document_ids[row] for row, _ in found.negatives]


def scores_of(ranking: Ranking, query: str, documents: list[str]) -> list[float]:
    known = dict(ranking[query])
    return [known[document] for document in documents]


@pytest.mark.parametrize(
    ("skip", "depth", "per_query"), [(0, 100, 5), (3, 20, 5), (0, 200, 200), (10, 12, 7)]
)
def test_mined_negatives_have_the_scores_of_those_ranks_among_documents_not_relevant(
    searcher: Searcher, data: Path, ranking: Ranking, skip: int, depth: int, per_query: int
) -> None:
    """By scores, since documents of equal codes tie."""
    qrels = read_qrels(data, "train")
    found = mine(searcher, data, skip=skip, depth=depth, per_query=per_query, same_text=False)
    assert list(found) == list(qrels)
    for query, one in found.items():
        others = [document for document, _ in ranking[query] if document not in qrels[query]]
        expected = others[skip:depth][:per_query]
        assert not set(names(searcher, one)) & set(qrels[query])
        np.testing.assert_allclose(
            scores_of(ranking, query, names(searcher, one)), scores_of(ranking, query, expected), atol=1e-5
        )


def test_copies_of_positives_and_of_other_negatives_are_left_out(searcher: Searcher, data: Path) -> None:
    found = mine(searcher, data, depth=200, per_query=200)
    copy = {**COPIES, **{new: old for old, new in COPIES.items()}}
    for query, judged in read_qrels(data, "train").items():
        negatives = names(searcher, found[query])
        assert not {copy.get(document) for document in judged} & set(negatives)
        assert len({min(d, copy.get(d, d)) for d in negatives}) == len(negatives) == 80 - len(judged)


@pytest.mark.parametrize(("margin", "max_relative"), [(0.3, None), (None, 0.6), (0.0, None), (0.2, 0.9)])
def test_negatives_that_score_too_near_the_positive_are_left_out(
    searcher: Searcher, data: Path, margin: float | None, max_relative: float | None
) -> None:
    qrels = read_qrels(data, "train")
    options: dict[str, Any] = {"depth": 200, "per_query": 200, "same_text": False}
    everything = mine(searcher, data, **options)
    found = mine(searcher, data, margin=margin, max_relative=max_relative, **options)
    for query, one in found.items():
        positive = max(score for _, score in everything[query].positives)
        limit = positive - (margin or 0.0)
        limit = min(limit, positive - (1 - (max_relative or 1.0)) * abs(positive))
        assert one.negatives == [hit for hit in everything[query].negatives if hit[1] <= limit]
        assert len(one.positives) == len(qrels[query])
    assert sum(len(one.negatives) for one in found.values()) < sum(
        len(o.negatives) for o in everything.values()
    )


def test_a_query_whose_positive_ranks_below_the_depth_has_no_negatives_with_a_filter(
    searcher: Searcher, data: Path, ranking: Ranking
) -> None:
    deep = {
        query
        for query, judged in read_qrels(data, "train").items()
        if all(document not in judged for document, _ in ranking[query][:12])
    }
    assert deep
    found = mine(searcher, data, depth=5, max_relative=1.0)
    assert not any(found[query].negatives for query in deep)


def test_a_teachers_scores_take_the_place_of_the_indexs(
    searcher: Searcher, data: Path, tiny_model: Path
) -> None:
    torch.manual_seed(5)
    config = DualEncoderConfig(encoder=str(tiny_model), query_max_length=16, document_max_length=32)
    teacher = config.build(ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)).eval()
    found = mine(searcher, data, teacher=teacher, depth=6, per_query=6, same_text=False)
    documents = {document.id: document for document in read_corpus(data)}
    queries, qrels = read_queries(data), read_qrels(data, "train")
    for query in ("q1", "q7"):
        one = found[query]
        rated = [*one.negatives, *one.positives]
        texts = [documents[searcher.document_ids[row]] for row, _ in rated]
        q = teacher.encode_queries(teacher.tokenize_queries([queries[query]])).double()
        x = embed_documents(teacher, texts).double()
        expected = (q @ x.T)[0] if teacher.head.metric == "inner_product" else 1 - (q - x).square().sum(1) / 2
        np.testing.assert_allclose([score for _, score in rated], expected.tolist(), atol=1e-5)
        assert [score for _, score in one.negatives] == sorted([s for _, s in one.negatives], reverse=True)
        assert {searcher.document_ids[row] for row, _ in one.positives} == set(qrels[query])


@pytest.mark.parametrize("pick", ["first", "random"])
def test_the_number_of_queries_searched_at_once_changes_no_negatives(
    searcher: Searcher, data: Path, pick: str
) -> None:
    one, other = (mine(searcher, data, batch_size=size, pick=pick, depth=30, per_query=4) for size in (1, 50))
    assert {q: names(searcher, f) for q, f in one.items()} == {
        q: names(searcher, f) for q, f in other.items()
    }


def test_random_picks_are_from_the_depth_and_those_of_the_seed(searcher: Searcher, data: Path) -> None:
    whole = mine(searcher, data, depth=30, per_query=30)
    first, again, other = (
        mine(searcher, data, pick="random", depth=30, per_query=4, seed=s) for s in (1, 1, 2)
    )
    assert first == again != other
    for query, one in first.items():
        assert len(one.negatives) == 4
        assert {row for row, _ in one.negatives} <= {row for row, _ in whole[query].negatives}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_query": 0}, "per_query must be at least 1, got 0"),
        ({"skip": 9, "depth": 9}, "skip must be 0 or more and below depth, got 9 and 9"),
        ({"pick": "best"}, "pick must be first or random, got 'best'"),
        ({"margin": -0.1}, r"margin must be 0 or more, got -0\.1"),
        ({"max_relative": 1.5}, r"max_relative must be above 0 and at most 1, got 1\.5"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MiningConfig(**options)


def test_a_relevant_document_that_is_not_in_the_index_is_named(searcher: Searcher) -> None:
    with pytest.raises(InputError, match=r"relevant document 'zz' is not in the index .*Mine with"):
        Miner(searcher, {"q1": {"zz": 1}}, MiningConfig())


# --- the verb ---


def test_the_verb_writes_what_training_reads(
    index: Path, data: Path, tmp_path: Path, searcher: Searcher, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    words = ["mine", str(index), str(folder), "--out", str(folder / "negatives.jsonl"), "--per_query", "3"]
    assert main([*words, "--max_relative", "0.95", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = {
        query: names(searcher, one)
        for query, one in mine(searcher, folder, per_query=3, max_relative=0.95).items()
        if one.negatives
    }
    assert read_data(folder, "train").negatives == expected
    assert report["negatives"] == sum(map(len, expected.values()))
    assert report["queries"] + report["without"] == 56
    assert main(words) == 2
    assert "negatives.jsonl exists already" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_the_verb_writes_the_columns_of_sentence_transformers(
    index: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "triplets.parquet"
    words = [
        "mine",
        str(index),
        str(data),
        "--out",
        str(path),
        "--per_query",
        "2",
        "--format",
        "parquet",
        "--json",
    ]
    assert main(words) == 0
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert table.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    pairs = sum(map(len, read_qrels(data, "train").values()))
    queries, documents = read_queries(data), {d.id: d for d in read_corpus(data)}
    assert len(table) == pairs
    assert table[0]["anchor"] == queries["q0"]
    assert table[0]["positive"] == f"{documents['d0'].title} {documents['d0'].text}"


def test_a_mining_that_fails_leaves_no_file(
    index: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Searcher, *_: Any, **__: Any) -> Any:
        raise InputError("the disk is full")

    monkeypatch.setattr(Searcher, "search_vectors", fail)
    assert main(["mine", str(index), str(data), "--out", str(tmp_path / "n.jsonl"), "--json"]) == 2
    assert list(tmp_path.iterdir()) == []

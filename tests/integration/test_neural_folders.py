"""The heads of QINCo, QINCo2 and UNQ, with lists and without, become folders that are searched, merged and served.

The networks are random, and far from their start, so that no linear decoder is exact.
"""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from index import FaissFit, IndexConfig, Searcher, Widths, export_index, merge_indexes
from launch.serving.config import ServeConfig
from launch.serving.server import Server
from retriever import Document, DualEncoderConfig, InputError, embed_documents, read_corpus
from retriever.dual_encoder import load_head
from retriever.heads import HeadConfig, QINCo2Config, QINCoConfig, UNQConfig
from retriever.heads.neural import NeuralQuantizer
from retriever.scores import score_matrix

SIZE: dict[str, Any] = {"num_codebooks": 4, "codebook_bits": 4, "hidden": 8, "num_blocks": 1}
HEADS: dict[str, HeadConfig] = {
    "qinco": QINCoConfig(**SIZE),
    "qinco in lists": QINCoConfig(**SIZE, num_lists=20, metric="inner_product"),
    "qinco2 in lists": QINCo2Config(**SIZE, width=8, candidates=4, beam=2, num_lists=8),
    "unq": UNQConfig(num_codebooks=4, codebook_bits=4, code_dim=8, hidden=16, start_steps=5, start_batch=32),
}
every_head = pytest.mark.parametrize("name", HEADS)
CONFIG = IndexConfig(kind="cascade", shortlist=60, rerank=50, pairs=3)


@pytest.fixture(scope="module")
def documents(tiny_data: Path) -> list[Document]:
    return list(read_corpus(tiny_data))


@pytest.fixture(scope="module")
def folders(
    tiny_model: Path, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Model and index folder of every head."""
    made = {}
    for name, head in HEADS.items():
        torch.manual_seed(0)
        model = DualEncoderConfig(encoder=str(tiny_model), document_max_length=32).build(head).eval()
        model.head.warm_start(embed_documents(model, documents), FaissFit(), 0)
        if isinstance(model.head, NeuralQuantizer):
            with torch.no_grad():
                for parameter in model.head.networks.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        folder, index = (tmp_path_factory.mktemp("neural") / part for part in ("model", "index"))
        model.save(folder, files={"experiment.yaml": "seed: 1"})
        export_index(folder, iter(documents), index, config=CONFIG, device="cpu", progress=False)
        made[name] = folder, index
    return made


def exhaustive(index: Path, vectors: np.ndarray) -> np.ndarray:
    head = load_head(index / "head").eval()
    codes = np.fromfile(index / "codes.u8", np.uint8).reshape(-1, head.code_size)
    with torch.no_grad():
        decoded = head.decode(head.unpack(codes))
    return score_matrix(torch.from_numpy(vectors).double(), decoded.double(), head.metric).numpy()


@every_head
def test_a_folder_gives_the_heads_scores(folders: dict[str, tuple[Path, Path]], name: str) -> None:
    _, index = folders[name]
    searcher = Searcher(index, verify=True)
    vectors = searcher.embed(["w3 w4 w5", "w60", "w7 w8"])
    exact = exhaustive(index, vectors)
    scores, rows = searcher.search_vectors(vectors, 10)
    assert np.abs(scores - np.take_along_axis(exact, rows, axis=1))[rows >= 0].max() < 1e-5


@every_head
def test_the_widest_search_is_exhaustive(folders: dict[str, tuple[Path, Path]], name: str) -> None:
    _, index = folders[name]
    lists = load_head(index / "head").export().centroids
    searcher = Searcher(index, nprobe=None if lists is None else len(lists))
    vectors = searcher.embed(["w3 w4 w5", "w60", "w7 w8"])
    exact = exhaustive(index, vectors)
    scores, _ = searcher.search_vectors(vectors, 20, widths=Widths(shortlist=80, rerank=80))
    assert np.abs(scores - -np.sort(-exact, axis=1)[:, :20]).max() < 1e-5


@every_head
def test_a_folder_in_another_form_needs_no_model(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    _, index = folders[name]
    merge_indexes([index], tmp_path / "plain", config=IndexConfig(kind="cascade", shortlist=80, pairs=0))
    vectors = Searcher(index).embed(["w11"])
    (ours,), (theirs,) = (
        Searcher(folder).search_vectors(vectors, 5, widths=Widths(shortlist=80, rerank=80))[0]
        for folder in (index, tmp_path / "plain")
    )
    assert np.abs(ours - theirs).max() < 1e-6


@every_head
def test_lance_gets_the_decoded_vectors_in_the_heads_lists(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    pytest.importorskip("lance")
    from index.lance_dataset import search_lance, write_lance

    _, index = folders[name]
    write_lance(index, tmp_path / "out")
    vectors = Searcher(index).embed(["w9", "w3 w4"])
    scores, _ = search_lance(tmp_path / "out", vectors, 5)
    assert np.abs(scores - -np.sort(-exhaustive(index, vectors), axis=1)[:, :5]).max() < 1e-5


def test_pairs_see_lists_by_codes_of_their_centroids(folders: dict[str, tuple[Path, Path]]) -> None:
    many = Searcher(folders["qinco in lists"][1])._cascade  # 20 lists, 16 values of a code
    few = Searcher(folders["qinco2 in lists"][1])._cascade  # 8 lists
    assert many is not None
    assert few is not None
    assert many.export.list_codes is not None
    assert few.export.list_codes is not None
    assert many.export.list_codes.shape == (20, 5)
    assert len(many.export.list_codes.unique(dim=0)) == 20
    assert few.export.list_codes.tolist() == [[number] for number in range(8)]


def test_other_kinds_are_refused_with_the_one_that_fits(folders: dict[str, tuple[Path, Path]]) -> None:
    head = load_head(folders["qinco"][1] / "head")
    with pytest.raises(InputError, match=r"kind 'rq' cannot carry NeuralCodec\. Choose --index\.kind auto"):
        IndexConfig(kind="rq").builder(head.export())


def test_a_server_answers_with_the_widths_that_it_was_started_with(
    folders: dict[str, tuple[Path, Path]],
) -> None:
    _, index = folders["qinco"]
    config = ServeConfig(index=str(index), port=0, watch=0.0, cascade=Widths(shortlist=80, rerank=80))
    ready = Event()
    server = Server(config, lambda url: ready.set())
    thread = Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(60)
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            answer = client.post("/search", json={"query": "w3 w4 w5", "k": 3}).json()
    finally:
        server.stop()
        thread.join(60)
    hits = answer["results"][0]["hits"]
    expected = -np.sort(-exhaustive(index, Searcher(index).embed(["w3 w4 w5"])), axis=1)[0, :3]
    assert np.abs(np.array([hit["score"] for hit in hits]) - expected).max() < 1e-5

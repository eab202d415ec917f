"""Squared norms of additive codes in one byte, the range they are counted in, or none at all: what they do to scores.

Shapes: n documents, q queries, D dimensions, M codebooks, K codewords, J lists.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from index import FaissFit, IndexConfig, Searcher, export_index
from index.builders import BUILDERS, inverted_file, probing_all, search_index
from index.builders.additive import norm_range
from index.parity import ParityError, prove_parity
from index.tables import TableScan
from retriever import DualEncoderConfig, InputError, embed_documents, read_corpus
from retriever.heads import (
    CompressionHead,
    IVFResidualQuantizerConfig,
    PCAConfig,
    ResidualQuantizerConfig,
)

D, M, BITS, J, N, Q = 24, 5, 6, 8, 1500, 40
SEEDS = (0, 1, 2)
CONFIGS = {
    "rq": ResidualQuantizerConfig(num_codebooks=M, codebook_bits=BITS),
    "ivfrq": IVFResidualQuantizerConfig(num_codebooks=M, codebook_bits=BITS, num_lists=J),
}


def vectors(seed: int, rows: int = N) -> torch.Tensor:
    """Return unit vectors whose dimensions have unequal spread."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(2, 0.2, D)
    return torch.nn.functional.normalize(torch.randn(rows, D, generator=generator) * spread, dim=1)


def trained(kind: str, seed: int) -> tuple[CompressionHead, np.ndarray, np.ndarray]:
    """Return a head fitted on vectors, the packed codes of others, and those decoded in float64, (n, D)."""
    head = CONFIGS[kind].build(D)
    head.warm_start(vectors(seed), FaissFit(), seed)
    codes = head.encode(vectors(seed + 100))
    return head, head.pack(codes), head.decode(codes).detach().double().numpy()


def stored_norms(kind: str, head: CompressionHead, decoded: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the squared norms that go into the codes: with lists those of the residuals."""
    if kind == "rq":
        return np.square(decoded).sum(1)
    lists = head.unpack(codes)[:, 0]
    return np.square(decoded - head.centroids.detach().double().numpy()[lists]).sum(1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_are_the_models_within_half_a_step_of_the_norm(kind: str, seed: int) -> None:
    head, codes, decoded = trained(kind, seed)
    export = head.export()
    built = BUILDERS[kind](norms="uint8").build(export, codes)
    exact = BUILDERS[kind](norms="float32").build(export, codes)
    assert built.rq.code_size == exact.rq.code_size - 3
    queries = vectors(seed + 200, Q).numpy()
    with probing_all(built):
        distances, rows = built.search(queries, N)
    assert (np.sort(rows, axis=1) == np.arange(N)).all()
    expected = np.square(queries[:, None].astype(np.float64) - decoded[rows]).sum(2)
    low, high = norm_range(export)
    error = np.abs(distances - expected)
    assert error.max() <= (high - low) / 256 / 2 + 1e-5
    assert error.max() > (high - low) / 256 / 8  # they are rounded


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_without_norms_scores_are_exact_and_codes_shorter(kind: str, seed: int) -> None:
    head, codes, decoded = trained(kind, seed)
    builder = BUILDERS[kind](norms="none")
    built = builder.build(head.export(), codes)
    assert built.rq.code_size == (M * BITS + 7) // 8
    if lists := inverted_file(built):
        assert lists.nprobe == lists.nlist  # there are N documents in all
    queries = vectors(seed + 200, Q).numpy()
    with probing_all(built):
        distances, rows = built.search(queries, N)
    expected = np.square(queries[:, None].astype(np.float64) - decoded[rows]).sum(2)
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-6)
    assert builder.exact
    with probing_all(built):
        assert prove_parity(builder, built, head, codes, vectors(seed + 300, Q)).overlap == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_range_holds_the_norms_of_codes_and_is_not_much_wider(kind: str, seed: int) -> None:
    head, codes, decoded = trained(kind, seed)
    low, high = norm_range(head.export())
    norms = stored_norms(kind, head, decoded, codes)
    assert low <= norms.min()
    assert norms.max() <= high
    assert high - low <= 4 * (norms.max() - norms.min())


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_range_depends_on_the_codebooks_alone(kind: str) -> None:
    head, codes, _ = trained(kind, 0)
    export, builder = head.export(), BUILDERS[kind](norms="uint8")
    whole, part = builder.build(export, codes), builder.build(export, codes[: N // 3])
    assert (whole.rq.norm_min, whole.rq.norm_max) == (part.rq.norm_min, part.rq.norm_max)
    low, high = norm_range(export)
    assert (whole.rq.norm_min, whole.rq.norm_max) == pytest.approx((low, high), rel=1e-6)
    assert norm_range(head.export()) == (low, high)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_best_documents_are_nearly_the_models(kind: str, seed: int) -> None:
    head, codes, _ = trained(kind, seed)
    builder = BUILDERS[kind](norms="uint8")
    built = builder.build(head.export(), codes)
    with probing_all(built):
        parity = prove_parity(builder, built, head, codes, vectors(seed + 300, Q))
    assert 0.9 < parity.overlap < 1
    assert not builder.exact
    assert "one byte" in builder.approximation


def test_norms_of_a_range_far_too_wide_are_not_published() -> None:
    head, codes, _ = trained("rq", 0)
    builder = BUILDERS["rq"](norms="uint8")
    built = builder.build(head.export(), codes)
    built.rq.norm_max = 300.0  # read back as if they had been counted so
    with pytest.raises(ParityError, match=r"overlap@20 .* Set --index.norms float32"):
        prove_parity(builder, built, head, codes, vectors(300, Q))


def test_inner_products_and_other_names_are_refused() -> None:
    head = ResidualQuantizerConfig(num_codebooks=M, codebook_bits=BITS, metric="inner_product").build(D)
    with pytest.raises(InputError, match=r"inner products need no norms, got index\.norms uint8"):
        BUILDERS["rq"](norms="uint8").check(head.export())
    with pytest.raises(InputError, match="norms must be one of float32, uint8, none, got 'int4'"):
        BUILDERS["ivfrq"](norms="int4")
    with pytest.raises(InputError, match=r"index\.norms=uint8 needs index\.kind rq or ivfrq, got 'pq'"):
        IndexConfig(kind="pq", norms="uint8")


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_index_folder_has_them_and_says_so(
    kind: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    documents = list(read_corpus(str(tiny_data)))
    model = DualEncoderConfig(encoder=str(tiny_model)).build(
        PCAConfig(components=16, inner=type(CONFIGS[kind])(num_codebooks=3, codebook_bits=4))
        if kind == "rq"
        else IVFResidualQuantizerConfig(num_codebooks=3, codebook_bits=4, num_lists=4)
    )
    model.eval()
    model.head.warm_start(embed_documents(model, documents), FaissFit(), 0)
    model.save(tmp_path / "model")
    config = IndexConfig(kind=kind, norms="uint8")  # type: ignore[arg-type]
    report = export_index(tmp_path / "model", documents, tmp_path / "index", config=config, progress=False)
    assert 0.8 <= report.overlap < 1
    searcher = Searcher(tmp_path / "index")
    _, ids = searcher.search([documents[3].text], k=5)
    assert documents[3].id in ids[0]
    exact = export_index(
        tmp_path / "model", documents, tmp_path / "exact", config=IndexConfig(), progress=False
    )
    assert report.index_bytes == exact.index_bytes + {"rq": -3, "ivfrq": 1}[kind] * len(documents)


# --- tables in the place of norms ---


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_tables_have_the_scores_and_the_best_documents_of_the_model(kind: str, seed: int) -> None:
    head, codes, decoded = trained(kind, seed)
    queries = 3 * vectors(seed + 200, Q).numpy()
    exact = 1 - np.square(queries[:, None].astype(np.float64) - decoded).sum(2) / 2
    scores, rows = TableScan(head.export(), codes, nprobe=J).search(queries, 50)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, 1), rtol=0, atol=3e-6)
    np.testing.assert_allclose(scores, -np.sort(-exact, 1)[:, :50], rtol=0, atol=3e-6)


@pytest.mark.parametrize("nprobe", [None, 1, 3, J])
def test_tables_probe_the_lists_that_the_index_probes(nprobe: int | None) -> None:
    head, codes, _ = trained("ivfrq", 0)
    built = BUILDERS["ivfrq"](norms="none", nprobe=nprobe or 2).build(head.export(), codes)
    expected, _ = search_index(built, vectors(200, Q).numpy(), N)
    scan = TableScan(head.export(), codes, nprobe=2)  # type: ignore[arg-type]
    scores, rows = scan.search(vectors(200, Q).numpy(), N, nprobe)
    np.testing.assert_array_equal(rows < 0, np.isneginf(expected))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_searcher_scans_by_tables_where_there_are_no_norms(
    kind: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    documents = list(read_corpus(str(tiny_data)))
    options = {"num_lists": 4} if kind == "ivfrq" else {}
    inner = type(CONFIGS[kind])(num_codebooks=3, codebook_bits=4, **options)
    model = DualEncoderConfig(encoder=str(tiny_model)).build(PCAConfig(components=16, inner=inner)).eval()
    model.head.warm_start(embed_documents(model, documents), FaissFit(), 0)
    model.save(tmp_path / "model")
    for norms in ("none", "float32"):
        config = IndexConfig(kind=kind, norms=norms)  # type: ignore[arg-type]
        export_index(tmp_path / "model", documents, tmp_path / norms, config=config, progress=False)
    few = len(documents)
    fast, slow = Searcher(tmp_path / "none", tables=few), Searcher(tmp_path / "none", tables=few - 1)
    assert fast._tables is not None
    assert slow._tables is None
    assert Searcher(tmp_path / "float32")._tables is None
    texts = [document.text for document in documents[:20]]
    for probes in (None, 1) if kind == "ivfrq" else (None,):
        assert_equal_hits(fast.search(texts, 20, nprobe=probes), slow.search(texts, 20, nprobe=probes))
    if kind == "ivfrq":
        fast.probe(2)
        slow.probe(2)
        assert_equal_hits(fast.search(texts, 20), slow.search(texts, 20))
    some = [document.id for document in documents[::7]]
    assert_equal_hits(fast.search(texts, 5, ids=some), slow.search(texts, 5, ids=some))


def assert_equal_hits(
    found: tuple[np.ndarray, list[list[str]]], expected: tuple[np.ndarray, list[list[str]]]
) -> None:
    """Equal scores may stand for each other."""
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-6)
    for scores, names, others in zip(expected[0], found[1], expected[1], strict=True):
        least = scores[len(others) - 1] + 1e-5
        kept = [name for name, score in zip(others, scores, strict=False) if score > least]
        assert set(kept) <= set(names)

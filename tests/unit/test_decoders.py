"""Linear decoders are least squares, for real and for random codes; FAISS holds the first-order one.

Shapes: n documents, D dimensions, M codes, K values of a code.
"""

from __future__ import annotations

from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from index.builders import BUILDERS, CascadeBuilder, FaissIndex, probing_all, search_index
from index.decoders import decode_linear, default_pairs, fit_additive, fit_pairs
from retriever.heads import NeuralCodec, pack_codes, pack_list_numbers
from retriever.scores import score_matrix

N, D, M, BITS = 3000, 8, 4, 3
K = 2**BITS
METRICS = ("inner_product", "l2")


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def residual_codes(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return codebooks (M, K, D) and codes of FAISS's residual quantizer, found one after the other."""
    quantizer = faiss.ResidualQuantizer(D, M, BITS)
    quantizer.max_beam_size = 1
    quantizer.cp.seed = seed
    quantizer.train(x.numpy())
    packed = quantizer.compute_codes(x.numpy())
    bits = np.unpackbits(packed, axis=1, bitorder="little", count=M * BITS).reshape(len(x), M, BITS)
    books = faiss.vector_to_array(quantizer.codebooks).reshape(M, K, D)
    return torch.from_numpy(books), torch.from_numpy((bits @ (1 << np.arange(BITS))).astype(np.int64))


def random_codes(seed: int, n: int = N) -> Tensor:
    """Codes of skewed frequencies, of which the last value never occurs."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, M, generator=generator).square() * (K - 1)).long()


def sums(books: Tensor, codes: Tensor) -> Tensor:
    return sum(books[m, codes[:, m]] for m in range(books.shape[0]))  # type: ignore[return-value]


def curved(codes: Tensor, seed: int) -> Tensor:
    """Vectors that are no sum of codewords: a network's."""
    y = sums(rand(M, K, D, seed=seed), codes)
    return torch.tanh(y @ rand(D, D, seed=seed + 1)) + 0.5 * y + 3


def mse(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).square().sum(1).mean())


# --- first order ---


@pytest.mark.parametrize("seed", range(3))
def test_least_squares_is_nearer_than_the_codebooks_that_made_the_codes(seed: int) -> None:
    x = rand(N, D, seed=seed) @ rand(D, D, seed=seed + 1)
    books, codes = residual_codes(x, seed + 1)
    assert mse(sums(fit_additive(codes, x, K), codes), x) < mse(sums(books, codes), x)


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_that_of_dense_one_hot_least_squares(seed: int) -> None:
    codes = random_codes(seed)
    x = curved(codes, seed)
    one_hot = torch.nn.functional.one_hot(codes, K).flatten(1).double().numpy()
    oracle = one_hot @ np.linalg.lstsq(one_hot, x.double().numpy(), rcond=None)[0]
    assert np.abs(sums(fit_additive(codes, x, K), codes).numpy() - oracle).max() < 1e-4


def test_codes_of_a_linear_codec_are_decoded_as_it_does() -> None:
    codes, books = random_codes(0), rand(M, K, D, seed=5)
    x = sums(books, codes)
    assert (sums(fit_additive(codes, x, K), codes) - x).abs().max() < 1e-4


def test_the_first_codebook_holds_the_mean_and_the_others_none() -> None:
    codes = random_codes(1)
    x = curved(codes, 1)
    books = fit_additive(codes, x, K)
    means = torch.stack([books[m, codes[:, m]].mean(0) for m in range(M)])
    assert torch.allclose(means[0], x.mean(0), atol=1e-4)
    assert means[1:].abs().max() < 1e-4


def test_a_codeword_that_no_document_has_is_the_mean_or_nothing() -> None:
    codes = random_codes(2)
    x = curved(codes, 2)
    books = fit_additive(codes, x, K)
    assert torch.allclose(books[0, K - 1], x.mean(0), atol=1e-4)
    assert books[1:, K - 1].abs().max() < 1e-4


# --- pairs ---


@pytest.mark.parametrize("smoothing", [None, 0.0, 4.0])
def test_every_pair_makes_the_training_error_smaller(smoothing: float | None) -> None:
    codes = random_codes(3)
    x = curved(codes, 3)
    residuals = x - sums(fit_additive(codes, x, K), codes)
    pairs, tables = fit_pairs(codes, residuals.clone(), K, pairs=6, smoothing=smoothing)
    errors = [float(residuals.square().sum())]
    for (a, b), table in zip(pairs.tolist(), tables, strict=True):
        residuals = residuals - table[codes[:, a] * K + codes[:, b]].float()
        errors.append(float(residuals.square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_the_first_pair_is_the_one_whose_means_leave_least() -> None:
    codes = random_codes(4)
    residuals = curved(codes, 4)
    left = {}
    for a in range(M):
        for b in range(a + 1, M):
            cells = (codes[:, a] * K + codes[:, b]).numpy()
            rest = residuals.numpy().astype(np.float64).copy()
            for cell in np.unique(cells):
                rest[cells == cell] -= rest[cells == cell].mean(0)
            left[a, b] = (rest**2).sum()
    pairs, _ = fit_pairs(codes, residuals, K, pairs=1, smoothing=0.0)
    assert tuple(pairs[0].tolist()) == min(left, key=lambda pair: left[pair])


def test_a_table_is_the_mean_of_its_documents() -> None:
    codes = random_codes(5)
    residuals = curved(codes, 5)
    pairs, tables = fit_pairs(codes, residuals.clone(), K, pairs=1, smoothing=0.0)
    (a, b), table = pairs[0].tolist(), tables[0]
    own = (codes[:, a] == 1) & (codes[:, b] == 0)
    assert torch.allclose(table[K].float(), residuals[own].mean(0), atol=1e-2)
    assert table[K * K - 1].abs().max() == 0  # which no document has


def test_shrunk_means_are_nearer_to_other_documents_than_plain_ones() -> None:
    codes, other = random_codes(6, n=150), random_codes(7)
    noise = rand(150, D, seed=8)
    effect = rand(K * K, D, seed=9) * 0.5
    errors = []
    for smoothing in (None, 0.0):
        residuals = effect[codes[:, 0] * K + codes[:, 1]] + noise
        pairs, tables = fit_pairs(codes, residuals, K, pairs=3, smoothing=smoothing)
        made = sum(
            table[other[:, a] * K + other[:, b]].float()
            for (a, b), table in zip(pairs.tolist(), tables, strict=True)
        )
        errors.append(mse(made, effect[other[:, 0] * K + other[:, 1]]))  # type: ignore[arg-type]
    assert errors[0] < errors[1]


def test_pure_noise_is_shrunk_to_nearly_nothing() -> None:
    codes, noise = random_codes(8), rand(N, D, seed=10)
    _, tables = fit_pairs(codes, noise.clone(), K, pairs=1)
    _, plain = fit_pairs(codes, noise, K, pairs=1, smoothing=0.0)
    assert tables.float().square().sum() < 0.1 * plain.float().square().sum()


def test_no_pair_comes_twice_and_no_more_than_there_are() -> None:
    codes = random_codes(9)
    pairs, tables = fit_pairs(codes, curved(codes, 9), K, pairs=99)
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) == len(tables) == M * (M - 1) // 2


@pytest.mark.parametrize(("documents", "expected"), [(383, 0), (384, 6)])
def test_tables_are_made_by_default_where_they_are_smaller_than_the_corpus(
    documents: int, expected: int
) -> None:
    assert default_pairs(NeuralCodec(dim=D, num_codes=M, code_bits=BITS), documents) == expected


# --- in FAISS ---


def fitted(
    metric: str, *, lists: int = 0, bits: int = BITS, seed: int = 0
) -> tuple[NeuralCodec, np.ndarray, Tensor]:
    """Return an export with a first-order decoder, packed codes, and what it decodes them to."""
    size = 2**bits
    codes = torch.randint(size, (N, M), generator=torch.Generator().manual_seed(seed))
    export = NeuralCodec(
        dim=D,
        num_codes=M,
        code_bits=bits,
        metric=metric,
        additive=rand(M, size, D, seed=seed + 1),
        centroids=3 * rand(lists, D, seed=seed + 2) if lists else None,
    )
    packed = pack_codes(codes, bits)
    if lists:
        numbers = torch.randint(lists, (N, 1), generator=torch.Generator().manual_seed(seed + 3))
        packed = np.hstack([pack_list_numbers(numbers[:, 0].numpy(), lists), packed])
        codes = torch.hstack([numbers, codes])
    return export, packed, decode_linear(export, codes, pairwise=False)


def test_decoding_is_the_sum_of_centroid_codewords_and_tables() -> None:
    export, _, _ = fitted("l2", lists=5)
    codes = torch.tensor([[4, 1, 2, 3, 0]])
    pairs = torch.tensor([[0, 2], [1, 3]])
    tables = rand(2, K * K, D, seed=7).half()
    assert export.centroids is not None
    assert export.additive is not None
    expected = export.centroids[4] + sum(export.additive[m, k] for m, k in enumerate([1, 2, 3, 0]))
    assert torch.allclose(decode_linear(export, codes, pairwise=False)[0], expected, atol=1e-5)
    whole = replace(export, pairs=pairs, tables=tables)
    expected = expected + tables[0, K + 3].float() + tables[1, 2 * K].float()
    assert torch.allclose(decode_linear(whole, codes, pairwise=True)[0], expected, atol=1e-5)


FORMS = {
    "scan": ({}, 0),
    "lists of the head": ({}, 7),
    "lists behind a graph": ({"hnsw_lists": True}, 30),
    "first code": ({"list_codes": 1}, 0),
    "first two codes": ({"list_codes": 2}, 0),
}
every_form = pytest.mark.parametrize("form", FORMS)


def build(form: str, metric: str, bits: int = BITS) -> tuple[FaissIndex, Tensor, np.ndarray]:
    options, lists = FORMS[form]
    export, packed, decoded = fitted(metric, lists=lists, bits=bits)
    return CascadeBuilder(**options).build(export, packed), decoded, packed


@every_form
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_the_short_list_scores_by_inner_product_exactly(form: str, bits: int) -> None:
    built, decoded, _ = build(form, "inner_product", bits)
    queries = rand(20, D, seed=50)
    with probing_all(built):
        scores, rows = search_index(built, queries.numpy(), 15)
    expected = (queries.double() @ decoded.double().T).numpy()
    assert np.abs(scores - np.take_along_axis(expected, rows, 1)).max() < 1e-4
    assert np.abs(scores - -np.sort(-expected, axis=1)[:, :15]).max() < 1e-4


@every_form
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_the_short_list_ranks_by_distance_within_the_rounding_of_lengths(form: str, bits: int) -> None:
    built, decoded, _ = build(form, "l2", bits)
    queries = rand(20, D, seed=51)
    with probing_all(built):
        scores, rows = search_index(built, queries.numpy(), 15)
    halves = decoded.double().square().sum(1) / 2
    expected = (queries.double() @ decoded.double().T - halves).numpy()
    step = float(halves.max() - halves.min()) / (2**bits) ** -(-8 // bits)
    assert np.abs(scores - np.take_along_axis(expected, rows, 1)).max() < 0.51 * step * 1.01 + 1e-4
    assert np.abs(scores - -np.sort(-expected, axis=1)[:, :15]).max() < 0.51 * step * 1.01 + 1e-4
    # the distance, not something else: nearest documents of the decoded vectors
    nearest = score_matrix(queries, decoded, "l2").topk(15).indices.numpy()
    assert np.mean([len(set(a) & set(b)) for a, b in zip(rows, nearest, strict=True)]) > 13


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", [name for name, (options, lists) in FORMS.items() if options or lists])
def test_the_probed_lists_are_those_nearest_by_the_metric(form: str, metric: str) -> None:
    built, _, packed = build(form, metric)
    options, lists = FORMS[form]
    export, _, _ = fitted(metric, lists=lists)
    assert export.additive is not None
    if lists:
        centroids, own = export.centroids, torch.from_numpy(packed[:, 0].astype(np.int64))
    else:
        codes = np.unpackbits(packed, axis=1, bitorder="little")[:, : M * BITS].reshape(N, M, BITS) @ (
            1 << np.arange(BITS)
        )
        own = torch.from_numpy(codes[:, 0] + (K * codes[:, 1] if options["list_codes"] == 2 else 0)).long()
        centroids = export.additive[0]
        if options["list_codes"] == 2:
            centroids = torch.stack(
                [export.additive[0, j % K] + export.additive[1, j // K] for j in range(K * K)]
            )
    queries = rand(20, D, seed=52)
    inner = faiss.downcast_index(faiss.extract_index_ivf(built))
    inner.nprobe = 2
    _, rows = search_index(built, queries.numpy(), N)
    assert centroids is not None
    probed = score_matrix(queries, centroids, metric).topk(2).indices
    for query in range(20):
        expected = torch.isin(own, probed[query]).nonzero()[:, 0].tolist()
        assert sorted(rows[query][rows[query] >= 0].tolist()) == expected


@pytest.mark.parametrize("form", FORMS)
def test_the_index_is_read_back_as_it_was(form: str, tmp_path: object) -> None:
    built, _, _ = build(form, "l2")
    again = faiss.deserialize_index(faiss.serialize_index(built))
    queries = rand(5, D, seed=53).numpy()
    with probing_all(built), probing_all(again):
        assert np.array_equal(built.search(queries, 9)[1], again.search(queries, 9)[1])


def test_a_short_list_has_lengths_of_decoded_vectors_not_of_errors() -> None:
    """QINCo's code trains its norms on ||x - x_hat||^2, but stores ||x_hat||^2: most are then clipped."""
    built, decoded, _ = build("scan", "l2", 8)
    inner = faiss.downcast_index(built.index)
    books = faiss.vector_to_array(inner.pq.centroids).reshape(M + 1, 256, D)
    codes = faiss.vector_to_array(inner.codes).reshape(N, M + 1)
    stored = -books[M, codes[:, M], 0]
    halves = (decoded.double().square().sum(1) / 2).numpy()
    assert np.abs(stored - halves).max() < 0.51 * (halves.max() - halves.min()) / 255


def test_the_family_is_in_the_dictionary() -> None:
    assert BUILDERS["cascade"] is CascadeBuilder

"""Built flat, pq and ivfpq indexes hold the head's codebooks and codes as they are, and score by the model's metric.

Every form is in test_forms.py.

Shapes: n documents, q queries, D dimensions, M codebooks, K codewords, S = D // M sub-dimensions.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from index.builders import BUILDERS, FaissIndex, FlatBuilder, IndexBuilder, IVFPQBuilder, PQBuilder
from index.builders.base import search_index, set_vector
from retriever import InputError
from retriever.heads import FaissExport, FlatVectors, ProductCodebooks, pack_codes

M, S, N, QUERIES, TOP = 4, 4, 200, 6, 10
D = M * S
METRICS = ("inner_product", "l2")
BITS = (4, 5, 6, 8, 10)


@dataclass(frozen=True)
class Case:
    """A builder's input, queries (q, D), and the exact scores (q, n) of the decoded vectors in float64."""

    builder: IndexBuilder
    export: FaissExport
    packed: np.ndarray
    queries: np.ndarray
    exact: np.ndarray

    def build(self) -> FaissIndex:
        return self.builder.build(self.export, self.packed)

    @property
    def sign(self) -> int:
        """1 if a higher score is better, -1 if a lower one is."""
        return 1 if self.export.metric == "inner_product" else -1


def exact_scores(queries: np.ndarray, vectors: np.ndarray, metric: str) -> np.ndarray:
    if metric == "inner_product":
        return queries.astype(np.float64) @ vectors.T
    return ((queries.astype(np.float64)[:, None] - vectors[None]) ** 2).sum(-1)


def make_pq_case(
    builder: IndexBuilder,
    *,
    metric: str = "inner_product",
    bits: int = 8,
    rotated: bool = True,
    seed: int = 0,
    documents: int = N,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    codebooks = torch.randn(M, 2**bits, S, generator=generator)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q if rotated else None
    codes = torch.randint(2**bits, (documents, M), generator=generator)
    queries = torch.randn(QUERIES, D, generator=generator).numpy()
    vectors = np.stack(
        [np.concatenate([codebooks[m, row[m]].double().numpy() for m in range(M)]) for row in codes]
    )
    if rotation is not None:
        vectors = np.linalg.solve(rotation.double().numpy(), vectors.T).T  # x of A x = y
    return Case(
        builder=builder,
        export=ProductCodebooks(codebooks=codebooks, rotation=rotation, metric=metric),
        packed=pack_codes(codes, bits),
        queries=queries,
        exact=exact_scores(queries, vectors, metric),
    )


def make_flat_case(*, metric: str = "inner_product", seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(N, D, generator=generator)
    queries = torch.randn(QUERIES, D, generator=generator).numpy()
    return Case(
        builder=FlatBuilder(),
        export=FlatVectors(dim=D, metric=metric),
        packed=vectors.numpy().view(np.uint8),
        queries=queries,
        exact=exact_scores(queries, vectors.double().numpy(), metric),
    )


def case_id(case: Case) -> str:
    export = case.export
    name = f"{type(case.builder).__name__}-{export.metric}"
    if not isinstance(export, ProductCodebooks):
        return name
    rotated = "plain" if export.rotation is None else "rotated"
    nlist = f"-nlist{case.builder.nlist}" if isinstance(case.builder, IVFPQBuilder) else ""
    return f"{name}-{export.codebooks.shape[1].bit_length() - 1}bits-{rotated}{nlist}"


CASES = [make_flat_case(metric=metric) for metric in METRICS] + [
    make_pq_case(builder, metric=metric, bits=bits, rotated=rotated)
    for builder in (PQBuilder(), IVFPQBuilder(nlist=1), IVFPQBuilder(nlist=7))
    for metric in METRICS
    for bits in BITS
    for rotated in (False, True)
]
every_case = pytest.mark.parametrize("case", CASES, ids=case_id)


def assert_same_ranking(rows: np.ndarray, case: Case) -> None:
    """Assert that rows (q, k) are the best documents of the exact scores, in order; equal scores may swap."""
    expected = np.argsort(-case.sign * case.exact, axis=1, kind="stable")[:, : rows.shape[1]]
    found = np.take_along_axis(case.exact, rows, axis=1)
    best = np.take_along_axis(case.exact, expected, axis=1)
    swapped = rows != expected
    np.testing.assert_allclose(found[swapped], best[swapped], rtol=0, atol=1e-5)
    assert swapped.mean() < 0.1
    assert all(len(set(row)) == len(row) for row in rows.tolist())


def unwrap(index: FaissIndex) -> FaissIndex:
    """Return the index behind a rotation, or the index itself: a view, which dies with `index`."""
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def stored_codes(index: FaissIndex) -> np.ndarray:
    """Return the code bytes inside an index in document order."""
    inner = unwrap(index)
    if not isinstance(inner, faiss.IndexIVFPQ):
        return faiss.vector_to_array(inner.codes).reshape(index.ntotal, -1)
    codes = np.empty((index.ntotal, inner.code_size), dtype=np.uint8)
    for number in range(inner.nlist):
        size = inner.invlists.list_size(number)
        ids = faiss.rev_swig_ptr(inner.invlists.get_ids(number), size)
        content = faiss.rev_swig_ptr(inner.invlists.get_codes(number), size * inner.code_size)
        codes[ids] = content.reshape(size, -1)
    return codes


# --- scores ---


@every_case
def test_scores_are_the_exact_scores_of_the_decoded_codes(case: Case) -> None:
    scores, rows = case.build().search(case.queries, TOP)
    expected = np.take_along_axis(case.exact, rows, axis=1)
    tolerance = 1e-5 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)


@every_case
def test_results_are_the_best_documents_in_order(case: Case) -> None:
    _, rows = case.build().search(case.queries, TOP)
    assert_same_ranking(rows, case)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("builder", [PQBuilder(), IVFPQBuilder(nlist=7)], ids=repr)
def test_every_document_is_found_with_its_exact_score(builder: IndexBuilder, seed: int) -> None:
    case = make_pq_case(builder, seed=seed)
    scores, rows = case.build().search(case.queries, N)
    assert all(sorted(row) == list(range(N)) for row in rows.tolist())
    expected = np.take_along_axis(case.exact, rows, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@every_case
def test_metric_type_is_that_of_the_export(case: Case) -> None:
    expected = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[case.export.metric]
    built = case.build()
    assert (built.metric_type, unwrap(built).metric_type) == (expected, expected)


@every_case
def test_codes_inside_are_ours_byte_for_byte(case: Case) -> None:
    np.testing.assert_array_equal(stored_codes(case.build()), case.packed)


@every_case
def test_index_read_from_its_file_gives_identical_results(case: Case, tmp_path: Path) -> None:
    built = case.build()
    faiss.write_index(built, str(tmp_path / "index"))
    read = faiss.read_index(str(tmp_path / "index"))
    for ours, theirs in zip(read.search(case.queries, TOP), built.search(case.queries, TOP), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rotation_has_the_orientation_of_a_linear_layer() -> None:
    """A search with the transposed rotation would go unnoticed by FAISS."""
    case = make_pq_case(PQBuilder())
    built = case.build()
    rotated = faiss.downcast_VectorTransform(built.chain.at(0)).apply(case.queries)
    expected = case.queries @ case.export.rotation.numpy().T
    np.testing.assert_allclose(rotated, expected, rtol=0, atol=1e-5)


def test_rotated_index_reconstructs_the_vectors_of_the_codes() -> None:
    case = make_pq_case(PQBuilder())
    vectors = case.build().reconstruct_n(0, N)
    np.testing.assert_allclose(case.queries @ vectors.T, case.exact, rtol=0, atol=1e-4)


def test_index_outlives_the_arrays_it_was_built_from() -> None:
    case = make_pq_case(IVFPQBuilder(nlist=7))
    packed = case.packed.copy()
    built = case.builder.build(replace(case.export, codebooks=case.export.codebooks.clone()), packed)
    before = built.search(case.queries, TOP)
    packed[:] = 0
    del packed
    gc.collect()
    np.testing.assert_array_equal(built.search(case.queries, TOP)[0], before[0])


def test_codes_of_a_file_map_are_taken(tmp_path: Path) -> None:
    case = make_pq_case(IVFPQBuilder(nlist=7))
    (tmp_path / "codes.u8").write_bytes(case.packed.tobytes())
    mapped = np.memmap(tmp_path / "codes.u8", dtype=np.uint8, mode="r").reshape(case.packed.shape)
    np.testing.assert_array_equal(stored_codes(case.builder.build(case.export, mapped)), case.packed)


# --- scores as the model defines them ---


@every_case
def test_score_is_the_inner_product_or_one_less_half_the_squared_distance(case: Case) -> None:
    scores, rows = search_index(case.build(), case.queries, TOP)
    exact = case.exact if case.export.metric == "inner_product" else 1 - case.exact / 2
    expected = np.take_along_axis(exact, rows, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


@every_case
def test_scores_fall(case: Case) -> None:
    scores, _ = search_index(case.build(), case.queries, TOP)
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_queries_of_float64_give_the_scores_of_float32(metric: str) -> None:
    case = make_pq_case(PQBuilder(), metric=metric)
    expected, _ = search_index(case.build(), case.queries, TOP)
    scores, _ = search_index(case.build(), case.queries.astype(np.float64), TOP)
    np.testing.assert_array_equal(scores, expected)


# --- inverted lists ---


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nlist", [1, 7, 64, 256, 257, 300])
def test_inverted_lists_give_the_results_of_the_flat_quantizer(nlist: int, metric: str) -> None:
    flat = make_pq_case(PQBuilder(), metric=metric, documents=400)
    lists = replace(flat, builder=IVFPQBuilder(nlist=nlist))
    scores, rows = lists.build().search(flat.queries, TOP)
    expected_scores, expected_rows = flat.build().search(flat.queries, TOP)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-5 * np.abs(expected_scores).max())


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("nlist", [1, 7, 64, 300])
def test_all_lists_are_probed(nlist: int, rotated: bool) -> None:
    built = make_pq_case(IVFPQBuilder(nlist=nlist), rotated=rotated).build()
    inner = unwrap(built)
    assert (inner.nprobe, inner.nlist, inner.quantizer.ntotal) == (nlist, nlist, nlist)


def test_all_lists_are_probed_after_reading(tmp_path: Path) -> None:
    faiss.write_index(make_pq_case(IVFPQBuilder(nlist=7)).build(), str(tmp_path / "index"))
    read = faiss.read_index(str(tmp_path / "index"))
    assert unwrap(read).nprobe == 7


def test_documents_are_spread_evenly_over_the_lists() -> None:
    built = make_pq_case(IVFPQBuilder(nlist=7)).build()
    sizes = [unwrap(built).invlists.list_size(number) for number in range(7)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("metric", "family"), [("inner_product", "IndexFlatIP"), ("l2", "IndexFlatL2")])
def test_coarse_quantizer_has_the_metric_of_the_index(metric: str, family: str) -> None:
    """A GPU takes the coarse distance as it comes: another metric there gives wrong scores (FAISS rule)."""
    built = make_pq_case(IVFPQBuilder(), metric=metric).build()
    assert type(faiss.downcast_index(unwrap(built).quantizer)).__name__ == family


def test_no_list_is_refused() -> None:
    with pytest.raises(InputError, match="nlist must be at least 1, got 0"):
        IVFPQBuilder(nlist=0)


# --- faulty input ---


@pytest.mark.parametrize(
    ("name", "export"),
    [
        ("flat", ProductCodebooks(codebooks=torch.zeros(M, 16, S))),
        ("pq", FlatVectors(dim=D)),
        ("ivfpq", FlatVectors(dim=D)),
    ],
)
def test_export_that_a_family_cannot_carry_is_refused(name: str, export: FaissExport) -> None:
    fault = rf"an index of kind '{name}' cannot carry {type(export).__name__}\. Choose --index\.kind auto"
    with pytest.raises(InputError, match=fault):
        BUILDERS[name]().build(export, np.zeros((3, 4 * D), dtype=np.uint8))


@pytest.mark.parametrize("length", [15, 17])
def test_array_of_another_length_than_faiss_needs_is_caught(length: int) -> None:
    pq = faiss.ProductQuantizer(D, M, 4)
    with pytest.raises(AssertionError, match=f"out of bounds: {length} values for 16"):
        set_vector(pq.centroids, np.zeros(length, dtype=np.float32), 16)


@pytest.mark.parametrize("codewords", [12, 255])
@pytest.mark.parametrize("builder", [PQBuilder(), IVFPQBuilder()], ids=repr)
def test_codebook_whose_size_is_no_power_of_two_is_refused(builder: IndexBuilder, codewords: int) -> None:
    """FAISS itself checks no length and would read shifted codewords, or beyond the end."""
    export = ProductCodebooks(codebooks=torch.randn(M, codewords, S))
    code_size = (M * (codewords.bit_length() - 1) + 7) // 8
    with pytest.raises(InputError, match=rf"FAISS needs 2\*\*nbits codewords a codebook.*got {codewords}\."):
        builder.build(export, np.zeros((3, code_size), dtype=np.uint8))


@pytest.mark.parametrize("builder", [PQBuilder(), IVFPQBuilder()], ids=repr)
def test_codes_of_another_width_are_refused(builder: IndexBuilder) -> None:
    case = make_pq_case(builder)
    with pytest.raises(InputError, match=r"codes must be uint8 of shape \(n, 4\).*of shape \(3, 5\)"):
        builder.build(case.export, np.zeros((3, M + 1), dtype=np.uint8))


def test_rotation_of_another_dimension_is_refused() -> None:
    case = make_pq_case(PQBuilder())
    export = replace(case.export, rotation=torch.eye(D - 1))
    with pytest.raises(InputError, match=r"rotation must have shape \(16, 16\), got \(15, 15\)"):
        PQBuilder().build(export, case.packed)

"""Every form of index holds the codes it was given, and scores as the model does, or nearly, as it says.

Oracles are NumPy in float64 (`decode`, `exact_scores`), independent of heads and builders.

Shapes: n documents, q queries, D dimensions, M codebooks, K codewords, S = D // M sub-dimensions, J lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import faiss
import numpy as np
import pytest
import torch
from faiss.contrib.inspect_tools import get_invlist

from index import IndexConfig
from index.builders import BUILDERS, FaissIndex, IndexBuilder, inverted_file, probing_all, search_index
from index.config import Kind
from index.matrix import matrix, matrix_table
from retriever import InputError
from retriever.heads import (
    AdditiveCodebooks,
    CoarseAdditiveCodebooks,
    CoarseFlatVectors,
    CoarseProductCodebooks,
    FaissExport,
    FlatVectors,
    ProductCodebooks,
    pack_codes,
    pack_list_numbers,
)

ROOT = Path(__file__).parents[2]
N, QUERIES, TOP, J, S = 400, 12, 20, 6, 4
SEEDS = (0, 1, 2)
CODEBOOKS = {0: 4, 1: 5, 2: 8}  # M by seed: even, odd, a multiple of 8
METRICS = ("inner_product", "l2")

# kind, bits of a code, family of export, options
FORMS: list[tuple[str, int, str, dict[str, Any]]] = [
    ("flat", 32, "flat", {}),
    ("sq8", 32, "flat", {}),
    ("sq4", 32, "flat", {}),
    ("hnsw", 32, "flat", {}),
    ("hnsw_sq8", 32, "flat", {}),
    ("ivfflat", 32, "coarse flat", {}),
    *[("pq", bits, "product", {}) for bits in (4, 6, 8)],
    *[("ivfpq", bits, "product", {"nlist": 3}) for bits in (4, 8)],
    *[("ivfpq", bits, "coarse product", {}) for bits in (4, 6, 8)],
    *[("pq_fastscan", 4, "product", {"refine": refine}) for refine in (False, True)],
    *[("ivfpq_fastscan", 4, "coarse product", {"refine": refine}) for refine in (False, True)],
    *[("rq", bits, "additive", {}) for bits in (4, 5, 8)],
    *[("ivfrq", bits, "coarse additive", {}) for bits in (4, 5, 8)],
    *[("rq_fastscan", 4, "additive", {"refine": refine}) for refine in (False, True)],
    *[("ivfrq_fastscan", 4, "coarse additive", {"refine": refine}) for refine in (False, True)],
]
INNER_PRODUCT_ONLY = ("rq_fastscan", "ivfrq_fastscan")
REFUSED = [(kind, "l2") for kind in INNER_PRODUCT_ONLY]


@dataclass(frozen=True)
class Case:
    """What a form is given, and what comes out of float64: decoded vectors (n, D), model scores (q, n)."""

    builder: IndexBuilder
    export: FaissExport
    packed: np.ndarray
    queries: np.ndarray
    decoded: np.ndarray
    exact: np.ndarray

    def build(self, rows: np.ndarray | None = None) -> FaissIndex:
        return self.builder.build(self.export, self.packed if rows is None else self.packed[rows])

    def search(self, built: FaissIndex, k: int = TOP) -> tuple[np.ndarray, np.ndarray]:
        with probing_all(built):
            return search_index(built, self.queries, k)

    @property
    def tolerance(self) -> float:
        return 1e-5 * max(1.0, np.abs(self.exact).max())

    def overlap(self, rows: np.ndarray) -> float:
        """Share of the best documents that were returned; equal scores may stand for each other."""
        best = -np.sort(-self.exact, axis=1)[:, rows.shape[1] - 1]
        found = np.take_along_axis(self.exact, rows, axis=1)
        return float((found >= best[:, None] - self.tolerance).mean())


def exact_scores(queries: np.ndarray, vectors: np.ndarray, metric: str) -> np.ndarray:
    q = queries.astype(np.float64)
    if metric == "inner_product":
        return q @ vectors.T
    return 1 - ((q[:, None] - vectors[None]) ** 2).sum(-1) / 2


def nearest(vectors: np.ndarray, words: np.ndarray) -> np.ndarray:
    return ((vectors[:, None] - words[None]) ** 2).sum(-1).argmin(1)


def clustered(random: np.random.Generator, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return documents (n, D) and queries (q, D) around 40 centres, with more spread than numbers to hide ties."""
    centres = random.normal(size=(40, dim))
    vectors = centres[random.integers(40, size=N)] + 0.6 * random.normal(size=(N, dim))
    queries = vectors[random.integers(N, size=QUERIES)] + 0.4 * random.normal(size=(QUERIES, dim))
    return vectors, queries.astype(np.float32)


def quantize(
    random: np.random.Generator, z: np.ndarray, family: str, books: int, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codebooks, codes (n, M) and decoded vectors; codewords are sampled sub-vectors, slightly moved."""
    words, size = [], 2**bits
    if "product" in family:
        parts = z.reshape(N, books, S)
        for m in range(books):
            words.append(parts[random.integers(N, size=size), m] + 0.01 * random.normal(size=(size, S)))
        codebooks = np.stack(words).astype(np.float32)
        codes = np.stack([nearest(parts[:, m], codebooks[m]) for m in range(books)], 1)
        return codebooks, codes, np.hstack([codebooks[m][codes[:, m]] for m in range(books)]).astype(float)
    rest, codes = z.copy(), []
    for _ in range(books):
        book = (rest[random.integers(N, size=size)] * 0.7).astype(np.float32)
        codes.append(nearest(rest, book))
        rest = rest - book[codes[-1]]
        words.append(book)
    return np.stack(words), np.stack(codes, 1), z - rest


def make_case(
    kind: str,
    bits: int,
    family: str,
    options: dict[str, Any],
    *,
    metric: str = "inner_product",
    rotated: bool = False,
    seed: int = 0,
) -> Case:
    random = np.random.default_rng(seed)
    books = CODEBOOKS[seed]
    dim = books * S
    vectors, queries = clustered(random, dim)
    builder = BUILDERS[kind](**options)
    if family == "flat":
        stored = vectors.astype(np.float32)
        decoded = stored.astype(np.float64)
        export: FaissExport = FlatVectors(dim=dim, metric=metric)
        exact = exact_scores(queries, decoded, metric)
        return Case(builder, export, stored.view(np.uint8), queries, decoded, exact)
    if family == "coarse flat":
        stored = vectors.astype(np.float32)
        centroids = stored[random.choice(N, J, replace=False)]
        lists = nearest(stored, centroids)
        export = CoarseFlatVectors(dim=dim, metric=metric, centroids=torch.from_numpy(centroids))
        packed = np.hstack([pack_list_numbers(lists, J), stored.view(np.uint8)])
        decoded = stored.astype(np.float64)
        return Case(builder, export, packed, queries, decoded, exact_scores(queries, decoded, metric))
    rotation = np.linalg.qr(random.normal(size=(dim, dim)))[0].astype(np.float32) if rotated else np.eye(dim)
    z = vectors @ rotation.astype(np.float64).T
    centroids = z[random.choice(N, J, replace=False)].astype(np.float32)
    lists = nearest(z, centroids)
    base = centroids[lists].astype(np.float64) if "coarse" in family else np.zeros_like(z)
    codebooks, codes, residuals = quantize(random, z - base, family, books, bits)
    decoded = np.linalg.solve(rotation.astype(np.float64), (base + residuals).T).T
    arrays: dict[str, Any] = {"codebooks": torch.from_numpy(codebooks), "metric": metric}
    arrays["rotation"] = torch.from_numpy(rotation) if rotated else None
    packed = pack_codes(torch.from_numpy(codes), bits)
    if "coarse" in family:
        arrays["centroids"] = torch.from_numpy(centroids)
        packed = np.hstack([pack_list_numbers(lists, J), packed])
    export = {
        "product": ProductCodebooks,
        "coarse product": CoarseProductCodebooks,
        "additive": AdditiveCodebooks,
        "coarse additive": CoarseAdditiveCodebooks,
    }[family](**arrays)
    return Case(builder, export, packed, queries, decoded, exact_scores(queries, decoded, metric))


def cells() -> Iterator[Any]:
    """Yield the arguments of every case: form, metric, rotated or not, seed."""
    for kind, bits, family, options in FORMS:
        for metric in METRICS:
            for rotated in (False, True):
                if (kind, metric) in REFUSED or (rotated and "flat" in family):
                    continue
                for seed in SEEDS:
                    words = [kind, family, f"{bits}bits", metric, *map(str, options.values())]
                    name = "-".join([*words, "rotated" if rotated else "plain", str(seed)])
                    arguments = (kind, bits, family, options, metric, rotated, seed)
                    yield pytest.param(arguments, id=name.replace(" ", "_"))


MADE: dict[str, tuple[Case, FaissIndex]] = {}


@pytest.fixture
def made(request: pytest.FixtureRequest) -> tuple[Case, FaissIndex]:
    """A case and its index, built once for all tests that only read it."""
    key = repr(request.param)
    if key not in MADE:
        kind, bits, family, options, metric, rotated, seed = request.param
        case = make_case(kind, bits, family, options, metric=metric, rotated=rotated, seed=seed)
        MADE[key] = (case, case.build())
    return MADE[key]


every_cell = pytest.mark.parametrize("made", list(cells()), indirect=True)
every_form = pytest.mark.parametrize(
    "form",
    FORMS,
    ids=lambda form: f"{form[0]}-{form[1]}-{form[2]}-{list(form[3].values())}".replace(" ", "_"),
)
Made = tuple[Case, FaissIndex]


def inside(built: FaissIndex) -> FaissIndex:
    """Return the index behind a rotation: a view, which dies with `built`."""
    return faiss.downcast_index(built.index) if isinstance(built, faiss.IndexPreTransform) else built


# --- scores ---


def test_every_form_is_tested_here() -> None:
    # FAISS holds only the first stage of a cascade: test_decoders.py and test_cascade.py
    assert {form[0] for form in FORMS} == set(BUILDERS) - {"cascade"}


@every_cell
def test_scores_are_the_models_or_the_overlap_is_what_the_form_says(made: Made) -> None:
    case, built = made
    scores, rows = case.search(built)
    expected = np.take_along_axis(case.exact, rows, axis=1)
    if case.builder.exact:
        assert case.overlap(rows) == 1
    assert case.overlap(rows) >= case.builder.least_overlap
    if case.builder.exact_scores:
        np.testing.assert_allclose(scores, expected, rtol=0, atol=case.tolerance)
    else:
        spread = 0.5 if case.builder.kind == "sq4" else 0.1
        assert np.abs(scores - expected).max() < spread * case.exact.std()


@every_cell
def test_scores_fall(made: Made) -> None:
    case, built = made
    assert (np.diff(case.search(built)[0], axis=1) <= 0).all()


@every_cell
def test_every_document_is_returned_under_its_own_row(made: Made) -> None:
    case, built = made
    if "hnsw" in case.builder.kind:
        _, rows = case.search(built, 100)
        assert all(len(set(row)) == 100 for row in rows.tolist())
    else:
        _, rows = case.search(built, N)
        assert all(sorted(row) == list(range(N)) for row in rows.tolist())


# --- codes ---


@every_cell
def test_vectors_inside_are_those_of_the_codes(made: Made) -> None:
    case, built = made
    lists = inverted_file(built)
    if lists is not None and lists.direct_map.no():
        lists.make_direct_map()
    found = built.reconstruct_n(0, N)
    width = case.decoded.max(0) - case.decoded.min(0)
    rounding = {"sq8": width / 255, "hnsw_sq8": width / 255, "sq4": width / 15}.get(case.builder.kind, 0)
    assert (np.abs(found - case.decoded) <= rounding + 1e-5 * np.abs(case.decoded).max()).all()


def first_bytes(built: FaissIndex, size: int) -> np.ndarray:
    """Return the first bytes of each code in a form that stores codes as rows, (n, size)."""
    inner, lists = inside(built), inverted_file(built)
    if lists is None:
        return faiss.vector_to_array(inner.codes).reshape(N, -1)[:, :size]
    found = np.empty((N, size), dtype=np.uint8)
    for number in range(lists.nlist):
        ids, codes = get_invlist(lists.invlists, number)
        found[ids] = codes.reshape(len(ids), -1)[:, :size]
    return found


@pytest.mark.parametrize(
    "made",
    [cell for cell in cells() if cell.values[0][0] in ("flat", "ivfflat", "pq", "ivfpq", "rq", "ivfrq")],
    indirect=True,
)
def test_codes_inside_are_ours_byte_for_byte(made: Made) -> None:
    """Byte m of a code, before the bits of a norm begin."""
    case, built = made
    lists = CoarseFlatVectors | CoarseProductCodebooks | CoarseAdditiveCodebooks
    prefix = 1 if isinstance(case.export, lists) else 0
    ours = case.packed[:, prefix:]
    if isinstance(case.export, AdditiveCodebooks):  # a norm may begin within the last byte
        bits = case.export.codebooks.shape[0] * (case.export.codebooks.shape[1].bit_length() - 1)
        ours = ours[:, : bits // 8]
    np.testing.assert_array_equal(first_bytes(built, ours.shape[1]), ours)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["ivfpq_fastscan", "ivfrq_fastscan"])
def test_a_fastscan_list_holds_the_documents_that_the_head_put_there(kind: str, seed: int) -> None:
    case = make_case(kind, 4, "coarse product" if "pq" in kind else "coarse additive", {}, seed=seed)
    built = case.build()
    lists = inverted_file(built)
    for number in range(J):
        size = lists.invlists.list_size(number)
        ids = faiss.rev_swig_ptr(lists.invlists.get_ids(number), size)
        assert ids.tolist() == (case.packed[:, 0] == number).nonzero()[0].tolist()


@pytest.mark.parametrize("made", [cell for cell in cells() if "hnsw" not in cell.values[0][0]], indirect=True)
def test_documents_in_another_order_give_the_same_scores(made: Made) -> None:
    """Except in a graph, which grows in the order of the documents."""
    case, built = made
    order = np.random.default_rng(7).permutation(N)
    scores, rows = case.search(built)
    others, moved = case.search(case.build(order))
    np.testing.assert_allclose(others, scores, rtol=0, atol=case.tolerance)
    # documents of equal scores may stand for each other
    assert case.overlap(order[moved]) == case.overlap(rows) or not case.builder.exact_scores


# --- files ---


@every_cell
def test_index_read_from_its_file_gives_identical_results(made: Made, tmp_path: Path) -> None:
    case, built = made
    faiss.write_index(built, str(tmp_path / "index"))
    read = faiss.read_index(str(tmp_path / "index"))
    assert type(read) is type(built)
    for ours, theirs in zip(case.search(read), case.search(built), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@every_form
@pytest.mark.parametrize("documents", [1, 31, 33])
def test_few_documents_are_enough(form: tuple[str, int, str, dict[str, Any]], documents: int) -> None:
    case = make_case(*form)
    built = case.build(np.arange(documents))
    scores, rows = case.search(built, 5)
    assert built.ntotal == documents
    assert (rows < documents).all()
    assert (rows >= 0).sum() == QUERIES * min(5, documents)
    assert np.isneginf(scores[rows < 0]).all()


@every_form
def test_index_outlives_what_it_was_built_from(form: tuple[str, int, str, dict[str, Any]]) -> None:
    case = make_case(*form)
    packed = case.packed.copy()
    built = case.builder.build(case.export, packed)
    before = case.search(built)
    packed[:] = 0
    del packed
    for ours, theirs in zip(case.search(built), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- the same codes, built in another way ---


def as_additive(export: ProductCodebooks) -> AdditiveCodebooks:
    """Return product codebooks as additive ones: codewords that are zero outside their sub-space."""
    books, words, width = export.codebooks.shape
    whole = torch.zeros(books, words, books, width)
    for m in range(books):
        whole[m, :, m] = export.codebooks[m]
    shared = {
        "codebooks": whole.flatten(2),
        "rotation": export.rotation,
        "metric": export.metric,
    }
    if isinstance(export, CoarseProductCodebooks):
        return CoarseAdditiveCodebooks(**shared, centroids=export.centroids)
    return AdditiveCodebooks(**shared)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("kind", "other", "family", "metric"),
    [
        ("pq", "rq", "product", "inner_product"),
        ("pq", "rq", "product", "l2"),
        ("pq_fastscan", "rq_fastscan", "product", "inner_product"),
        ("ivfpq", "ivfrq", "coarse product", "inner_product"),
        ("ivfpq", "ivfrq", "coarse product", "l2"),
        ("ivfpq_fastscan", "ivfrq_fastscan", "coarse product", "inner_product"),
    ],
)
def test_product_codebooks_written_as_additive_ones_give_the_same_scores(
    kind: str, other: str, family: str, metric: str, rotated: bool, seed: int
) -> None:
    case = make_case(kind, 4, family, {}, metric=metric, rotated=rotated, seed=seed)
    twin = replace(case, builder=BUILDERS[other](), export=as_additive(case.export))
    scores, _ = case.search(case.build())
    others, _ = twin.search(twin.build())
    # sums of the same rounded tables, but the tables' float32 values differ in the last bit before rounding
    step = 0.0 if case.builder.exact else 0.02 * case.exact.std()
    np.testing.assert_allclose(others, scores, rtol=0, atol=case.tolerance + step)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("metric", METRICS)
def test_fastscan_of_our_codes_is_faisss_own_of_the_decoded_vectors(metric: str, seed: int) -> None:
    case = make_case("pq_fastscan", 4, "product", {}, metric=metric, seed=seed)
    own = faiss.IndexPQFastScan(case.decoded.shape[1], CODEBOOKS[seed], 4, inside(case.build()).metric_type)
    faiss.copy_array_to_vector(case.export.codebooks.numpy().ravel(), own.pq.centroids)
    own.is_trained = True
    own.add(case.decoded.astype(np.float32))
    for ours, theirs in zip(case.search(case.build()), case.search(own), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "name"), [("sq8", "QT_8bit"), ("sq4", "QT_4bit")])
def test_measured_ranges_are_those_that_faiss_finds_in_the_vectors(
    kind: str, name: str, metric: str, seed: int
) -> None:
    case = make_case(kind, 32, "flat", {}, metric=metric, seed=seed)
    built, vectors = case.build(), case.decoded.astype(np.float32)
    own = faiss.IndexScalarQuantizer(
        vectors.shape[1], getattr(faiss.ScalarQuantizer, name), built.metric_type
    )
    own.train(vectors)
    own.add(vectors)
    for vector in ("sq.trained", "codes"):
        owner, field = (built.sq, own.sq) if vector == "sq.trained" else (built, own)
        part = vector.split(".")[-1]
        np.testing.assert_array_equal(
            faiss.vector_to_array(getattr(owner, part)), faiss.vector_to_array(getattr(field, part))
        )


@pytest.mark.parametrize("kind", ["sq8", "sq4", "hnsw_sq8"])
def test_a_dimension_of_one_value_is_kept(kind: str) -> None:
    case = make_case(kind, 32, "flat", {})
    vectors = case.decoded.astype(np.float32)
    vectors[:, 3] = 1.5
    built = BUILDERS[kind]().build(case.export, vectors.view(np.uint8))
    np.testing.assert_allclose(built.reconstruct_n(0, N)[:, 3], 1.5, rtol=1e-6)


# --- lists ---

IN_LISTS = [form for form in FORMS if "coarse" in form[2] and form[1] == 4]
every_list_form = pytest.mark.parametrize("form", IN_LISTS, ids=lambda form: f"{form[0]}-{form[3]}")


@pytest.mark.parametrize(
    ("form", "metric"),
    [(form, metric) for form in IN_LISTS for metric in METRICS if (form[0], metric) not in REFUSED],
    ids=str,
)
def test_coarse_quantizer_has_metric_and_centroids_and_a_search_its_default_probes(
    form: tuple[str, int, str, dict[str, Any]], metric: str
) -> None:
    case = make_case(*form, metric=metric, rotated=True)
    built = case.build()
    lists = inverted_file(built)
    quantizer = faiss.downcast_index(lists.quantizer)
    assert type(quantizer) is {"inner_product": faiss.IndexFlatIP, "l2": faiss.IndexFlatL2}[metric]
    tables = form[0] == "ivfrq" and metric == "inner_product"  # for every list
    probed = round(J**0.5) if tables else J  # N documents in all
    assert (quantizer.ntotal, lists.nlist, lists.nprobe) == (J, J, probed)
    np.testing.assert_array_equal(quantizer.reconstruct_n(0, J), case.export.centroids.numpy())


@every_list_form
def test_a_search_visits_the_lists_whose_centroids_score_best(
    form: tuple[str, int, str, dict[str, Any]],
) -> None:
    case = replace(make_case(*form), builder=BUILDERS[form[0]](**form[3], nprobe=2))
    built = case.build()
    _, rows = search_index(built, case.queries, N)
    near = np.argsort(-(case.queries @ case.export.centroids.numpy().T), axis=1)[:, :2]
    for found, visited in zip(rows, near, strict=True):
        expected = np.isin(case.packed[:, 0], visited).nonzero()[0]
        assert sorted(found[found >= 0].tolist()) == expected.tolist()


@pytest.mark.parametrize("kind", ["ivfpq", "ivfpq_fastscan"])
def test_the_precomputed_table_is_that_of_the_codebooks(kind: str) -> None:
    """FAISS notices no stale table: computing it again must change nothing."""
    case = make_case(kind, 4, "coarse product", {}, metric="l2")
    built = case.build()
    before = case.search(built)
    assert built.use_precomputed_table == 1
    table = faiss.vector_to_array(built.precomputed_table).copy()
    built.precompute_table()
    np.testing.assert_array_equal(faiss.vector_to_array(built.precomputed_table), table)
    for ours, theirs in zip(case.search(built), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("num_lists", [1, 2, 3, 256, 257, 300])
@pytest.mark.parametrize("kind", ["ivfpq", "ivfpq_fastscan", "ivfrq", "ivfrq_fastscan"])
def test_list_numbers_of_every_width_are_kept(kind: str, num_lists: int) -> None:
    """None, one or two bytes in a row; 1 to 9 bits in a second stage. Some lists are empty."""
    random = np.random.default_rng(0)
    numbers = random.integers(num_lists, size=N)
    codes = torch.from_numpy(random.integers(16, size=(N, 4)))
    product = CoarseProductCodebooks(
        codebooks=torch.from_numpy(random.normal(size=(4, 16, S)).astype(np.float32)),
        centroids=torch.from_numpy(random.normal(size=(num_lists, 16)).astype(np.float32)),
    )
    export = as_additive(product) if "rq" in kind else product
    packed = np.hstack([pack_list_numbers(numbers, num_lists), pack_codes(codes, 4)])
    words = [product.codebooks.numpy()[m][codes[:, m]] for m in range(4)]
    expected = product.centroids.numpy()[numbers] + np.hstack(words)
    for options in [{}, {"refine": True}] if "fastscan" in kind else [{}]:
        built = BUILDERS[kind](**options).build(export, packed)
        inverted_file(built).make_direct_map()
        np.testing.assert_allclose(built.reconstruct_n(0, N), expected, rtol=0, atol=1e-5)


# --- the second stage ---


REFINED = [form for form in FORMS if form[3].get("refine")]
every_refined = pytest.mark.parametrize("form", REFINED, ids=lambda form: form[0])


@every_refined
def test_k_factor_is_kept_in_the_file(form: tuple[str, int, str, dict[str, Any]], tmp_path: Path) -> None:
    case = replace(make_case(*form), builder=BUILDERS[form[0]](refine=True, k_factor=7))
    faiss.write_index(case.build(), str(tmp_path / "index"))
    assert faiss.read_index(str(tmp_path / "index")).k_factor == 7


@every_refined
def test_all_documents_scored_again_are_the_models_order(form: tuple[str, int, str, dict[str, Any]]) -> None:
    case = replace(make_case(*form), builder=BUILDERS[form[0]](refine=True, k_factor=N / TOP))
    assert case.overlap(case.search(case.build())[1]) == 1


@every_refined
@pytest.mark.parametrize("seed", SEEDS)
def test_the_second_stage_finds_at_least_what_the_scan_alone_finds(
    form: tuple[str, int, str, dict[str, Any]], seed: int
) -> None:
    refined = make_case(*form, seed=seed)
    scan = replace(refined, builder=BUILDERS[form[0]]())
    found = [case.overlap(case.search(case.build())[1]) for case in (scan, refined)]
    assert found[1] >= found[0]


@pytest.mark.parametrize("k_factor", [0.5, 0.0, float("nan")])
def test_a_short_list_shorter_than_k_is_refused(k_factor: float) -> None:
    with pytest.raises(InputError, match=rf"k_factor must be at least 1, got {k_factor}"):
        BUILDERS["pq_fastscan"](refine=True, k_factor=k_factor)


# --- graphs ---


def test_a_graph_searched_longer_finds_more() -> None:
    case = make_case("hnsw", 32, "flat", {})
    found = [
        case.overlap(case.search(BUILDERS["hnsw"](hnsw_m=4, ef_construction=8, ef_search=ef).build(
            case.export, case.packed
        ))[1])
        for ef in (1, N)
    ]  # fmt: skip
    assert found[0] < 0.9 < found[1]


@pytest.mark.parametrize("kind", ["hnsw", "hnsw_sq8"])
def test_the_options_of_a_graph_are_kept_in_the_file(kind: str, tmp_path: Path) -> None:
    case = make_case(kind, 32, "flat", {"hnsw_m": 8, "ef_construction": 50, "ef_search": 33})
    faiss.write_index(case.build(), str(tmp_path / "index"))
    read = faiss.read_index(str(tmp_path / "index"))
    graph = read.hnsw
    assert (graph.nb_neighbors(1), graph.efConstruction, graph.efSearch) == (8, 50, 33)


@pytest.mark.parametrize(
    ("option", "value", "least"), [("hnsw_m", 1, 2), ("ef_construction", 0, 1), ("ef_search", -1, 1)]
)
@pytest.mark.parametrize("kind", ["hnsw", "hnsw_sq8"])
def test_an_option_without_which_there_is_no_graph_is_refused(
    kind: str, option: str, value: int, least: int
) -> None:
    with pytest.raises(InputError, match=f"{option} must be at least {least}, got {value}"):
        BUILDERS[kind](**{option: value})


# --- what is refused ---

FASTSCAN = [form for form in FORMS if form[0].endswith("fastscan") and not form[3]["refine"]]


@pytest.mark.parametrize("form", FASTSCAN, ids=lambda form: form[0])
@pytest.mark.parametrize("bits", [5, 8])
def test_fastscan_of_other_than_4_bits_is_refused_with_what_to_do(
    form: tuple[str, int, str, dict[str, Any]], bits: int
) -> None:
    kind, _, family, options = form
    case = make_case(kind, bits, family, options)
    plain = kind.removesuffix("_fastscan")
    fault = rf"'{kind}' needs codebooks of 4 bits, got {bits}\. .*codebook_bits: 4, or .*kind {plain}\."
    with pytest.raises(InputError, match=fault):
        case.build()


@pytest.mark.parametrize("kind", INNER_PRODUCT_ONLY)
def test_fastscan_of_additive_codes_by_squared_distance_is_refused(kind: str) -> None:
    family = "coarse additive" if kind.startswith("ivf") else "additive"
    case = make_case(kind, 4, family, {}, metric="l2")
    with pytest.raises(InputError, match=rf"'{kind}' cannot carry metric 'l2': .* without the query's norm"):
        case.build()


@every_form
@pytest.mark.parametrize("change", [-1, 1])
def test_codes_of_another_width_are_refused(form: tuple[str, int, str, dict[str, Any]], change: int) -> None:
    case = make_case(*form)
    width = case.packed.shape[1]
    with pytest.raises(
        InputError, match=rf"uint8 of shape \(n, {width}\).*got uint8 of shape \(3, {width + change}\)"
    ):
        case.builder.build(case.export, np.zeros((3, width + change), dtype=np.uint8))


@every_form
def test_codes_that_are_no_bytes_are_refused(form: tuple[str, int, str, dict[str, Any]]) -> None:
    case = make_case(*form)
    with pytest.raises(InputError, match=r"must be uint8 of shape .*, got int64"):
        case.builder.build(case.export, case.packed.astype(np.int64))


@every_list_form
def test_a_list_number_that_does_not_exist_is_refused(form: tuple[str, int, str, dict[str, Any]]) -> None:
    case = make_case(*form)
    case.packed[-1, 0] = J
    with pytest.raises(InputError, match=f"list numbers must be below {J}, the lists of the head, got {J}"):
        case.build()


@every_list_form
@pytest.mark.parametrize("shape", [(J, 15), (0, 16), (J, 17)])
def test_centroids_of_another_shape_are_refused(
    form: tuple[str, int, str, dict[str, Any]], shape: tuple[int, int]
) -> None:
    case = make_case(*form)
    export = replace(case.export, centroids=torch.zeros(shape))
    with pytest.raises(InputError, match=r"centroids must have shape \(.*\), got \(\d+, \d+\)"):
        case.builder.check(export)


CODED = [form for form in FORMS if form[2] != "flat" and form[1] == 4]
every_coded = pytest.mark.parametrize("form", CODED, ids=lambda form: f"{form[0]}-{form[3]}")


@every_coded
@pytest.mark.parametrize("codewords", [0, 1, 12, 15, 17])
def test_a_codebook_that_is_short_or_long_is_refused(
    form: tuple[str, int, str, dict[str, Any]], codewords: int
) -> None:
    """FAISS searches with codewords from beyond the end of a short codebook."""
    case = make_case(*form)
    books, _, width = case.export.codebooks.shape
    export = replace(case.export, codebooks=torch.zeros(books, codewords, width))
    with pytest.raises(InputError, match=rf"FAISS needs 2\*\*nbits codewords a codebook.*got {codewords}\."):
        case.builder.check(export)


@every_coded
def test_a_rotation_of_another_dimension_is_refused(form: tuple[str, int, str, dict[str, Any]]) -> None:
    case = make_case(*form)
    with pytest.raises(InputError, match=r"rotation must have shape \(16, 16\), got \(15, 15\)"):
        case.builder.check(replace(case.export, rotation=torch.eye(15)))


@pytest.mark.parametrize("form", [form for form in CODED if form[0] not in INNER_PRODUCT_ONLY], ids=str)
def test_a_rotation_that_changes_distances_is_refused(form: tuple[str, int, str, dict[str, Any]]) -> None:
    case = make_case(*form, metric="l2", rotated=True)
    with pytest.raises(InputError, match="rotation that is not orthonormal changes squared distances"):
        case.builder.check(replace(case.export, orthonormal=False))


@every_coded
def test_a_rotation_that_is_not_orthonormal_carries_inner_products(
    form: tuple[str, int, str, dict[str, Any]],
) -> None:
    case = make_case(*form, rotated=True)
    scaled = replace(case.export, rotation=case.export.rotation * 2, orthonormal=False)
    _, rows = case.search(case.builder.build(scaled, case.packed))
    # codes stand for A^T y, so scores are twice as large and the order is the same
    assert case.overlap(rows) >= case.builder.least_overlap


@pytest.mark.parametrize("nprobe", [0, -2])
@pytest.mark.parametrize(
    "kind", [kind for kind, family in BUILDERS.items() if "nprobe" in str(fields(family))]
)
def test_probing_no_list_is_refused(kind: str, nprobe: int) -> None:
    with pytest.raises(InputError, match=f"nprobe must be at least 1, got {nprobe}"):
        BUILDERS[kind](nprobe=nprobe)


# --- configuration ---


def test_every_kind_can_be_configured() -> None:
    assert set(get_args(Kind)) == {"auto", *BUILDERS}


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_builder_knows_its_kind(kind: str) -> None:
    assert BUILDERS[kind].kind == kind


@every_form
def test_configuration_makes_the_builder(form: tuple[str, int, str, dict[str, Any]]) -> None:
    kind, _, _, options = form
    case = make_case(*form)
    assert IndexConfig(kind=kind, **options).builder(case.export) == case.builder


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("product", "pq"),
        ("coarse product", "ivfpq"),
        ("additive", "rq"),
        ("coarse additive", "ivfrq"),
        ("flat", "flat"),
        ("coarse flat", "ivfflat"),
    ],
)
def test_kind_auto_is_exact(family: str, kind: str) -> None:
    case = make_case(kind, 4, family, {})
    builder = IndexConfig().builder(case.export)
    assert (builder.kind, builder.exact) == (kind, True)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"refine": True}, r"index\.refine=True needs index\.kind pq_fastscan or .*, got 'auto'"),
        ({"kind": "pq", "refine": True}, r"index\.refine=True needs .*, got 'pq'"),
        ({"kind": "pq", "ef_search": 5}, r"index\.ef_search=5 needs index\.kind hnsw or hnsw_sq8, got 'pq'"),
        ({"kind": "flat", "hnsw_m": 5}, r"index\.hnsw_m=5 needs index\.kind hnsw or hnsw_sq8, got 'flat'"),
        ({"kind": "pq_fastscan", "nlist": 5}, r"index\.nlist=5 needs index\.kind ivfpq, got 'pq_fastscan'"),
        ({"kind": "pq_fastscan", "k_factor": 9}, r"index\.k_factor=9 needs index\.refine true"),
        ({"kind": "pq_fastscan", "refine": True, "k_factor": 0.5}, r"k_factor must be at least 1, got 0\.5"),
        ({"kind": "hnsw", "ef_search": 0}, r"ef_search must be at least 1, got 0"),
        ({"kind": "ivfrq", "nprobe": 0}, r"nprobe must be at least 1, got 0"),
        ({"kind": "hnswpq"}, r"index\.kind must be one of auto, flat, .*, got 'hnswpq'"),
    ],
)
def test_an_option_that_its_kind_does_not_have_is_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        IndexConfig(**options)


@pytest.mark.parametrize("kind", ["auto", "ivfpq_fastscan", "ivfrq", "ivfrq_fastscan"])
def test_probes_are_of_a_head_with_lists(kind: str) -> None:
    family = "coarse additive" if "rq" in kind else "coarse product"
    case = make_case("ivfpq", 4, family, {})
    assert IndexConfig(kind=kind, nprobe=3).builder(case.export).nprobe == 3


# --- the matrix ---


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_form_carries_something_and_says_how(kind: str) -> None:
    verdicts = {cell.verdict for cell in matrix() if cell.kind == kind} - {"refused"}
    assert verdicts == {"exact" if BUILDERS[kind]().exact else "lossy"}


def test_every_cell_but_an_exact_one_has_its_reason() -> None:
    assert [cell for cell in matrix() if (cell.verdict == "exact") != (not cell.reason)] == []


def test_every_refusal_says_what_to_do() -> None:
    refused = [cell.reason for cell in matrix() if cell.verdict == "refused"]
    assert len(refused) > 100
    assert [reason for reason in refused if not re.search(r"(Choose|Train|choose) ", reason)] == []


@pytest.mark.parametrize("kind", BUILDERS)
def test_least_overlap_and_exactness_agree(kind: str) -> None:
    builder = BUILDERS[kind]()
    assert builder.exact == (builder.least_overlap == 1.0) == (not builder.improvement)


def test_the_page_holds_the_table_that_the_builders_give() -> None:
    page = (ROOT / "docs/forms.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- begin: python -m index\.matrix -->\n(.*)\n<!-- end -->", page, re.S)
    assert found is not None
    assert found[1] == matrix_table()


@pytest.mark.parametrize("kind", BUILDERS)
def test_the_page_describes_every_form_and_its_least_overlap(kind: str) -> None:
    page = (ROOT / "docs/forms.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| `{kind}` \|.*\|$", page, re.M)
    least = BUILDERS[kind]().least_overlap
    assert any(f"| {least:g} |" in row for row in rows)
    assert any(("| CPU, GPU |" if BUILDERS[kind].gpu else "| CPU |") in row for row in rows)

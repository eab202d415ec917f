"""The parity check passes the right index and stops every kind of wrong one.

Shapes: n documents, q queries, D dimensions, M codebooks, K codewords.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from index import ParityError, assert_parity
from index.builders import (
    FaissIndex,
    FlatBuilder,
    HNSWBuilder,
    HNSWSQ8Builder,
    IndexBuilder,
    IVFPQBuilder,
    IVFPQFastScanBuilder,
    PQBuilder,
    PQFastScanBuilder,
    SQ4Builder,
    SQ8Builder,
    inverted_file,
    probing_all,
    search_index,
)
from index.parity import Parity, prove_parity
from retriever.heads import (
    CompressionHead,
    IVFProductQuantizerConfig,
    NoCompressionConfig,
    ProductCodebooks,
    ProductQuantizerConfig,
    pack_codes,
)

D, DOCUMENTS, QUERIES = 16, 300, 20
SEEDS = (0, 1, 2)
every_metric = pytest.mark.parametrize("metric", ["inner_product", "l2"])


@dataclass(frozen=True)
class Case:
    head: CompressionHead
    packed: np.ndarray
    queries: Tensor

    @property
    def export(self) -> ProductCodebooks:
        return self.head.export()


def make_case(seed: int, *, bits: int = 4, metric: str = "l2") -> Case:
    """Return a rotated product quantizer, the codes of random documents, and random queries."""
    generator = torch.Generator().manual_seed(seed)
    head = ProductQuantizerConfig(num_codebooks=4, codebook_bits=bits, metric=metric).build(D)
    with torch.no_grad():
        head.codebooks.copy_(torch.randn(head.codebooks.shape, generator=generator))
        head.rotation.copy_(torch.linalg.qr(torch.randn(D, D, generator=generator)).Q)
    codes = head.encode(torch.randn(DOCUMENTS, D, generator=generator))
    return Case(head, pack_codes(codes, bits), torch.randn(QUERIES, D, generator=generator))


def make_flat_case(seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    head = NoCompressionConfig().build(D)
    codes = head.encode(torch.randn(DOCUMENTS, D, generator=generator))
    return Case(head, pack_codes(codes, 32), torch.randn(QUERIES, D, generator=generator))


def check(case: Case, built: FaissIndex, **options: int) -> float:
    return assert_parity(built, case.head, case.packed, case.queries, **options)


# --- right indexes ---


@every_metric
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("builder", [PQBuilder(), IVFPQBuilder(nlist=3)], ids=repr)
@pytest.mark.parametrize("seed", SEEDS)
def test_right_index_passes(seed: int, builder: IndexBuilder, bits: int, metric: str) -> None:
    case = make_case(seed, bits=bits, metric=metric)
    assert check(case, builder.build(case.export, case.packed)) < 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_right_index_of_uncompressed_vectors_passes(seed: int) -> None:
    case = make_flat_case(seed)
    assert check(case, FlatBuilder().build(case.export, case.packed)) < 1e-5


@every_metric
@pytest.mark.parametrize("seed", SEEDS)
def test_returned_difference_is_the_largest_of_a_score(seed: int, metric: str) -> None:
    case = make_case(seed, metric=metric)
    built = PQBuilder().build(case.export, case.packed)
    scores, rows = built.search(case.queries.numpy(), 10)
    with torch.no_grad():
        codes = faiss.unpack_bitstrings(case.packed, 4, 4)
        vectors = case.head.decode(torch.from_numpy(codes.astype(np.int64))).double().numpy()
    queries = case.queries.double().numpy()
    if metric == "inner_product":
        exact = queries @ vectors.T
    else:
        scores = 1 - scores / 2
        exact = 1 - ((queries[:, None] - vectors[None]) ** 2).sum(-1) / 2
    expected = np.abs(scores - np.take_along_axis(exact, rows, axis=1)).max()
    assert check(case, built) == pytest.approx(expected, rel=1e-6)


def test_more_results_than_documents_are_cut() -> None:
    case = make_case(0)
    few = replace(case, packed=case.packed[:4])
    assert check(few, PQBuilder().build(case.export, few.packed), k=10) < 1e-5


def test_documents_with_equal_codes_pass() -> None:
    case = make_case(0)
    equal = replace(case, packed=np.repeat(case.packed[:5], 60, axis=0))
    assert check(equal, PQBuilder().build(case.export, equal.packed)) < 1e-5


# --- wrong indexes ---


@every_metric
@pytest.mark.parametrize("seed", SEEDS)
def test_codebook_value_changed_after_building_is_found(seed: int, metric: str) -> None:
    case = make_case(seed, metric=metric)
    built = PQBuilder().build(case.export, case.packed)
    inner = faiss.downcast_index(built.index)
    centroids = faiss.vector_to_array(inner.pq.centroids)
    centroids[0] += 2.0  # first dimension of codeword 0 of codebook 0, which a sixteenth of the documents use
    faiss.copy_array_to_vector(centroids, inner.pq.centroids)
    with pytest.raises(ParityError):
        check(case, built)


@every_metric
@pytest.mark.parametrize("seed", SEEDS)
def test_slightly_wrong_codebooks_are_found(seed: int, metric: str) -> None:
    case = make_case(seed, metric=metric)
    wrong = replace(case.export, codebooks=case.export.codebooks * 1.0001)
    with pytest.raises(ParityError, match=r"differ from the model's by \d.*, allowed is"):
        check(case, PQBuilder().build(wrong, case.packed))


@every_metric
@pytest.mark.parametrize("seed", SEEDS)
def test_permuted_codes_are_found(seed: int, metric: str) -> None:
    case = make_case(seed, metric=metric)
    order = torch.randperm(DOCUMENTS, generator=torch.Generator().manual_seed(seed + 100)).numpy()
    with pytest.raises(ParityError):
        check(case, PQBuilder().build(case.export, case.packed[order]))


def test_codes_shifted_by_one_document_are_found() -> None:
    case = make_case(0)
    with pytest.raises(ParityError):
        check(case, PQBuilder().build(case.export, np.roll(case.packed, 1, axis=0)))


def test_codes_with_swapped_codebooks_are_found() -> None:
    case = make_case(0, bits=8)
    with pytest.raises(ParityError):
        check(case, PQBuilder().build(case.export, case.packed[:, [1, 0, 2, 3]]))


@every_metric
@pytest.mark.parametrize("seed", SEEDS)
def test_transposed_rotation_is_found(seed: int, metric: str) -> None:
    case = make_case(seed, metric=metric)
    wrong = replace(case.export, rotation=case.export.rotation.T.contiguous())
    with pytest.raises(ParityError):
        check(case, PQBuilder().build(wrong, case.packed))


def test_left_out_rotation_is_found() -> None:
    case = make_case(0)
    with pytest.raises(ParityError):
        check(case, PQBuilder().build(replace(case.export, rotation=None), case.packed))


@pytest.mark.parametrize(("metric", "other"), [("l2", "inner_product"), ("inner_product", "l2")])
def test_index_of_another_metric_is_found(metric: str, other: str) -> None:
    case = make_case(0, metric=metric)
    with pytest.raises(ParityError):
        check(case, PQBuilder().build(replace(case.export, metric=other), case.packed))


def test_missing_document_is_found() -> None:
    case = make_case(0)
    with pytest.raises(ParityError, match="holds 299 documents instead of 300"):
        check(case, PQBuilder().build(case.export, case.packed[:-1]))


def test_list_that_is_not_probed_is_found() -> None:
    case = make_case(0)
    built = IVFPQBuilder(nlist=3).build(case.export, case.packed)
    faiss.extract_index_ivf(built).nprobe = 1
    with pytest.raises(ParityError, match="missed a better document: row"):
        check(case, built)


class Reordered:
    """An index that returns the first two results the wrong way round."""

    def __init__(self, built: FaissIndex) -> None:
        self.built = built
        self.ntotal, self.metric_type = built.ntotal, built.metric_type

    def search(self, queries: np.ndarray, k: int, params: object = None) -> tuple[np.ndarray, np.ndarray]:
        order = [1, 0, *range(2, k)]
        scores, rows = self.built.search(queries, k)
        return scores[:, order], rows[:, order]


@every_metric
def test_results_out_of_order_are_found(metric: str) -> None:
    case = make_case(0, metric=metric)
    built = PQBuilder().build(case.export, case.packed)
    with pytest.raises(ParityError, match="out of order"):
        check(case, Reordered(built))


def test_score_that_is_not_a_number_is_found() -> None:
    case = make_flat_case(0)
    built = FlatBuilder().build(case.export, case.packed)
    with pytest.raises(ParityError):
        check(replace(case, queries=torch.full((2, D), float("nan"))), built)


# --- forms that approximate ---


def make_lists_case(seed: int, *, metric: str = "l2") -> Case:
    """Return a rotated inverted file of 5 lists, the codes of random documents, and random queries."""
    generator = torch.Generator().manual_seed(seed)
    head = IVFProductQuantizerConfig(
        num_lists=5, num_codebooks=4, codebook_bits=4, rotation="opq", metric=metric
    ).build(D)
    head.coarse.start(torch.randn(1, 5, D, generator=generator))
    head.fine.start(0.5 * torch.randn(head.fine.codewords.shape, generator=generator))
    head.rotate.start(torch.linalg.qr(torch.randn(D, D, generator=generator)).Q)
    codes = head.encode(torch.randn(DOCUMENTS, D, generator=generator))
    return Case(head.eval(), head.pack(codes), torch.randn(QUERIES, D, generator=generator))


PQ_FORMS = [PQFastScanBuilder(), PQFastScanBuilder(refine=True)]
LIST_FORMS = [IVFPQFastScanBuilder(), IVFPQFastScanBuilder(refine=True)]
FLAT_FORMS = [SQ8Builder(), SQ4Builder(), HNSWBuilder(), HNSWSQ8Builder()]
every_lossy = pytest.mark.parametrize("builder", [*PQ_FORMS, *LIST_FORMS, *FLAT_FORMS], ids=repr)


def make_lossy_case(builder: IndexBuilder, seed: int, metric: str = "inner_product") -> Case:
    if builder in PQ_FORMS:
        return make_case(seed, metric=metric)
    return make_lists_case(seed, metric=metric) if builder in LIST_FORMS else make_flat_case(seed)


def prove(builder: IndexBuilder, case: Case, built: FaissIndex | None = None) -> Parity:
    built = built or builder.build(case.export, case.packed)
    with probing_all(built):
        return prove_parity(builder, built, case.head, case.packed, case.queries)


@pytest.mark.parametrize("seed", SEEDS)
def test_proof_of_an_exact_form_is_the_difference_of_its_scores(seed: int) -> None:
    case = make_case(seed)
    built = PQBuilder().build(case.export, case.packed)
    assert prove(PQBuilder(), case) == Parity(difference=check(case, built), overlap=1.0)


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@every_lossy
@pytest.mark.parametrize("seed", SEEDS)
def test_proof_of_a_lossy_form_is_the_overlap_of_its_results(
    seed: int, builder: IndexBuilder, metric: str
) -> None:
    case = make_lossy_case(builder, seed, metric)
    built = builder.build(case.export, case.packed)
    with probing_all(built):
        scores, rows = search_index(built, case.queries.numpy(), 20)
    with torch.no_grad():
        vectors = case.head.decode(case.head.unpack(case.packed)).double().numpy()
    queries = case.queries.double().numpy()
    exact = queries @ vectors.T
    if case.head.metric == "l2":
        exact = 1 - ((queries[:, None] - vectors) ** 2).sum(-1) / 2
    found = np.take_along_axis(exact, rows, axis=1)
    overlap = (found >= -np.sort(-exact, axis=1)[:, 19:20] - 1e-5 * np.abs(found).max()).mean()
    parity = prove(builder, case, built)
    assert parity.overlap == pytest.approx(overlap, abs=1e-9)
    assert parity.difference == pytest.approx(np.abs(scores - found).max(), rel=1e-6)
    assert builder.least_overlap <= parity.overlap <= 1


@every_lossy
@pytest.mark.parametrize("seed", SEEDS)
def test_permuted_codes_of_a_lossy_form_are_found(seed: int, builder: IndexBuilder) -> None:
    case = make_lossy_case(builder, seed)
    order = torch.randperm(DOCUMENTS, generator=torch.Generator().manual_seed(seed + 100)).numpy()
    with pytest.raises(ParityError):
        prove(builder, case, builder.build(case.export, case.packed[order]))


@pytest.mark.parametrize("builder", [*PQ_FORMS, *LIST_FORMS], ids=repr)
def test_left_out_rotation_of_a_lossy_form_is_found(builder: IndexBuilder) -> None:
    case = make_lossy_case(builder, 0)
    with pytest.raises(ParityError):
        prove(builder, case, builder.build(replace(case.export, rotation=None), case.packed))


@pytest.mark.parametrize("builder", [PQ_FORMS[1], LIST_FORMS[1]], ids=repr)
def test_slightly_wrong_codebooks_behind_a_second_stage_are_found(builder: IndexBuilder) -> None:
    case = make_lossy_case(builder, 0)
    wrong = replace(case.export, codebooks=case.export.codebooks * 1.001)
    with pytest.raises(ParityError, match=r"differ from the model's by \d"):
        prove(builder, case, builder.build(wrong, case.packed))


@pytest.mark.parametrize("builder", LIST_FORMS, ids=repr)
def test_list_of_a_lossy_form_that_is_not_probed_is_found(builder: IndexBuilder) -> None:
    case = make_lossy_case(builder, 0)
    built = builder.build(case.export, case.packed)
    inverted_file(built).nprobe = 1
    fault = rf"overlap@20 of an index of kind '{builder.kind}' .* is 0\.\d+, at least {builder.least_overlap} is needed"
    with pytest.raises(ParityError, match=fault):
        prove_parity(builder, built, case.head, case.packed, case.queries)


def test_too_small_an_overlap_says_what_to_do() -> None:
    case = make_flat_case(0)
    builder = HNSWBuilder(hnsw_m=2, ef_construction=2, ef_search=1)
    with pytest.raises(ParityError, match=r"follows a graph .*Raise --index\.ef_search, now 1"):
        prove(builder, case)


@every_lossy
def test_queries_that_are_no_numbers_are_found(builder: IndexBuilder) -> None:
    case = replace(make_lossy_case(builder, 0), queries=torch.full((2, D), float("nan")))
    with pytest.raises(ParityError):
        prove(builder, case)


@every_lossy
def test_missing_document_of_a_lossy_form_is_found(builder: IndexBuilder) -> None:
    case = make_lossy_case(builder, 0)
    with pytest.raises(ParityError, match="holds 299 documents instead of 300"):
        prove(builder, case, builder.build(case.export, case.packed[:-1]))


@every_lossy
def test_few_documents_of_a_lossy_form_pass(builder: IndexBuilder) -> None:
    case = make_lossy_case(builder, 0)
    assert prove(builder, replace(case, packed=case.packed[:3])).overlap == 1

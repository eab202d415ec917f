"""A GPU's rules are told before any work, on real CPU indexes and on planned shapes; no card is needed here.

Shapes: n documents, q queries, D dimensions, L lists, M codebooks, K codewords, S = D // M sub-dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from index.builders import FaissIndex, FlatBuilder, IVFPQBuilder, PQBuilder
from index.gpu import (
    GpuPlan,
    IndexShape,
    plan_gpu,
    shape_of,
    to_gpu,
)
from index.gpu_rules import CODEBOOKS
from retriever import InputError
from retriever.heads import (
    CoarseProductCodebooks,
    FlatVectors,
    ProductCodebooks,
    pack_codes,
    pack_list_numbers,
)

GIB = 1 << 30
N, D, L, M = 300, 32, 5, 8
PLANNED = IndexShape(kind="IndexIVFPQ", d=768, ntotal=1_000_000, nlist=1024, nprobe=32, num_codebooks=48)


def product_export(
    *, metric: str = "inner_product", rotated: bool = False, bits: int = 8
) -> ProductCodebooks:
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q if rotated else None
    codebooks = torch.randn(M, 2**bits, D // M, generator=generator)
    return ProductCodebooks(codebooks=codebooks, rotation=rotation, metric=metric)  # type: ignore[arg-type]


def codes_for(export: ProductCodebooks, rows: int = N) -> torch.Tensor:
    books, codewords, _ = export.codebooks.shape
    return torch.randint(codewords, (rows, books), generator=torch.Generator().manual_seed(1))


def zero_centroids(*, nlist: int = L, bits: int = 8, **options: Any) -> FaissIndex:
    export = product_export(bits=bits, **options)
    return IVFPQBuilder(nlist=nlist).build(export, pack_codes(codes_for(export), bits))


def learned_lists(*, metric: str = "inner_product", by_residual: bool = True) -> FaissIndex:
    generator = torch.Generator().manual_seed(2)
    plain = product_export(metric=metric)
    export = CoarseProductCodebooks(
        codebooks=plain.codebooks,
        metric=plain.metric,
        centroids=torch.randn(L, D, generator=generator),
    )
    lists = torch.randint(L, (N,), generator=generator).numpy()
    packed = np.hstack([pack_list_numbers(lists, L), pack_codes(codes_for(plain), 8)])
    built = IVFPQBuilder(nprobe=3).build(export, packed)
    built.by_residual = by_residual
    return built


def inverted(kind: str, metric: int = faiss.METRIC_L2, **options: Any) -> FaissIndex:
    """Return a filled `faiss.IndexIVF...` over random vectors, trained by FAISS."""
    x = np.random.default_rng(0).standard_normal((N, D), dtype=np.float32)
    quantizer = (faiss.IndexFlatL2 if metric == faiss.METRIC_L2 else faiss.IndexFlatIP)(D)
    quantizer.add(x[:L])
    built = getattr(faiss, kind)(quantizer, D, L, *options.get("arguments", ()), metric)
    built.train(x)
    built.add(x)
    built.referenced_objects = [quantizer]
    return built


def only_reason(plan: GpuPlan) -> str:
    assert len(plan.reasons) == 1, plan.reasons
    return plan.reasons[0]


def classic(shape: Any, **options: Any) -> GpuPlan:
    return plan_gpu(shape, cuvs=False, **options)


# --- what may go to a card ---


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_every_form_that_a_builder_makes_for_a_gpu_is_allowed(metric: str) -> None:
    flat = FlatBuilder().build(
        FlatVectors(dim=D, metric=metric),  # type: ignore[arg-type]
        np.zeros((N, 4 * D), dtype=np.uint8),
    )
    forms = [
        flat,
        zero_centroids(metric=metric),
        zero_centroids(metric=metric, rotated=True),
        learned_lists(metric=metric),
    ]
    assert [classic(form).reasons for form in forms] == [()] * 4


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("IndexIVFFlat", ()), ("IndexIVFScalarQuantizer", (faiss.ScalarQuantizer.QT_8bit,))],
)
def test_other_inverted_files_of_faiss_are_allowed(kind: str, arguments: tuple[int, ...]) -> None:
    assert classic(inverted(kind, arguments=arguments)).possible


def test_an_index_behind_identifiers_and_a_rotation_is_judged_by_its_inside() -> None:
    export = product_export(rotated=True)
    inner = IVFPQBuilder(nlist=L).build(export, pack_codes(codes_for(export, rows=0), 8))
    shape = shape_of(faiss.IndexIDMap2(inner))
    assert (shape.kind, shape.num_codebooks, shape.nlist, shape.transformed) == ("IndexIVFPQ", M, L, True)


@pytest.mark.parametrize(
    ("factory", "remedy"),
    [
        ("PQ8", "ivfpq"),
        ("PQ8x4fs", "4 bits need cuVS"),
        ("IVF5,PQ8x4fs", "4 bits need cuVS"),
        ("RQ4x4", "CPU"),
        ("IVF5,RQ4x4", "CPU"),
        ("LSQ4x4", "CPU"),
        ("HNSW8", "CPU"),
        ("NSG8", "CPU"),
        ("IVF5,RaBitQ", "CPU"),
        ("IVF5,PQ8+8", "refinement"),
        ("SQ8", "CPU"),
        ("IVF5,PQ8,RFlat", "base_index"),
    ],
)
def test_a_form_without_gpu_code_is_refused_by_name_with_a_remedy(factory: str, remedy: str) -> None:
    built = faiss.index_factory(D, factory)
    reason = next(r for r in classic(built).reasons if "no GPU form" in r)
    assert type(faiss.downcast_index(built)).__name__ in reason
    assert remedy in reason


def test_a_form_outside_faiss_is_refused() -> None:
    assert "IndexNew" in only_reason(classic(IndexShape(kind="IndexNew", d=D, ntotal=N)))


def test_half_precision_vectors_go_to_one_card_and_not_to_several() -> None:
    built = faiss.IndexScalarQuantizer(D, faiss.ScalarQuantizer.QT_fp16)
    assert classic(built).possible
    assert "one card" in only_reason(classic(built, cards=2))
    assert "cuvs=False" in only_reason(plan_gpu(built, cuvs=True))


def test_a_metric_that_gpus_lack_is_refused() -> None:
    assert "got metric 2" in only_reason(classic(faiss.IndexFlat(D, faiss.METRIC_L1)))


def test_an_untrained_index_is_refused() -> None:
    quantizer = faiss.IndexFlatL2(D)
    built = faiss.IndexIVFPQ(quantizer, D, L, M, 8)
    assert "is_trained=False" in " ".join(classic(built).reasons)


# --- product quantizers, classic ---


@pytest.mark.parametrize("books", CODEBOOKS)
def test_every_supported_number_of_codebooks_is_allowed(books: int) -> None:
    assert classic(replace(PLANNED, d=96 * 5 * 7 * 4, num_codebooks=books)).reasons == ()


@pytest.mark.parametrize("books", [5, 6, 7, 9, 36, 52, 80, 97, 128])
def test_another_number_of_codebooks_is_refused_with_the_list(books: int) -> None:
    plan = classic(replace(PLANNED, d=books * 4, num_codebooks=books), float16=True)
    assert f"got M={books}" in plan.reasons[0]
    assert "64, 96" in plan.reasons[0]


@pytest.mark.parametrize("bits", [4, 6])
def test_codes_of_other_than_8_bits_are_refused_on_a_real_index(bits: int) -> None:
    assert f"nbits={bits}" in only_reason(classic(zero_centroids(bits=bits)))


def test_codes_of_whole_vectors_are_refused() -> None:
    assert "by_residual=False" in only_reason(classic(learned_lists(by_residual=False)))


def test_a_polysemous_search_is_refused() -> None:
    built = zero_centroids()
    built.polysemous_ht = 4
    assert "polysemous_ht=4" in only_reason(classic(built))


def test_48_codebooks_fit_shared_memory_in_float32_and_56_do_not() -> None:
    at, above = replace(PLANNED, d=672, num_codebooks=48), replace(PLANNED, d=672, num_codebooks=56)
    assert classic(at, float16=False).possible
    assert "got 57344 for M=56" in only_reason(classic(above, float16=False))


def test_half_precision_tables_are_chosen_only_where_float32_does_not_fit() -> None:
    chosen = {m: classic(replace(PLANNED, d=672 * 4, num_codebooks=m)).float16 for m in (32, 48, 56, 64, 96)}
    assert chosen == {32: False, 48: False, 56: True, 64: True, 96: True}


def test_a_dimension_that_codebooks_do_not_divide_is_refused() -> None:
    assert "d=770 and M=48" in only_reason(classic(replace(PLANNED, d=770)))


@pytest.mark.parametrize(("width", "noted"), [(16, False), (32, False), (7, True), (14, True), (64, True)])
def test_a_width_without_a_kernel_is_noted_and_not_refused(width: int, noted: bool) -> None:
    plan = classic(replace(PLANNED, d=48 * width))
    assert plan.possible
    assert any(f"no kernel for {width} " in note for note in plan.notes) is noted


# --- coarse quantizers ---


def test_a_coarse_metric_other_than_the_indexs_is_refused() -> None:
    built = learned_lists()
    other = faiss.IndexFlatL2(D)
    other.add(built.quantizer.reconstruct_n(0, L))
    built.own_fields, built.quantizer = False, other
    assert "inner_product, got l2" in only_reason(classic(built))


def test_a_coarse_metric_does_not_matter_to_uncompressed_lists() -> None:
    assert classic(replace(PLANNED, kind="IndexIVFFlat", quantizer_metric="l2")).possible


def test_a_graph_as_coarse_quantizer_is_refused() -> None:
    assert "got IndexHNSWFlat" in only_reason(classic(faiss_hnsw_coarse()))


def faiss_hnsw_coarse() -> FaissIndex:
    built = learned_lists(metric="l2")
    graph = faiss.IndexHNSWFlat(D, 8)
    graph.add(built.quantizer.reconstruct_n(0, L))
    built.own_fields, built.quantizer = False, graph
    built.referenced_objects = [graph]
    return built


def test_centroids_that_do_not_match_the_lists_are_refused() -> None:
    built = learned_lists()
    built.quantizer.add(np.zeros((1, D), dtype=np.float32))
    assert f"nlist={L} centroids, got {L + 1}" in only_reason(classic(built))


# --- k, nprobe, numbers ---


@pytest.mark.parametrize(("cuvs", "limit"), [(False, 2048), (True, 16384)])
@pytest.mark.parametrize("name", ["k", "nprobe"])
def test_k_and_nprobe_end_at_the_limit_of_the_gpu_code(cuvs: bool, limit: int, name: str) -> None:
    shape = replace(PLANNED, nlist=20_000)
    assert plan_gpu(shape, cuvs=cuvs, **{name: limit}).possible  # type: ignore[arg-type]
    for value in (0, limit + 1):
        reason = only_reason(plan_gpu(shape, cuvs=cuvs, **{name: value}))  # type: ignore[arg-type]
        assert f"{name} must be between 1 and {limit}, got {value}" in reason


def test_the_indexs_own_nprobe_counts_where_none_is_given() -> None:
    built = zero_centroids(nlist=2049)
    assert "got 2049" in only_reason(classic(built))
    assert classic(built, nprobe=2048).possible


def test_k_counts_for_flat_vectors_and_nprobe_does_not() -> None:
    flat = IndexShape(kind="IndexFlatIP", d=D, ntotal=N)
    assert classic(flat, nprobe=5000).possible
    assert not classic(flat, k=2049).possible


def test_cuvs_probes_no_more_lists_than_there_are() -> None:
    assert "nlist=1024 lists, got nprobe=1025" in only_reason(plan_gpu(PLANNED, cuvs=True, nprobe=1025))
    assert classic(PLANNED, nprobe=1025).possible


def test_int32_document_numbers_end_at_two_billion() -> None:
    shape = replace(PLANNED, ntotal=2**31 - 1)
    assert classic(shape, indices="int32").possible
    assert "got 2,147,483,648" in only_reason(classic(replace(shape, ntotal=2**31), indices="int32"))


# --- cuVS ---


@pytest.mark.parametrize(("bits", "allowed"), [(3, False), (4, True), (5, True), (8, True), (9, False)])
def test_cuvs_takes_codes_of_4_to_8_bits(bits: int, allowed: bool) -> None:
    assert plan_gpu(replace(PLANNED, nbits=bits), cuvs=True).possible is allowed


def test_cuvs_takes_a_real_4_bit_index_that_classic_refuses() -> None:
    built = zero_centroids(bits=4)
    assert plan_gpu(built, cuvs=True).possible
    assert not classic(built).possible


def test_cuvs_refuses_codes_that_end_inside_a_byte() -> None:
    shape = replace(PLANNED, d=45 * 4, num_codebooks=45, nbits=4)
    assert "= 180 bits" in only_reason(plan_gpu(shape, cuvs=True))
    assert plan_gpu(replace(shape, d=44 * 4, num_codebooks=44), cuvs=True).possible


def test_cuvs_takes_a_number_of_codebooks_that_classic_does_not() -> None:
    shape = replace(PLANNED, d=720, num_codebooks=120)
    assert plan_gpu(shape, cuvs=True).possible
    assert not plan_gpu(shape, cuvs=True).float16
    assert not classic(shape).possible


@pytest.mark.parametrize("indices", ["int32", "cpu"])
def test_cuvs_keeps_document_numbers_in_64_bits_only(indices: Any) -> None:
    assert indices in only_reason(plan_gpu(PLANNED, cuvs=True, indices=indices))


def test_cuvs_refuses_scalar_quantizers() -> None:
    built = inverted("IndexIVFScalarQuantizer", arguments=(faiss.ScalarQuantizer.QT_8bit,))
    assert "IndexIVFScalarQuantizer" in only_reason(plan_gpu(built, cuvs=True))


def test_without_a_gpu_build_the_plan_is_for_classic_code() -> None:
    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("a FAISS with GPU support is installed")
    assert not plan_gpu(PLANNED).cuvs


# --- scalar quantizers ---


@pytest.mark.parametrize("name", ["QT_bf16", "QT_8bit_direct_signed"])
def test_a_scalar_type_that_gpus_lack_is_refused(name: str) -> None:
    built = inverted("IndexIVFScalarQuantizer", arguments=(getattr(faiss.ScalarQuantizer, name),))
    assert f"got {name}" in only_reason(classic(built))


@pytest.mark.parametrize(
    ("name", "d", "allowed"), [("QT_8bit", 6143, True), ("QT_8bit", 6144, False), ("QT_fp16", 6144, True)]
)
def test_scalar_ranges_must_fit_shared_memory(name: str, d: int, allowed: bool) -> None:
    shape = replace(
        PLANNED, kind="IndexIVFScalarQuantizer", d=d, num_codebooks=0, scalar_type=name, code_size=d
    )
    assert classic(shape).possible is allowed


# --- memory ---


def test_memory_of_lists_is_codes_ids_centroids_and_arena() -> None:
    shape = replace(PLANNED, ntotal=2**20, nlist=1024)  # 1024 documents a list: nothing to round up
    memory = classic(shape).memory
    assert memory.codes == 2**20 * 48
    assert memory.ids == 2**20 * 8
    assert memory.centroids == 1024 * (768 * 4 + 24) + 2 * 256 * 768 * 4
    assert memory.tables == 0
    assert classic(shape).bytes == sum([memory.codes, memory.ids, memory.centroids, 1536 * 2**20])


@pytest.mark.parametrize(("indices", "size"), [("int64", 8), ("int32", 4), ("cpu", 0)])
def test_document_numbers_take_what_their_type_takes(indices: Any, size: int) -> None:
    assert classic(replace(PLANNED, ntotal=2**20), indices=indices).memory.ids == 2**20 * size


@pytest.mark.parametrize(("float16", "size"), [(False, 4), (True, 2)])
def test_precomputed_tables_of_l2_take_a_value_for_each_list_codebook_and_codeword(
    float16: bool, size: int
) -> None:
    shape = replace(PLANNED, metric="l2")
    assert classic(shape, precomputed=True, float16=float16).memory.tables == 1024 * 48 * 256 * size


def test_precomputed_tables_of_inner_products_are_not_made_and_noted() -> None:
    plan = classic(PLANNED, precomputed=True)
    assert plan.memory.tables == 0
    assert any("precomputed" in note for note in plan.notes)


def test_vectors_take_4_bytes_a_dimension_and_2_in_half_precision() -> None:
    flat = IndexShape(kind="IndexFlatIP", d=100, ntotal=1000)
    assert classic(flat).memory.codes == 400_000
    assert classic(flat, float16=True).memory.codes == 200_000


def test_short_lists_take_whole_allocations() -> None:
    shape = replace(PLANNED, ntotal=1024, nlist=1024)  # a document a list: 48 bytes of code in 512
    assert classic(shape).memory.codes == 1024 * 512


def test_shards_share_the_documents_and_replicas_do_not() -> None:
    shape = replace(PLANNED, ntotal=2**20)
    one, shards = classic(shape).memory, classic(shape, cards=4).memory
    assert shards.codes == one.codes // 4
    assert shards.centroids == one.centroids
    assert classic(shape, cards=4, mode="replicas").memory == one


def test_memory_refuses_one_byte_above_what_is_free() -> None:
    needed = classic(PLANNED).bytes
    assert classic(PLANNED, memory_bytes=needed).possible
    assert f"{needed:,} bytes" in only_reason(classic(PLANNED, memory_bytes=needed - 1))


def test_a_billion_documents_need_several_cards_of_80_gib() -> None:
    shape = replace(PLANNED, ntotal=2 * 10**9, nlist=65536)
    assert not classic(shape, memory_bytes=80 * GIB).possible
    assert classic(shape, memory_bytes=80 * GIB, cards=2).possible


def test_a_search_that_outgrows_the_arena_is_noted() -> None:
    shape = replace(PLANNED, ntotal=20_000_000, nlist=1, nprobe=1)
    assert any("set aside" in note for note in classic(shape, temporary=GIB).notes)
    assert not any("set aside" in note for note in classic(shape, temporary=2 * GIB).notes)


def test_the_longest_list_counts_and_not_the_mean() -> None:
    even, uneven = zero_centroids(), learned_lists()
    assert shape_of(even).longest_list == N // L
    sizes = [uneven.invlists.list_size(number) for number in range(L)]
    assert shape_of(uneven).longest_list == max(sizes) > N // L


# --- what is told ---


def test_all_reasons_are_told_at_once() -> None:
    shape = replace(PLANNED, nbits=4, num_codebooks=6, by_residual=False)
    assert len(classic(shape, k=5000).reasons) == 4


def test_a_reason_ends_in_what_to_do() -> None:
    shape = replace(
        PLANNED, nbits=4, num_codebooks=6, by_residual=False, quantizer="IndexHNSWFlat", metric="l1"
    )
    for reason in classic(shape, k=0, memory_bytes=1).reasons:
        assert "got" in reason or "are free" in reason
        assert reason.endswith(".")


def test_a_rotation_is_noted_to_stay_on_the_cpu() -> None:
    assert any("rotation" in note for note in classic(zero_centroids(rotated=True)).notes)
    assert not any("rotation" in note for note in classic(zero_centroids()).notes)


@pytest.mark.parametrize("wrong", [{"cards": 0}, {"mode": "both"}, {"indices": "int16"}])
def test_an_argument_that_never_makes_sense_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"got {next(iter(wrong.values()))!r}"):
        classic(PLANNED, **wrong)


# --- cloning without a card ---


def test_a_refused_index_is_refused_before_a_card_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: pytest.fail("looked for a card"))
    export = product_export()
    built = PQBuilder().build(export, pack_codes(codes_for(export), 8))
    with pytest.raises(InputError, match="cannot go to a GPU: FAISS has no GPU form of IndexPQ"):
        to_gpu(built)


def test_a_faiss_without_gpu_code_says_which_to_install() -> None:
    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("a FAISS with GPU support is installed")
    with pytest.raises(InputError, match=r"no GPU support.*endex\[gpu\]"):
        to_gpu(zero_centroids(), cuvs=False)


def test_a_machine_without_a_card_is_told_from_one_without_gpu_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(InputError, match="sees no GPU"):
        to_gpu(zero_centroids(), cuvs=False)


@pytest.mark.parametrize("devices", [[], [2], [0, 0], [-1]])
def test_a_card_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, devices: list[int]) -> None:
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    with pytest.raises(InputError, match="between 0 and 1"):
        to_gpu(zero_centroids(), devices=devices, cuvs=False)


def test_a_failed_cloning_leaves_the_cpu_index_as_it_was() -> None:
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("there is a card: cloning works")
    built = learned_lists()
    with pytest.raises(InputError):
        to_gpu(built, nprobe=2)
    assert built.nprobe == 3


# --- the algebra of zero centroids, by an oracle in float64 that knows no lists ---


def decoded(export: ProductCodebooks, codes: torch.Tensor) -> np.ndarray:
    """Return the vectors (n, D) of codes (n, M), codeword by codeword."""
    books = export.codebooks.double().numpy()
    return np.stack(
        [np.concatenate([books[m, code] for m, code in enumerate(row)]) for row in codes.tolist()]
    )


def queries() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((4, D), dtype=np.float32)


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("nlist", [1, L])
def test_zero_centroids_give_the_scores_of_a_quantizer_without_lists(metric: str, nlist: int) -> None:
    export, q = product_export(metric=metric), queries()
    x = decoded(export, codes_for(export))
    exact = q @ x.T if metric == "inner_product" else ((q[:, None].astype(np.float64) - x) ** 2).sum(-1)
    scores, rows = zero_centroids(metric=metric, nlist=nlist).search(q, N)
    assert all(sorted(row) == list(range(N)) for row in rows.tolist())
    np.testing.assert_allclose(
        scores, np.take_along_axis(exact, rows, 1), rtol=0, atol=1e-5 * np.abs(exact).max()
    )

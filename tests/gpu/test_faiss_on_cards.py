"""On a machine with an NVIDIA card: clones score as the CPU does, at the limits too, and refusals are FAISS's own.

Vectors have unit length, so a score's size is at most about 2. Tolerances are absolute: 1e-5 with float32 tables, 1e-3
with half precision ones and with cuVS.

Shapes: n documents, q queries, D dimensions, L lists, M codebooks, K codewords.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from index.builders import FaissIndex, FlatBuilder, IVFPQBuilder, PQBuilder
from index.cuvs_bundle import cuvs_bundle
from index.gpu import plan_gpu, to_gpu
from index.gpu_rules import CODEBOOKS, built_with_cuvs
from retriever import InputError
from retriever.heads import (
    CoarseProductCodebooks,
    FlatVectors,
    ProductCodebooks,
    pack_codes,
    pack_list_numbers,
)

GPU_CODE = hasattr(faiss, "StandardGpuResources")
CARDS = faiss.get_num_gpus() if GPU_CODE else 0
CUVS = bool(CARDS) and built_with_cuvs()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CARDS, reason="needs FAISS with GPU support and a card"),
]

METRICS = ("inner_product", "l2")
FLOAT32, HALF = 1e-5, 1e-3
ARENA = 256 << 20
Q, N, D, M, L = 40, 20_000, 96, 16, 64


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def export_of(
    books: int = M, dim: int = D, *, metric: str = "inner_product", bits: int = 8, rotated: bool = False
) -> Any:
    generator = torch.Generator().manual_seed(books)
    codebooks = (
        unit(books, 2**bits, dim // books, seed=books) / books**0.5
    )  # a decoded vector has unit length
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q if rotated else None
    return ProductCodebooks(codebooks=codebooks, rotation=rotation, metric=metric)  # type: ignore[arg-type]


def codes_of(export: ProductCodebooks, rows: int = N) -> np.ndarray:
    books, codewords, _ = export.codebooks.shape
    codes = torch.randint(codewords, (rows, books), generator=torch.Generator().manual_seed(7))
    return pack_codes(codes, codewords.bit_length() - 1)


def flat(metric: str = "inner_product") -> FaissIndex:
    vectors = unit(N, D).numpy()
    return FlatBuilder().build(FlatVectors(dim=D, metric=metric), vectors.view(np.uint8).reshape(N, -1))  # type: ignore[arg-type]


def zero_centroids(
    metric: str = "inner_product", *, nlist: int = L, rows: int = N, **shape: Any
) -> FaissIndex:
    export = export_of(metric=metric, **shape)
    return IVFPQBuilder(nlist=nlist).build(export, codes_of(export, rows))


def learned_lists(
    metric: str = "inner_product", *, nlist: int = L, rows: int = N, nprobe: int = 16, **shape: Any
) -> FaissIndex:
    plain = export_of(metric=metric, **shape)
    dim = plain.codebooks.shape[0] * plain.codebooks.shape[2]
    export = CoarseProductCodebooks(
        codebooks=plain.codebooks / 4,
        rotation=plain.rotation,
        metric=plain.metric,
        centroids=unit(nlist, dim, seed=3),
    )
    lists = torch.randint(nlist, (rows,), generator=torch.Generator().manual_seed(9)).numpy()
    return IVFPQBuilder(nprobe=nprobe).build(
        export, np.hstack([pack_list_numbers(lists, nlist), codes_of(plain, rows)])
    )


def rotated_lists(metric: str = "inner_product") -> FaissIndex:
    return learned_lists(metric, rotated=True)


def inverted(kind: str, metric: str, *arguments: int) -> FaissIndex:
    """Return an inverted file that FAISS fills: no head of Endex makes one."""
    x, kinds = unit(N, D).numpy(), {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
    quantizer = (faiss.IndexFlatIP if metric == "inner_product" else faiss.IndexFlatL2)(D)
    quantizer.add(x[:L])
    built = getattr(faiss, kind)(quantizer, D, L, *arguments, kinds[metric])
    built.train(x)
    built.add(x)
    built.nprobe = 16
    built.referenced_objects = [quantizer]
    return built


def ivf_flat(metric: str = "inner_product") -> FaissIndex:
    return inverted("IndexIVFFlat", metric)


def half_flat(metric: str = "inner_product") -> FaissIndex:
    kind = faiss.METRIC_INNER_PRODUCT if metric == "inner_product" else faiss.METRIC_L2
    built = faiss.IndexScalarQuantizer(D, faiss.ScalarQuantizer.QT_fp16, kind)
    built.train(unit(N, D).numpy())
    built.add(unit(N, D).numpy())
    return built


def assert_same(
    cpu: FaissIndex, other: Any, *, k: int = 50, tolerance: float = FLOAT32, dim: int = D
) -> None:
    """Assert equal scores rank by rank, and the same documents except where scores are as near as the tolerance."""
    queries = unit(Q, dim, seed=5).numpy()
    expected, expected_rows = cpu.search(queries, k)
    scores, rows = other.search(queries, k)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)
    assert ((rows >= 0) == (expected_rows >= 0)).all()
    shared = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), expected_rows.tolist(), strict=True)]
    assert np.mean(shared) >= (0.98 if tolerance == FLOAT32 else 0.8) * np.mean(
        [len(set(row)) for row in expected_rows.tolist()]
    )


def clone_unchecked(index: FaissIndex, *, float16: bool = False, cuvs: bool = False) -> FaissIndex:
    """Clone without the rules of Endex, to see what FAISS itself says."""
    options = faiss.GpuClonerOptions()
    options.use_cuvs, options.useFloat16 = cuvs, float16
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(ARENA)
    clone = faiss.index_cpu_to_gpu(resources, 0, index, options)
    return clone, resources


def classic(index: FaissIndex, **options: Any) -> FaissIndex:
    return to_gpu(index, cuvs=False, temporary=ARENA, **options)


# --- permitted forms ---


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("make", [flat, zero_centroids, learned_lists, rotated_lists, ivf_flat])
def test_a_clone_scores_as_the_cpu_does(make: Callable[[str], FaissIndex], metric: str) -> None:
    cpu = make(metric)
    assert_same(cpu, classic(cpu, k=50))


@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_vectors_score_as_the_cpu_does(metric: str) -> None:
    cpu = half_flat(metric)
    assert_same(cpu, classic(cpu, k=50), tolerance=HALF)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "name", ["QT_8bit", "QT_8bit_uniform", "QT_4bit", "QT_4bit_uniform", "QT_6bit", "QT_fp16"]
)
def test_scalar_quantizers_in_lists_score_as_the_cpu_does(name: str, metric: str) -> None:
    cpu = inverted("IndexIVFScalarQuantizer", metric, getattr(faiss.ScalarQuantizer, name))
    assert_same(cpu, classic(cpu, k=50), tolerance=HALF)


@pytest.mark.parametrize("books", CODEBOOKS)
def test_every_number_of_codebooks_scores_as_the_cpu_does(books: int) -> None:
    cpu = learned_lists(books=books, dim=books * 8)
    plan = plan_gpu(cpu, cuvs=False)
    assert plan.float16 is (books > 48)
    assert_same(cpu, classic(cpu, k=50), dim=books * 8, tolerance=HALF if plan.float16 else FLOAT32)


@pytest.mark.parametrize("width", [1, 3, 7, 14, 16, 32, 48])
def test_every_width_of_a_codeword_scores_as_the_cpu_does(width: int) -> None:
    cpu = learned_lists("l2", books=16, dim=16 * width)
    assert_same(cpu, classic(cpu, k=50), dim=16 * width)


@pytest.mark.parametrize("make", [zero_centroids, learned_lists])
@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_tables_stay_within_their_tolerance(
    make: Callable[[str], FaissIndex], metric: str
) -> None:
    cpu = make(metric)
    assert_same(cpu, classic(cpu, k=50, float16=True), tolerance=HALF)


def test_precomputed_tables_give_the_same_scores() -> None:
    cpu = learned_lists("l2")
    assert_same(cpu, classic(cpu, k=50, precomputed=True), tolerance=1e-4)  # sums in another order


@pytest.mark.parametrize("indices", ["int64", "int32", "cpu"])
def test_document_numbers_come_back_from_wherever_they_are_kept(indices: Any) -> None:
    cpu = learned_lists()
    assert_same(cpu, classic(cpu, k=50, indices=indices))


def test_identifiers_around_an_index_come_back() -> None:
    inner = faiss.IndexFlatIP(D)
    cpu = faiss.IndexIDMap2(inner)
    cpu.add_with_ids(unit(N, D).numpy(), np.arange(N) * 3 + 11)
    assert_same(cpu, classic(cpu, k=50))


# --- zero centroids ---


@pytest.mark.parametrize("metric", METRICS)
def test_zero_centroids_score_as_a_quantizer_without_lists_on_the_cpu(metric: str) -> None:
    export = export_of(metric=metric, rotated=True)
    cpu = PQBuilder().build(export, codes_of(export))
    assert_same(cpu, classic(zero_centroids(metric, rotated=True), k=50))


# --- limits ---


@pytest.mark.parametrize("make", [flat, learned_lists])
def test_2048_results_score_as_the_cpu_does(make: Callable[[], FaissIndex]) -> None:
    cpu = make()
    assert_same(cpu, classic(cpu, k=2048), k=2048)


def test_2048_lists_are_probed_as_on_the_cpu() -> None:
    cpu = zero_centroids(nlist=2048)
    assert_same(cpu, classic(cpu, k=50))


@pytest.mark.parametrize("make", [flat, learned_lists])
def test_faiss_itself_refuses_2049_results(make: Callable[[], FaissIndex]) -> None:
    clone, _resources = clone_unchecked(make())
    with pytest.raises(RuntimeError, match="2049"):
        clone.search(unit(Q, D).numpy(), 2049)


def test_faiss_itself_refuses_2049_probes() -> None:
    with pytest.raises(RuntimeError, match="nprobe"):
        clone_unchecked(zero_centroids(nlist=2049))


def whole_vectors() -> FaissIndex:
    built = learned_lists()
    built.by_residual = False
    return built


def polysemous() -> FaissIndex:
    built = learned_lists()
    built.polysemous_ht = 4
    return built


def surplus_centroid() -> FaissIndex:
    built = learned_lists()
    built.quantizer.add(unit(1, D).numpy())
    return built


def flat_codes() -> FaissIndex:
    return PQBuilder().build(export_of(), codes_of(export_of()))


REFUSED: dict[str, Callable[[], FaissIndex]] = {
    "IndexPQ": flat_codes,
    "IndexPQFastScan": lambda: faiss.IndexPQFastScan(D, 16, 4),
    "IndexIVFPQFastScan": lambda: faiss.IndexIVFPQFastScan(learned_lists(bits=4)),
    "IndexResidualQuantizer": lambda: faiss.IndexResidualQuantizer(D, 4, 4),
    "IndexHNSWFlat": lambda: faiss.IndexHNSWFlat(D, 8),
    "IndexIVFRaBitQ": lambda: faiss.IndexIVFRaBitQ(faiss.IndexFlatL2(D), D, 4, faiss.METRIC_L2),
    "by_residual=False": whole_vectors,
    "polysemous": polysemous,
    "a centroid too many": surplus_centroid,
    "4 bits": lambda: learned_lists(bits=4),
    "6 bits": lambda: learned_lists(bits=6),
    "6 codebooks": lambda: learned_lists(books=6, dim=48),
    "QT_bf16": lambda: inverted("IndexIVFScalarQuantizer", "l2", faiss.ScalarQuantizer.QT_bf16),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_endex_refuses_faiss_refuses_too(name: str) -> None:
    built = REFUSED[name]()
    assert not plan_gpu(built, cuvs=False).possible
    with pytest.raises(InputError):
        to_gpu(built, cuvs=False)
    with pytest.raises(RuntimeError):
        clone_unchecked(built)


@pytest.mark.parametrize("books", [56, 64, 96])
def test_what_needs_half_precision_tables_faiss_refuses_without(books: int) -> None:
    built = learned_lists(books=books, dim=books * 8)
    assert not plan_gpu(built, cuvs=False, float16=False).possible
    with pytest.raises(RuntimeError, match="shared memory"):
        clone_unchecked(built)


# --- life of a clone ---


def test_a_clone_outlives_what_it_was_made_from() -> None:
    cpu = learned_lists(rotated=True)
    queries = unit(Q, D, seed=5).numpy()
    expected, _ = cpu.search(queries, 10)
    clone = classic(cpu)
    del cpu
    gc.collect()
    np.testing.assert_allclose(clone.search(queries, 10)[0], expected, rtol=0, atol=FLOAT32)


def test_cloning_leaves_the_cpu_index_as_it_was() -> None:
    cpu = learned_lists(nprobe=16)
    before = faiss.serialize_index(cpu)
    classic(cpu, nprobe=3)
    np.testing.assert_array_equal(faiss.serialize_index(cpu), before)


def test_a_clone_probes_as_many_lists_as_asked_for() -> None:
    cpu = learned_lists(nprobe=16)
    clone = classic(cpu, nprobe=3)
    cpu.nprobe = 3
    assert_same(cpu, clone)


@pytest.mark.parametrize("device", [CARDS, CARDS + 7])
def test_a_card_that_is_not_there_is_named(device: int) -> None:
    with pytest.raises(InputError, match=f"between 0 and {CARDS - 1}"):
        classic(learned_lists(), devices=[device])


# --- memory ---


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lists", {}),
        ("lists", {"indices": "int32"}),
        ("lists l2", {"precomputed": True}),
        ("flat", {}),
        ("flat", {"float16": True}),
    ],
)
def test_the_estimate_is_within_20_percent_of_the_memory_used(kind: str, options: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA cannot measure")
    warm = classic(learned_lists())
    warm.search(unit(Q, D).numpy(), 10)  # context, kernels, cuBLAS
    if kind == "flat":
        cpu = faiss.IndexFlatIP(256)
        cpu.add(unit(1_000_000, 256).numpy())
    else:
        metric = "l2" if kind.endswith("l2") else "inner_product"
        cpu = learned_lists(metric, nlist=1024, rows=8_000_000, books=32, dim=256)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info(0)[0]
    clone = classic(cpu, **options)
    torch.cuda.synchronize()
    used = before - torch.cuda.mem_get_info(0)[0]
    estimate = plan_gpu(cpu, cuvs=False, temporary=ARENA, **options).bytes
    assert clone.ntotal == cpu.ntotal
    assert used == pytest.approx(estimate, rel=0.2)


def test_an_index_larger_than_the_card_is_refused_before_it_is_cloned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (ARENA, ARENA))
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA cannot measure")
    with pytest.raises(InputError, match="are free"):
        classic(learned_lists())


# --- several cards ---

several = pytest.mark.skipif(CARDS < 2, reason="needs two cards")


@several
@pytest.mark.parametrize("mode", ["shards", "replicas"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("make", [flat, zero_centroids, learned_lists, rotated_lists, ivf_flat])
def test_all_cards_together_score_as_the_cpu_does(
    make: Callable[[str], FaissIndex], metric: str, mode: Any
) -> None:
    cpu = make(metric)
    assert_same(cpu, classic(cpu, k=50, devices=range(CARDS), mode=mode))


@several
def test_half_precision_vectors_are_refused_on_several_cards() -> None:
    with pytest.raises(InputError, match="one card"):
        classic(half_flat(), devices=[0, 1])


@several
def test_the_second_card_alone_scores_as_the_cpu_does() -> None:
    cpu = learned_lists()
    assert_same(cpu, classic(cpu, k=50, devices=[1]))


# --- cuVS ---

with_cuvs = pytest.mark.skipif(not CUVS, reason="needs a FAISS built with cuVS")


@with_cuvs
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_cuvs_scores_as_the_cpu_does(metric: str, bits: int) -> None:
    cpu = learned_lists(metric, bits=bits)
    assert_same(cpu, to_gpu(cpu, cuvs=True, k=50, temporary=ARENA), tolerance=HALF)


@with_cuvs
@pytest.mark.parametrize("make", [flat, zero_centroids, rotated_lists, ivf_flat])
@pytest.mark.parametrize("metric", METRICS)
def test_cuvs_scores_every_permitted_form_as_the_cpu_does(
    make: Callable[[str], FaissIndex], metric: str
) -> None:
    cpu = make(metric)
    assert_same(cpu, to_gpu(cpu, cuvs=True, k=50, temporary=ARENA), tolerance=HALF)


@with_cuvs
def test_cuvs_gives_more_than_2048_results() -> None:
    cpu = learned_lists(nprobe=L)
    assert_same(cpu, to_gpu(cpu, cuvs=True, k=4096, temporary=ARENA), k=4096, tolerance=HALF)


@pytest.mark.skipif(CUVS, reason="FAISS is built with cuVS")
def test_cuvs_asked_of_a_faiss_without_it_says_which_to_install() -> None:
    with pytest.raises(InputError, match=r"no cuVS.*endex\[cuvs\]"):
        to_gpu(learned_lists(), cuvs=True)


@pytest.mark.parametrize("metric", METRICS)
def test_cuvs_own_index_takes_the_arrays_of_the_bundle(metric: str) -> None:
    """The extents that `cuvsIvfPqBuildPrecomputed` checks; the codes themselves go in from C++ only."""
    ivf_pq = pytest.importorskip("cuvs.neighbors.ivf_pq")
    plain = export_of(metric=metric, rotated=True)
    export = CoarseProductCodebooks(
        codebooks=plain.codebooks, rotation=plain.rotation, metric=plain.metric, centroids=unit(L, D, seed=3)
    )
    lists = torch.randint(L, (N,), generator=torch.Generator().manual_seed(9)).numpy()
    bundle = cuvs_bundle(export, np.hstack([pack_list_numbers(lists, L), codes_of(plain)]))
    parameters = ivf_pq.IndexParams(
        n_lists=L,
        metric="inner_product" if metric == "inner_product" else "sqeuclidean",
        pq_bits=bundle.nbits,
        pq_dim=M,
        codebook_kind="subspace",
        add_data_on_build=False,
    )
    arrays = [
        torch.from_numpy(each).cuda()
        for each in (bundle.pq_centers, bundle.centers, bundle.centers_rot, bundle.rotation_matrix)
    ]
    built = ivf_pq.build_precomputed(parameters, bundle.dim, *arrays)
    assert (built.n_lists, built.dim, built.pq_dim, built.pq_bits) == (L, D, M, 8)
    np.testing.assert_array_equal(built.pq_centers.copy_to_host(), bundle.pq_centers)

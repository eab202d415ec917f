"""The cuVS bundle holds the head's codebooks and codes in the layouts of cuVS's header, and scores as FAISS does.

Shapes: n documents, q queries, D dimensions, L lists, M codebooks, K codewords, S = D // M sub-dimensions.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from index.builders import IVFPQBuilder
from index.cuvs_bundle import CuvsBundle, cuvs_bundle, read_cuvs_bundle, write_cuvs_bundle
from retriever import InputError
from retriever.heads import CoarseProductCodebooks, ProductCodebooks, pack_codes, pack_list_numbers

M, S, L, N = 6, 3, 300, 500  # more lists than one byte numbers
D = M * S


def make(
    *,
    metric: str = "inner_product",
    learned: bool = True,
    rotated: bool = True,
    bits: int = 8,
    skewed: bool = False,
) -> tuple[ProductCodebooks, np.ndarray]:
    """Return an export and the packed codes of N documents."""
    generator = torch.Generator().manual_seed(bits)
    codebooks = torch.randn(M, 2**bits, S, generator=generator)
    rotation = torch.randn(D, D, generator=generator)
    if not skewed:
        rotation = torch.linalg.qr(rotation).Q
    common = {
        "codebooks": codebooks,
        "metric": metric,
        "rotation": rotation if rotated else None,
        "orthonormal": not skewed,
    }
    packed = pack_codes(torch.randint(2**bits, (N, M), generator=generator), bits)
    if not learned:
        return ProductCodebooks(**common), packed  # type: ignore[arg-type]
    lists = torch.randint(L, (N,), generator=generator).numpy()
    export = CoarseProductCodebooks(**common, centroids=torch.randn(L, D, generator=generator))  # type: ignore[arg-type]
    return export, np.hstack([pack_list_numbers(lists, L), packed])


def scores_as_cuvs(bundle: CuvsBundle, queries: np.ndarray) -> np.ndarray:
    """Return scores (q, n) in document order in float64, from the layouts alone: list by list, code by code."""
    q = queries.astype(np.float64)
    rotated = q @ bundle.rotation_matrix.astype(np.float64).T
    scores = np.empty((len(q), len(bundle.ids)))
    for number in range(len(bundle.centers)):
        for place in range(bundle.offsets[number], bundle.offsets[number + 1]):
            words = [bundle.pq_centers[m, :, code] for m, code in enumerate(bundle.codes[place])]
            residual = np.concatenate(words).astype(np.float64)
            if bundle.metric == "inner_product":
                value = q @ bundle.centers[number, : bundle.dim] + rotated @ residual
            else:
                value = ((rotated - bundle.centers_rot[number] - residual) ** 2).sum(1)
            scores[:, bundle.ids[place]] = value
    return scores


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_bundle_scores_every_document_as_faiss_does(
    metric: str, learned: bool, rotated: bool, bits: int
) -> None:
    export, packed = make(metric=metric, learned=learned, rotated=rotated, bits=bits)
    queries = np.random.default_rng(0).standard_normal((3, D), dtype=np.float32)
    built = IVFPQBuilder(nprobe=L if learned else None).build(export, packed)
    scores, rows = built.search(queries, N)
    expected = np.take_along_axis(scores_as_cuvs(cuvs_bundle(export, packed), queries), rows, 1)
    assert all(sorted(row) == list(range(N)) for row in rows.tolist())
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_rotation_that_is_not_orthonormal_keeps_inner_products() -> None:
    export, packed = make(skewed=True)
    queries = np.random.default_rng(0).standard_normal((3, D), dtype=np.float32)
    scores, rows = IVFPQBuilder(nprobe=L).build(export, packed).search(queries, N)
    expected = np.take_along_axis(scores_as_cuvs(cuvs_bundle(export, packed), queries), rows, 1)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_rotation_that_is_not_orthonormal_is_refused_for_l2() -> None:
    with pytest.raises(InputError, match="inner products only"):
        cuvs_bundle(*make(skewed=True, metric="l2"))


def test_coarse_scores_before_the_rotation_are_those_behind_it() -> None:
    bundle = cuvs_bundle(*make())
    query = np.random.default_rng(0).standard_normal(D)
    np.testing.assert_allclose(
        bundle.centers[:, :D] @ query, bundle.centers_rot @ (bundle.rotation_matrix @ query), atol=1e-4
    )


@pytest.mark.parametrize(("dim", "width"), [(18, 24), (7, 8), (8, 16)])
def test_centers_are_padded_to_8_past_the_squared_norm(dim: int, width: int) -> None:
    codebooks = torch.randn(dim, 256, 1)
    centroids = torch.randn(3, dim)
    export = CoarseProductCodebooks(codebooks=codebooks, centroids=centroids)
    bundle = cuvs_bundle(export, np.zeros((0, 1 + dim), dtype=np.uint8))
    assert bundle.centers.shape == (3, width)
    np.testing.assert_allclose(bundle.centers[:, dim], (centroids**2).sum(1), rtol=1e-5)
    assert not bundle.centers[:, dim + 1 :].any()


def test_documents_lie_in_the_lists_that_the_head_gave_them() -> None:
    export, packed = make()
    bundle = cuvs_bundle(export, packed)
    given = packed[:, :2].astype(int) @ [1, 256]
    for number in range(L):
        ids = bundle.ids[bundle.offsets[number] : bundle.offsets[number + 1]]
        np.testing.assert_array_equal(ids, np.flatnonzero(given == number))
    np.testing.assert_array_equal(bundle.codes, packed[bundle.ids, 2:])


def test_a_head_without_lists_is_spread_evenly_and_must_be_probed_whole() -> None:
    bundle = cuvs_bundle(*make(learned=False), nlist=4)
    assert np.diff(bundle.offsets).tolist() == [N // 4] * 4
    assert bundle.probe_all
    assert not bundle.centers.any()
    assert not cuvs_bundle(*make()).probe_all


@pytest.mark.parametrize(("books", "bits"), [(4, 3), (4, 9), (3, 4)])
def test_codes_that_cuvs_cannot_hold_are_refused(books: int, bits: int) -> None:
    export = ProductCodebooks(codebooks=torch.randn(books, 2**bits, 2))
    codes = pack_codes(torch.zeros(5, books, dtype=torch.long), bits)
    with pytest.raises(InputError, match=f"num_codebooks={books} and codebook_bits={bits}"):
        cuvs_bundle(export, codes)


def test_codes_of_another_width_are_refused() -> None:
    export, packed = make()
    with pytest.raises(InputError, match="do not fit the head: got 5 bytes"):
        cuvs_bundle(export, packed[:, :-1])


def test_a_list_number_that_the_head_lacks_is_refused() -> None:
    export, packed = make()
    packed[7, :2] = [44, 1]  # 300
    with pytest.raises(InputError, match="lists up to 300"):
        cuvs_bundle(export, packed)


def test_lists_of_its_own_and_nlist_exclude_each_other() -> None:
    with pytest.raises(InputError, match="got 4"):
        cuvs_bundle(*make(), nlist=4)


# --- the file ---


@pytest.mark.parametrize("learned", [False, True])
def test_a_bundle_is_read_back_as_it_was_written(tmp_path: Path, learned: bool) -> None:
    bundle = cuvs_bundle(*make(learned=learned, bits=4, metric="l2"))
    write_cuvs_bundle(tmp_path / "bundle.safetensors", bundle)
    found = read_cuvs_bundle(tmp_path / "bundle.safetensors")
    for field in fields(CuvsBundle):
        first, second = getattr(bundle, field.name), getattr(found, field.name)
        np.testing.assert_array_equal(first, second)
        assert type(first) is type(second)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.safetensors"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.* is missing"):
        read_cuvs_bundle(tmp_path / "absent")


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    write_cuvs_bundle(path, cuvs_bundle(*make()))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_cuvs_bundle(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_file({"weights": np.zeros(3)}, tmp_path / "bundle")
    with pytest.raises(InputError, match="must be of format endex-cuvs-ivf-pq-1"):
        read_cuvs_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pq_centers", lambda a: a[:, :, :-1]),
        ("centers", lambda a: a[:, :-1]),
        ("centers_rot", lambda a: a[:, :-1]),
        ("rotation_matrix", lambda a: a[:-1]),
        ("codes", lambda a: a.astype(np.int32)),
        ("ids", lambda a: a[:-1]),
        ("offsets", lambda a: a + 1),
        ("offsets", lambda a: a[::-1]),
    ],
)
def test_an_array_that_does_not_fit_the_others_is_named(tmp_path: Path, name: str, change: object) -> None:
    path = tmp_path / "bundle"
    write_cuvs_bundle(path, cuvs_bundle(*make()))
    arrays = load_file(path)
    arrays[name] = np.ascontiguousarray(change(arrays[name]))  # type: ignore[operator]
    metadata = {
        "format": "endex-cuvs-ivf-pq-1",
        "metric": "inner_product",
        "nbits": "8",
        "probe_all": "false",
    }
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(InputError, match=rf"contradicts itself: .*{name}"):
        read_cuvs_bundle(path)


def test_a_code_without_a_codeword_is_refused(tmp_path: Path) -> None:
    bundle = cuvs_bundle(*make(bits=4))
    codes = bundle.codes.copy()
    codes[3, 2] = 16
    write_cuvs_bundle(tmp_path / "bundle", replace(bundle, codes=codes))
    with pytest.raises(InputError, match="contradicts itself: codes"):
        read_cuvs_bundle(tmp_path / "bundle")

"""Learned codebooks and codes as the arrays of cuVS's own IVF-PQ index, in one safetensors file.

cuVS takes a trained index from outside through `cuvsIvfPqBuildPrecomputed(params, dim, pq_centers, centers,
centers_rot, rotation_matrix)` (c/include/cuvs/neighbors/ivf_pq.h; in Python `cuvs.neighbors.ivf_pq.build_precomputed`)
and codes, list by list, through `cuvs::neighbors::ivf_pq::helpers::codepacker::extend_list_with_codes(res, index,
codes, ids, label)` (cpp/include/cuvs/neighbors/ivf_pq.hpp), which exists in C++ only: cuVS's Python `extend` takes
vectors and encodes them again. So Endex writes what both calls read, and a C++ program makes the calls.

Shapes: n documents, D dimensions, L lists, M codebooks, K = 2**nbits codewords, S = D // M, E = round_up(D + 1, 8).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from index.interchange import read_arrays
from retriever.errors import InputError
from retriever.heads import CoarseProductCodebooks, ProductCodebooks, unpack_codes
from retriever.heads.base import list_number_size
from retriever.scores import Metric

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = ["CuvsBundle", "cuvs_bundle", "read_cuvs_bundle", "write_cuvs_bundle"]

FORMAT = "endex-cuvs-ivf-pq-1"
ARRAYS = {  # name -> type and number of axes
    "pq_centers": (np.float32, 3),
    "centers": (np.float32, 2),
    "centers_rot": (np.float32, 2),
    "rotation_matrix": (np.float32, 2),
    "codes": (np.uint8, 2),
    "ids": (np.int64, 1),
    "offsets": (np.int64, 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CuvsBundle:
    """Arguments of the two calls, as host arrays in row-major order; cuVS wants them on the card.

    Attributes:
        metric: "inner_product" (cuVS `InnerProduct`) or "l2" (`L2Expanded`, squared distances).
        nbits: `pq_bits`.
        pq_centers: Codewords for `codebook_kind` subspace: pq_dim, pq_len, pq_book_size.
        centers: Coarse centroids before the rotation, then their squared norm, then zeros.
        centers_rot: Coarse centroids behind the rotation.
        rotation_matrix: y = A x; the identity where the head has no rotation.
        codes: One code a byte, documents in the order of their lists.
        ids: Row of each document in the index that Endex would have built.
        offsets: List l holds the documents from offsets[l] to offsets[l + 1].
        probe_all: Whether a search must probe every list: the codes were spread over lists without meaning.
    """

    metric: Metric
    nbits: int
    pq_centers: Float[NDArray[np.float32], "M S K"]
    centers: Float[NDArray[np.float32], "L E"]
    centers_rot: Float[NDArray[np.float32], "L D"]
    rotation_matrix: Float[NDArray[np.float32], "D D"]
    codes: UInt8[NDArray[np.uint8], "n M"]
    ids: Int[NDArray[np.int64], " n"]
    offsets: Int[NDArray[np.int64], " L+1"]
    probe_all: bool

    @property
    def dim(self) -> int:
        """Dimensions D."""
        return len(self.rotation_matrix)


def cuvs_bundle(
    export: ProductCodebooks, packed: UInt8[NDArray[np.uint8], "n size"], *, nlist: int = 1
) -> CuvsBundle:
    """Return the arrays that cuVS wants for a head's export and its packed codes.

    Args:
        export: Of a product quantizer, with lists or without.
        packed: What the head's `pack` returns: with lists, the list number comes first.
        nlist: For a head without lists: lists over which the codes are spread in turn, around zero centroids.

    Raises:
        InputError: If cuVS cannot hold such codes, or `nlist` does not fit the head.
    """
    books, codewords, width = export.codebooks.shape
    dim, nbits = books * width, codewords.bit_length() - 1
    assert codewords == 2**nbits, f"a product quantizer has 2**nbits codewords, got {codewords}"
    if not 4 <= nbits <= 8 or books * nbits % 8:
        raise InputError(
            f"cuVS holds codes of 4 to 8 bits that fill whole bytes, got num_codebooks={books} and codebook_bits="
            f"{nbits}. Train with codebook_bits=8, or an even num_codebooks."
        )
    if export.metric == "l2" and not export.orthonormal:
        raise InputError(
            "a rotation that is not orthonormal carries inner products only, got metric l2. Train again."
        )
    learned = isinstance(export, CoarseProductCodebooks)
    if nlist < 1 or (learned and nlist != 1):
        raise InputError(
            f"nlist must be at least 1, and stay out for a head with its own lists; got {nlist}."
        )
    if isinstance(export, CoarseProductCodebooks):
        rotated = np.ascontiguousarray(export.centroids.numpy(), dtype=np.float32)
        size = list_number_size(len(rotated))
        lists, packed = _list_numbers(packed[:, :size]), packed[:, size:]
    else:
        rotated = np.zeros((nlist, dim), dtype=np.float32)
        lists = np.arange(len(packed), dtype=np.int64) % nlist
    if packed.shape[1:] != ((books * nbits + 7) // 8,) or (lists >= len(rotated)).any():
        raise InputError(
            f"the codes do not fit the head: got {packed.shape[1]} bytes a code and lists up to "
            f"{lists.max(initial=0)}. Give what its `pack` returns."
        )
    matrix = np.eye(dim, dtype=np.float32) if export.rotation is None else export.rotation.numpy()
    order = np.argsort(lists, kind="stable")
    codes = unpack_codes(packed, books, nbits).numpy().astype(np.uint8)
    return CuvsBundle(
        metric=export.metric,
        nbits=nbits,
        pq_centers=np.ascontiguousarray(export.codebooks.numpy().transpose(0, 2, 1), dtype=np.float32),
        centers=_padded(rotated @ matrix),
        centers_rot=rotated,
        rotation_matrix=np.ascontiguousarray(matrix, dtype=np.float32),
        codes=np.ascontiguousarray(codes[order]),
        ids=order.astype(np.int64),
        offsets=np.concatenate([[0], np.bincount(lists, minlength=len(rotated)).cumsum()]).astype(np.int64),
        probe_all=not learned,
    )


def write_cuvs_bundle(path: Path, bundle: CuvsBundle) -> None:
    """Write a bundle to one safetensors file; an existing file is replaced once the new one is complete.

    The arrays keep their names; `format`, `metric`, `nbits` and `probe_all` are in the file's metadata.
    """
    metadata = {
        "format": FORMAT,
        "metric": bundle.metric,
        "nbits": str(bundle.nbits),
        "probe_all": str(bundle.probe_all).lower(),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: getattr(bundle, name) for name in ARRAYS}, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_cuvs_bundle(path: Path) -> CuvsBundle:
    """Read a bundle back, checked.

    Raises:
        InputError: If the file is missing, of another kind, or its arrays contradict each other.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing. Give a file that write_cuvs_bundle wrote.")
    metadata, arrays = read_arrays(path)
    if metadata.get("format") != FORMAT or set(arrays) != set(ARRAYS):
        raise InputError(
            f"{path} must be of format {FORMAT} with {', '.join(ARRAYS)}; got {metadata.get('format')} with "
            f"{', '.join(sorted(arrays))}. Write it again."
        )
    bundle = CuvsBundle(
        metric=metadata["metric"],
        nbits=int(metadata["nbits"]),
        probe_all=metadata["probe_all"] == "true",
        **arrays,
    )
    wrong = _contradictions(bundle)
    if wrong:
        raise InputError(
            f"{path} contradicts itself: {', '.join(wrong)} do not fit the rest. Write it again."
        )
    return bundle


def _contradictions(bundle: CuvsBundle) -> list[str]:
    """Return the names of arrays whose type or shape does not fit the others."""
    books, width, codewords = bundle.pq_centers.shape if bundle.pq_centers.ndim == 3 else (0, 0, 0)
    dim, count, nlist = books * width, len(bundle.codes), len(bundle.centers_rot)
    shapes = {
        "pq_centers": (books, width, 2**bundle.nbits),
        "centers": (nlist, _padded_width(dim)),
        "centers_rot": (nlist, dim),
        "rotation_matrix": (dim, dim),
        "codes": (count, books),
        "ids": (count,),
        "offsets": (nlist + 1,),
    }
    wrong = [
        name
        for name, shape in shapes.items()
        if getattr(bundle, name).shape != shape or getattr(bundle, name).dtype != ARRAYS[name][0]
    ]
    sizes = np.diff(bundle.offsets)
    if "offsets" not in wrong and (
        bundle.offsets[0] != 0 or bundle.offsets[-1] != count or (sizes < 0).any()
    ):
        wrong.append("offsets")
    if "codes" not in wrong and count and int(bundle.codes.max()) >= codewords:
        wrong.append("codes")
    return wrong


def _list_numbers(prefix: UInt8[NDArray[np.uint8], "n B"]) -> Int[NDArray[np.int64], " n"]:
    """Invert `pack_list_numbers`: little-endian bytes to numbers."""
    return prefix.astype(np.int64) @ (1 << 8 * np.arange(prefix.shape[1], dtype=np.int64))


def _padded_width(dim: int) -> int:
    """Return `dim_ext`, D + 1 rounded up to 8."""
    return -(-(dim + 1) // 8) * 8


def _padded(centers: Float[NDArray[np.float32], "L D"]) -> Float[NDArray[np.float32], "L E"]:
    """Return centroids with their squared norm in column D, which cuVS's coarse L2 search multiplies by -1/2."""
    nlist, dim = centers.shape
    padded = np.zeros((nlist, _padded_width(dim)), dtype=np.float32)
    padded[:, :dim] = centers
    padded[:, dim] = (centers.astype(np.float64) ** 2).sum(1)
    return padded

"""Additive codes in FAISS's product quantizers: every part sees the whole query.

sum_m q . B[m, k_m] is the score of a product quantizer whose M parts are M copies of the query, with the codebooks
B[m]. FAISS's residual quantizers hold the same sums, but compute the table of M K D products anew for every probed
list; `IndexPQ` and `IndexIVFPQ` compute it once a query, and scan faster. For L2, further parts, which see a constant,
take away half the squared length of the decoded vector, in 2**8 steps or more. `faiss.RemapDimensionsTransform` makes
the copies, so the index itself takes plain queries.

Shapes: n documents, D dimensions, M codes, K values of a code, J lists, T codes of a length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from index._faiss import load_faiss
from index.builders.base import FaissIndex, num_lists, set_vector, split_lists
from index.decoders import decode_linear
from retriever.heads import NeuralCodec, pack_codes, pack_list_numbers, unpack_codes

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = ["fill_lists", "fill_scan"]

ROWS = 65_536  # documents worked on at once, to bound memory
LENGTH_BITS = 8  # of a length, or more, in whole codes
LINKS, CANDIDATES = (
    32,
    128,
)  # of the graph over centroids: links of one; candidates of a search and while building


def fill_scan(
    export: NeuralCodec, codes: UInt8[NDArray[np.uint8], "n size"], *, length_bits: int = LENGTH_BITS
) -> FaissIndex:
    """Return an index that scans all documents, by the first-order decoder of an export.

    Args:
        export: A fitted export.
        codes: Packed codes.
        length_bits: Of a length, for L2, or more, in whole codes.
    """
    assert export.additive is not None, "prepare fits the linear decoder"
    lengths = _Lengths(export, codes, length_bits)
    books = torch.cat([export.additive, lengths.codebooks])
    inner = load_faiss().IndexPQ(*_shape(books), export.code_bits, load_faiss().METRIC_INNER_PRODUCT)
    _set_codebooks(inner, books)
    for start in range(0, len(codes), ROWS):
        numbers = torch.hstack([_unpack(export, codes[start : start + ROWS]), lengths.codes(start)])
        inner.add_sa_codes(pack_codes(numbers, export.code_bits))
    return _taking_queries(inner, export, len(lengths.codebooks))


def fill_lists(
    export: NeuralCodec,
    codes: UInt8[NDArray[np.uint8], "n size"],
    *,
    list_codes: int = 0,
    graph: bool = False,
    length_bits: int = LENGTH_BITS,
) -> FaissIndex:
    """Return an index that scans the documents in the probed lists.

    Args:
        export: A fitted export.
        codes: Packed codes.
        list_codes: First codes that name a document's list, where the head has no lists.
        graph: Find the lists to probe by HNSW.
        length_bits: As in `fill_scan`.
    """
    assert export.additive is not None, "prepare fits the linear decoder"
    faiss = load_faiss()
    lengths = _Lengths(export, codes, length_bits)
    books = torch.cat([export.additive[list_codes:], lengths.codebooks])
    dim, parts = _shape(books)
    centroids = _centroids(export, list_codes)
    quantizer = _coarse_quantizer(centroids, dim, export, graph=graph)
    inner = faiss.IndexIVFPQ(
        quantizer, dim, len(centroids), parts, export.code_bits, faiss.METRIC_INNER_PRODUCT
    )
    inner.own_fields = True
    quantizer.this.disown()
    inner.by_residual = True  # adds the product of query and centroid, whatever the metric of the quantizer
    _set_codebooks(inner, books)
    powers = 2 ** (export.code_bits * torch.arange(list_codes))
    for start in range(0, len(codes), ROWS):
        numbers = _unpack(export, codes[start : start + ROWS])
        lists = (numbers[:, :list_codes] * powers).sum(1) if list_codes else numbers[:, 0]
        fine = torch.hstack([numbers[:, list_codes or 1 :], lengths.codes(start)])
        prefix = pack_list_numbers(lists.numpy(), len(centroids))
        inner.add_sa_codes(np.hstack([prefix, pack_codes(fine, export.code_bits)]))
    return _taking_queries(inner, export, len(lengths.codebooks))


def _unpack(export: NeuralCodec, codes: UInt8[NDArray[np.uint8], "n size"]) -> Int[Tensor, "n M"]:
    """Return codes as `CompressionHead.unpack` does: list numbers first, where the head has lists."""
    if not num_lists(export):
        return unpack_codes(codes, export.num_codes, export.code_bits)
    lists, fine = split_lists(export, codes)
    numbers = unpack_codes(fine, export.num_codes, export.code_bits)
    return torch.hstack([torch.from_numpy(lists)[:, None], numbers])


class _Lengths:
    """Half the squared lengths of decoded vectors as codes of a few further parts, for L2; no part for inner products.

    A length is rounded to one of K^T steps between the smallest and the largest; its codes are the digits to base K.
    """

    def __init__(self, export: NeuralCodec, codes: UInt8[NDArray[np.uint8], "n size"], bits: int) -> None:
        self._base = 2**export.code_bits
        self._digits = -(-bits // export.code_bits) if export.metric == "l2" else 0
        self._dim = export.dim
        self._steps = np.zeros((len(codes), 1), np.int64)
        self._least = self._step = 0.0
        if self._digits and len(codes):
            pieces = [_half_lengths(export, codes[s : s + ROWS]) for s in range(0, len(codes), ROWS)]
            self._round(np.concatenate(pieces).astype(np.float64))  # float32 has no room for many steps

    def _round(self, lengths: Float[NDArray[np.float64], " n"]) -> None:
        self._least = float(lengths.min())
        self._step = (float(lengths.max()) - self._least) / (self._base**self._digits - 1)
        steps = (lengths - self._least) / (self._step or 1)
        self._steps = np.rint(steps).astype(np.int64)[:, None]

    @property
    def codebooks(self) -> Float[Tensor, "T K D"]:
        """What each digit takes away, in the first dimension."""
        books = torch.zeros(self._digits, self._base, self._dim)
        for digit in range(self._digits):
            books[digit, :, 0] = -self._step * self._base**digit * torch.arange(self._base)
        books[:1, :, 0] -= self._least
        return books

    def codes(self, start: int) -> Int[Tensor, "n T"]:
        """Return the digits of some documents, `ROWS` from the first on."""
        steps = self._steps[start : start + ROWS]
        return torch.from_numpy(steps // self._base ** np.arange(self._digits) % self._base)


def _half_lengths(
    export: NeuralCodec, codes: UInt8[NDArray[np.uint8], "n size"]
) -> Float[NDArray[np.float32], " n"]:
    decoded = decode_linear(export, _unpack(export, codes), pairwise=False)
    return (decoded.square().sum(1) / 2).numpy()


def _shape(books: Float[Tensor, "P K D"]) -> tuple[int, int]:
    """Return the dimension of all copies of a query, and their number."""
    return len(books) * books.shape[2], len(books)


def _set_codebooks(inner: FaissIndex, books: Float[Tensor, "P K D"]) -> None:
    set_vector(inner.pq.centroids, books.numpy(), books.numel())
    inner.is_trained = True


def _centroids(export: NeuralCodec, list_codes: int) -> Float[NDArray[np.float32], "J D"]:
    """Return the head's centroids, or the sums of the first codewords: the first code counts fastest."""
    if export.centroids is not None:
        return np.ascontiguousarray(export.centroids.numpy(), dtype=np.float32)
    assert export.additive is not None, "prepare fits the linear decoder"
    found = export.additive[0]
    for book in export.additive[1:list_codes]:
        found = (book[:, None] + found[None]).flatten(0, 1)
    return np.ascontiguousarray(found.numpy(), dtype=np.float32)


def _coarse_quantizer(
    centroids: Float[NDArray[np.float32], "J D"], dim: int, export: NeuralCodec, *, graph: bool
) -> FaissIndex:
    """Return what finds the lists to probe: an index of centroids, which sees the first copy of a query only."""
    faiss = load_faiss()
    metric = faiss.METRIC_L2 if export.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    if graph:
        flat = faiss.IndexHNSWFlat(export.dim, LINKS, metric)
        flat.hnsw.efConstruction = flat.hnsw.efSearch = CANDIDATES
    else:
        flat = faiss.IndexFlat(export.dim, metric)
    flat.add(centroids)
    first = _copies(dim, np.arange(export.dim))
    quantizer = faiss.IndexPreTransform(first, flat)
    quantizer.is_trained = quantizer.own_fields = True
    first.this.disown()
    flat.this.disown()
    return quantizer


def _copies(dim: int, places: Int[NDArray[np.int64], " m"]) -> FaissIndex:
    """Return the transform of `dim` dimensions to those at `places`, 0 where a place is -1."""
    faiss = load_faiss()
    found = faiss.RemapDimensionsTransform(dim, len(places), False)
    faiss.copy_array_to_vector(places.astype(np.int32), found.map)
    return found


def _taking_queries(inner: FaissIndex, export: NeuralCodec, digits: int) -> FaissIndex:
    """Return a filled index behind the transforms that repeat a query and, for L2, a constant 1."""
    faiss = load_faiss()
    dim = export.dim
    words = inner.d // dim - digits
    constant = np.full(dim, -1)
    constant[0] = dim
    places = np.concatenate([np.tile(np.arange(dim), words), np.tile(constant, digits)])
    outer = faiss.IndexPreTransform(_copies(dim + bool(digits), places), inner)
    if digits:
        append = faiss.LinearTransform(dim, dim + 1, True)
        set_vector(append.A, np.eye(dim + 1, dim), (dim + 1) * dim)
        set_vector(append.b, np.eye(dim + 1)[dim], dim + 1)
        append.is_trained = True
        outer.prepend_transform(append)
    outer.is_trained = True
    assert (outer.d, outer.ntotal) == (dim, inner.ntotal), "the codes were added before wrapping"
    return outer

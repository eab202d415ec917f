"""Additive codebooks and codes in FAISS's residual quantizers; also product codebooks written as additive ones.

Shapes: n documents, D dimensions, M codebooks, K codewords, J lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from index._faiss import load_faiss
from index.builders.base import (
    FaissIndex,
    code_bits,
    faiss_metric,
    set_vector,
    split_lists,
    vector_dim,
)
from index.builders.lists import coarse_quantizer, default_nprobe, learned_centroids, take_quantizer
from retriever.heads import (
    AdditiveCodebooks,
    CoarseAdditiveCodebooks,
    CoarseProductCodebooks,
    ProductCodebooks,
    unpack_codes,
)

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from numpy.typing import NDArray

__all__ = [
    "ROWS",
    "decoded_lists",
    "empty_lists",
    "exact_search_type",
    "set_additive_codebooks",
    "with_norms",
]

ROWS = 65_536  # documents worked on at once, to bound memory


def exact_search_type(export: AdditiveCodebooks) -> int:
    """Return the search type that loses nothing: look-up sums for inner products, a float32 norm in each code for L2.

    `ST_LUT_nonorm` with L2 would rank wrongly, and the quantized norms approximate.
    """
    types = load_faiss().AdditiveQuantizer
    return int(types.ST_LUT_nonorm if export.metric == "inner_product" else types.ST_norm_float)


def set_additive_codebooks(built: FaissIndex, codewords: Float[NDArray[np.float32], "MK D"]) -> None:
    """Copy codewords, codebook after codebook, into an index that has an `rq`."""
    quantizer = built.rq
    set_vector(quantizer.codebooks, codewords, quantizer.total_codebook_size * quantizer.d)
    # tables of (M K)^2 products serve only FAISS's own encoder; the flag is in the file, so reading makes none either
    quantizer.train_type = load_faiss().ResidualQuantizer.Skip_codebook_tables
    quantizer.is_trained = True
    built.is_trained = True


def empty_lists(family: type[FaissIndex], export: CoarseAdditiveCodebooks, nprobe: int | None) -> FaissIndex:
    """Return an index of `family`, inverted lists of additive codes of residuals, that holds no document yet."""
    centroids = learned_centroids(export)
    quantizer = coarse_quantizer(centroids, export.metric)
    built = family(
        quantizer,
        vector_dim(export),
        len(centroids),
        len(export.codebooks),
        code_bits(export),
        faiss_metric(export),
        exact_search_type(export),
    )
    take_quantizer(built, quantizer)
    set_additive_codebooks(built, export.codebooks.numpy())
    built.by_residual = True
    built.nprobe = default_nprobe(nprobe, built.nlist)
    return built


def with_norms(
    built: FaissIndex, export: AdditiveCodebooks, codes: UInt8[NDArray[np.uint8], "n size"]
) -> UInt8[NDArray[np.uint8], "n size"]:
    """Return the codes as the quantizer of `built` stores them: with the decoded vector's squared norm, for L2."""
    if export.metric == "inner_product":
        return np.ascontiguousarray(codes)
    faiss = load_faiss()
    packed = np.empty((len(codes), built.rq.code_size), dtype=np.uint8)
    for start in range(0, len(codes), ROWS):
        part = packed[start : start + ROWS]
        numbers = unpack_codes(codes[start : start + ROWS], len(export.codebooks), code_bits(export))
        rows = np.ascontiguousarray(numbers.numpy(), dtype=np.int32)
        built.rq.pack_codes(len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(part), -1, None, None)
    return packed


def decoded_lists(
    export: CoarseProductCodebooks | CoarseAdditiveCodebooks, codes: UInt8[NDArray[np.uint8], "n size"]
) -> FaissIndex:
    """Return a flat index of the vectors that list number and code stand for, in the order of the codes.

    The list number becomes the first code of an additive quantizer, whose codewords are the centroids. Search
    decodes what it scores: made to score a short list exactly, not to scan.
    """
    faiss = load_faiss()
    centroids = learned_centroids(export)
    list_bits = max(1, (len(centroids) - 1).bit_length())
    books, bits = len(export.codebooks), code_bits(export)
    widths = faiss.UInt64Vector()
    for width in (list_bits, *[bits] * books):
        widths.push_back(width)
    built = faiss.IndexResidualQuantizer(
        vector_dim(export), widths, faiss_metric(export), faiss.AdditiveQuantizer.ST_decompress
    )
    unused = np.zeros((2**list_bits - len(centroids), centroids.shape[1]), dtype=np.float32)
    set_additive_codebooks(built, np.concatenate([centroids, unused, _whole_codewords(export)]))
    packed = np.empty((len(codes), built.rq.code_size), dtype=np.uint8)
    for start in range(0, len(codes), ROWS):
        lists, rest = split_lists(export, codes[start : start + ROWS])
        head = ((lists[:, None] >> np.arange(list_bits)) & 1).astype(np.uint8)
        tail = np.unpackbits(rest, axis=1, bitorder="little", count=books * bits)
        packed[start : start + ROWS] = np.packbits(np.hstack([head, tail]), axis=1, bitorder="little")
    built.add_sa_codes(packed)
    return built


def _whole_codewords(export: ProductCodebooks | AdditiveCodebooks) -> Float[NDArray[np.float32], "MK D"]:
    """Return codewords as vectors of D dimensions; those of a product quantizer are zero outside their sub-space."""
    codebooks = export.codebooks.numpy()
    if isinstance(export, AdditiveCodebooks):
        return codebooks.reshape(-1, codebooks.shape[2])
    books, codewords, width = codebooks.shape
    whole = np.zeros((books, codewords, books, width), dtype=np.float32)
    for book in range(books):
        whole[book, :, book] = codebooks[book]
    return whole.reshape(books * codewords, books * width)

"""Additive codebooks and codes in FAISS's residual quantizers; also product codebooks written as additive ones.

Shapes: n documents, D dimensions, M codebooks, K codewords, J lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np

from index._faiss import load_faiss
from index.builders.base import (
    FaissIndex,
    IndexBuilder,
    code_bits,
    faiss_metric,
    set_vector,
    split_lists,
    vector_dim,
)
from index.builders.lists import coarse_quantizer, default_nprobe, learned_centroids, take_quantizer
from retriever.errors import InputError
from retriever.heads import (
    AdditiveCodebooks,
    CoarseAdditiveCodebooks,
    CoarseProductCodebooks,
    FaissExport,
    ProductCodebooks,
    unpack_codes,
)

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from numpy.typing import NDArray

__all__ = [
    "ROWS",
    "AdditiveBuilder",
    "Norms",
    "decoded_lists",
    "empty_lists",
    "norm_range",
    "search_type",
    "set_additive_codebooks",
    "with_norms",
]

Norms = Literal["float32", "uint8", "none"]
ROWS = 65_536  # documents worked on at once, to bound memory
DRAWN = 16_384  # sums of codewords whose norms say what range to expect
STEP = 1 / 64  # to which the range is rounded outwards


@dataclass(frozen=True, slots=True, kw_only=True)
class AdditiveBuilder(IndexBuilder):
    """Base of the families that score additive codes as they are.

    Attributes:
        norms: How an L2 code stores the squared norm of its vector: "float32" in 4 bytes, exact, "uint8" in one
            (FAISS's Nqint8), or "none": FAISS decodes every document it scores, exactly, and takes longer; by default
            `usual_norms`.
    """

    usual_norms: ClassVar[Norms] = "float32"

    norms: Norms | None = None

    def __post_init__(self) -> None:
        if self.norms is not None and self.norms not in get_args(Norms):
            raise InputError(f"norms must be one of {', '.join(get_args(Norms))}, got {self.norms!r}.")

    def _check(self, export: FaissExport) -> None:
        if self.norms not in (None, "float32") and export.metric == "inner_product":
            raise InputError(
                f"inner products need no norms, got index.norms {self.norms}. Leave it out, or train with metric l2."
            )

    @property
    def approximation(self) -> str:
        """Norms of 256 values."""
        return "The documents' squared norms are rounded to one byte." if self.norms == "uint8" else ""

    @property
    def least_overlap(self) -> float:
        """Well below what docs/methods/rq.md measures."""
        return 0.8 if self.norms == "uint8" else 1.0

    @property
    def improvement(self) -> str:
        """Exact norms."""
        return "Set --index.norms float32." if self.norms == "uint8" else ""


def search_type(export: AdditiveCodebooks, norms: Norms = "float32") -> int:
    """Return how FAISS is to score: look-up sums for inner products, for L2 with a norm in each code, or decoded.

    `ST_LUT_nonorm` with L2 would rank wrongly.
    """
    types = load_faiss().AdditiveQuantizer
    if export.metric == "inner_product":
        return int(types.ST_LUT_nonorm)
    by_norms = {
        "float32": types.ST_norm_float,
        "uint8": types.ST_norm_qint8,
        "none": types.ST_decompress,
    }
    return int(by_norms[norms])


def norm_range(export: AdditiveCodebooks) -> tuple[float, float]:
    """Return between which squared norms one byte is to count: it depends on the codebooks alone.

    Norms of sums of codewords drawn at random, and a quarter of their range more on both sides. All parts of a corpus
    get the same, so they can be merged; a norm outside is taken for the end of the range.
    """
    codebooks = export.codebooks.double().numpy()
    books, codewords, dim = codebooks.shape
    codes = np.random.default_rng(0).integers(codewords, size=(DRAWN, books))
    sums = np.zeros((DRAWN, dim))
    for book in range(books):
        sums += codebooks[book, codes[:, book]]
    norms = np.square(sums).sum(1)
    low, high = norms.min(), norms.max()
    margin = (high - low) / 4
    return max(0.0, float(np.floor((low - margin) / STEP) * STEP)), float(
        np.ceil((high + margin) / STEP + 1) * STEP
    )


def set_additive_codebooks(built: FaissIndex, codewords: Float[NDArray[np.float32], "MK D"]) -> None:
    """Copy codewords, codebook after codebook, into an index that has an `rq`."""
    quantizer = built.rq
    set_vector(quantizer.codebooks, codewords, quantizer.total_codebook_size * quantizer.d)
    # tables of (M K)^2 products serve only FAISS's own encoder; the flag is in the file, so reading makes none either
    quantizer.train_type = load_faiss().ResidualQuantizer.Skip_codebook_tables
    quantizer.is_trained = True
    built.is_trained = True


def empty_lists(
    family: type[FaissIndex],
    export: CoarseAdditiveCodebooks,
    nprobe: int | None,
    documents: int | None,
    norms: Norms = "float32",
) -> FaissIndex:
    """Return an index of `family`, inverted lists of additive codes of residuals, for `documents` that it lacks yet.

    `nprobe` and `documents` as in `default_nprobe`.
    """
    centroids = learned_centroids(export)
    quantizer = coarse_quantizer(centroids, export.metric)
    built = family(
        quantizer,
        vector_dim(export),
        len(centroids),
        len(export.codebooks),
        code_bits(export),
        faiss_metric(export),
        search_type(export, norms),
    )
    take_quantizer(built, quantizer)
    set_additive_codebooks(built, export.codebooks.numpy())
    built.by_residual = True
    built.nprobe = default_nprobe(nprobe, built.nlist, documents)
    return built


def with_norms(
    built: FaissIndex, export: AdditiveCodebooks, codes: UInt8[NDArray[np.uint8], "n size"]
) -> UInt8[NDArray[np.uint8], "n size"]:
    """Return the codes as the quantizer of `built` stores them: with the decoded vector's squared norm if need be."""
    if built.rq.code_size == codes.shape[1]:  # it stores no norm
        return np.ascontiguousarray(codes)
    faiss = load_faiss()
    if built.rq.search_type == faiss.AdditiveQuantizer.ST_norm_qint8:
        built.rq.norm_min, built.rq.norm_max = norm_range(export)
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

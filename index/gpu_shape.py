"""What decides whether an index fits a GPU, and the bytes it takes there.

The formulas are FAISS 1.15's (faiss/gpu: StandardGpuResources.cpp, impl/IVFPQ.cu, impl/IVFBase.cu, impl/IVFUtils.cu,
impl/CuvsIVFPQ.cu) and, for cuVS, the list layout of cuVS's ivf_pq.hpp.

Shapes: n documents, D dimensions, L lists, M codebooks, K = 2**nbits codewords.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from index._faiss import load_faiss
from index.builders import FaissIndex

__all__ = [
    "FLAT",
    "ID_BYTES",
    "INVERTED",
    "TEMPORARY",
    "CardMemory",
    "GpuOptions",
    "IndexShape",
    "Indices",
    "Mode",
    "card_memory",
    "query_bytes",
    "shape_of",
    "table_bytes",
]

Indices = Literal["int64", "int32", "cpu"]
Mode = Literal["shards", "replicas"]

FLAT = ("IndexFlat", "IndexFlatIP", "IndexFlatL2")
INVERTED = ("IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer")
ID_BYTES: dict[Indices, int] = {"int64": 8, "int32": 4, "cpu": 0}  # a document, on the card
TEMPORARY = 1536 << 20  # bytes a card that StandardGpuResources sets aside; less on cards of 8 GiB or below
GRANULE = 512  # bytes to which cudaMalloc rounds up; every list is two allocations


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexShape:
    """What decides whether an index fits a GPU; of a built index (`shape_of`) or of one that is only planned.

    Attributes:
        kind: FAISS class, inside IndexPreTransform and IndexIDMap.
        d: Dimensions D that the inner index sees.
        ntotal: Documents n.
        metric: "inner_product" or "l2"; anything else FAISS has is refused.
        nlist: Lists L; 0 without lists.
        nprobe: Lists probed unless a search says otherwise.
        num_codebooks: M of a product quantizer.
        nbits: Bits of a product quantizer's code.
        by_residual: Whether codes are of residuals to the coarse centroids.
        polysemous: Hamming threshold of a polysemous search; 0 is off.
        quantizer: FAISS class of the coarse quantizer.
        quantizer_metric: Its metric.
        quantizer_ntotal: Its centroids; None means nlist.
        scalar_type: Name of a scalar quantizer's type, as `QT_8bit`.
        code_size: Bytes a document of a scalar quantizer.
        longest_list: Documents of the longest list; None means the mean.
        transformed: Whether an IndexPreTransform lies around it.
        trained: Whether the index is.
    """

    kind: str
    d: int
    ntotal: int
    metric: str = "inner_product"
    nlist: int = 0
    nprobe: int = 1
    num_codebooks: int = 0
    nbits: int = 8
    by_residual: bool = True
    polysemous: int = 0
    quantizer: str = "IndexFlatIP"
    quantizer_metric: str | None = None  # None means the index's own
    quantizer_ntotal: int | None = None
    scalar_type: str = ""
    code_size: int = 0
    longest_list: int | None = None
    transformed: bool = False
    trained: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CardMemory:
    """Bytes that an index takes on each card."""

    codes: int  # codes or vectors, each list rounded up to what an allocation takes
    ids: int
    centroids: int  # coarse centroids, their norms, the product quantizer's codewords twice, list pointers
    tables: int  # precomputed, L2 only
    temporary: int  # the arena of StandardGpuResources

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.codes + self.ids + self.centroids + self.tables + self.temporary


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """Arguments of `plan_gpu` with its defaults filled in; bytes and counts are a card's."""

    k: int
    nprobe: int
    cards: int
    mode: Mode
    cuvs: bool
    float16: bool
    precomputed: bool
    indices: Indices
    temporary: int


def shape_of(index: FaissIndex) -> IndexShape:
    """Return what decides about a built CPU index."""
    faiss = load_faiss()
    inner, transformed = faiss.downcast_index(index), False
    while isinstance(inner, (faiss.IndexPreTransform, faiss.IndexIDMap)):
        transformed |= isinstance(inner, faiss.IndexPreTransform)
        inner = faiss.downcast_index(inner.index)
    more: dict[str, object] = {}
    if isinstance(inner, faiss.IndexIVF):
        quantizer = faiss.downcast_index(inner.quantizer)
        more |= {
            "nlist": inner.nlist,
            "nprobe": inner.nprobe,
            "by_residual": inner.by_residual,
            "quantizer": type(quantizer).__name__,
            "quantizer_metric": _metric_name(quantizer.metric_type),
            "quantizer_ntotal": quantizer.ntotal,
            "longest_list": max((inner.invlists.list_size(row) for row in range(inner.nlist)), default=0),
        }
    if isinstance(inner, (faiss.IndexIVFPQ, faiss.IndexPQ)):
        more |= {"num_codebooks": inner.pq.M, "nbits": inner.pq.nbits}
    if isinstance(inner, faiss.IndexIVFPQ):
        more |= {"polysemous": inner.polysemous_ht}
    if isinstance(inner, (faiss.IndexScalarQuantizer, faiss.IndexIVFScalarQuantizer)):
        names = {getattr(faiss.ScalarQuantizer, n): n for n in dir(faiss.ScalarQuantizer) if n[:3] == "QT_"}
        more |= {"scalar_type": names[inner.sq.qtype], "code_size": inner.sq.code_size}
    return IndexShape(
        kind=type(inner).__name__,
        d=inner.d,
        ntotal=inner.ntotal,
        metric=_metric_name(inner.metric_type),
        transformed=transformed,
        trained=inner.is_trained,
        **more,  # type: ignore[arg-type]
    )


def table_bytes(shape: IndexShape, size: int) -> int:
    """Return the bytes of one query's look-up table, M K values."""
    return int(shape.num_codebooks * 2**shape.nbits * size)


def card_memory(shape: IndexShape, options: GpuOptions) -> CardMemory:
    """Return the bytes on the fullest card."""
    n = -(-shape.ntotal // options.cards) if options.mode == "shards" else shape.ntotal
    norms = 4 if shape.metric == "l2" else 0
    if shape.kind not in INVERTED:
        half = options.float16 or shape.kind == "IndexScalarQuantizer"
        codes = n * shape.d * (2 if half else 4) + n * norms
        return CardMemory(codes=codes, ids=0, centroids=0, tables=0, temporary=options.temporary)
    nlist = max(1, shape.nlist)
    centroids = nlist * (shape.d * 4 + norms) + nlist * 24
    tables = 0
    if shape.kind == "IndexIVFPQ":
        centroids += 2 * 4 * 2**shape.nbits * shape.d
        if options.precomputed and shape.metric == "l2" and not options.cuvs:
            tables = nlist * table_bytes(shape, 2 if options.float16 else 4)
    if options.cuvs:  # padded and rotated copies of the centroids, rotation matrix (impl/CuvsIVFPQ.cu)
        centroids += nlist * 4 * (-(-(shape.d + 1) // 8) * 8 + shape.d) + 4 * shape.d**2
    return CardMemory(
        codes=_list_bytes(n, nlist, _code_bytes(shape, cuvs=options.cuvs), cuvs=options.cuvs),
        ids=_list_bytes(n, nlist, ID_BYTES[options.indices], cuvs=options.cuvs),
        centroids=centroids,
        tables=tables,
        temporary=options.temporary,
    )


def _code_bytes(shape: IndexShape, *, cuvs: bool) -> int:
    """Return the bytes of a document's code on a card."""
    if shape.kind == "IndexIVFFlat":
        return shape.d * 4
    if shape.kind == "IndexIVFScalarQuantizer":
        return shape.code_size
    if cuvs:  # chunks of 16 bytes (cuVS: kIndexGroupVecLen)
        return -(-shape.num_codebooks // (128 // min(max(shape.nbits, 1), 128))) * 16
    return shape.num_codebooks


def _list_bytes(n: int, nlist: int, size: int, *, cuvs: bool) -> int:
    """Return the bytes of n rows of `size` bytes in lists of mean length, rounded up as they are allocated."""
    filled = max(1, min(n, nlist))
    rows = -(-n // filled)
    if cuvs:  # groups of 32 rows (cuVS: kIndexGroupSize)
        return filled * -(-rows // 32) * 32 * size
    return filled * (-(-rows * size // GRANULE) * GRANULE)


def query_bytes(shape: IndexShape, options: GpuOptions) -> int:
    """Return the temporary bytes of one query: getIVFPQPerQueryTempMemory and getIVFPerQueryTempMemory."""
    if shape.kind not in INVERTED:
        return 0
    shards = options.cards if options.mode == "shards" else 1
    longest = (
        shape.longest_list if shape.longest_list is not None else -(-shape.ntotal // max(1, shape.nlist))
    )
    nprobe = min(options.nprobe, max(1, shape.nlist))
    distances = 4 * nprobe * -(-longest // shards)
    selection = min(nprobe, 8) * options.k * 12
    tables = 0
    if shape.kind == "IndexIVFPQ" and not (options.precomputed and shape.metric == "l2"):
        tables = nprobe * table_bytes(shape, 4)
    return 2 * (8 * (nprobe + 1) + distances + selection + tables)


def _metric_name(metric: int) -> str:
    faiss = load_faiss()
    names = {faiss.METRIC_INNER_PRODUCT: "inner_product", faiss.METRIC_L2: "l2"}
    return names.get(metric, f"metric {metric}")

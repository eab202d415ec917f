"""Which FAISS indexes can live on a GPU, said before any work.

"Classic" is FAISS's own GPU code; "cuVS" is NVIDIA's, in the wheels that hold it. The rules are read
from FAISS 1.15 (faiss/gpu: GpuCloner.cpp, GpuIndexIVF.cu, GpuIndexIVFPQ.cu, GpuIndexIVFScalarQuantizer.cu,
impl/IndexUtils.cu, impl/IVFPQ.cu, impl/IVFUtils.cu, StandardGpuResources.cpp); docs/gpu.md has them as a table.

Shapes: n documents, D dimensions, L lists, M codebooks, K = 2**nbits codewords, S = D // M.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import get_args

from index._faiss import load_faiss
from index.builders import FaissIndex
from index.gpu_shape import (
    FLAT,
    ID_BYTES,
    INVERTED,
    TEMPORARY,
    CardMemory,
    GpuOptions,
    IndexShape,
    Indices,
    Mode,
    card_memory,
    query_bytes,
    shape_of,
    table_bytes,
)
from retriever.errors import InputError

__all__ = ["GpuPlan", "built_with_cuvs", "has_gpu_code", "plan_gpu"]

METRICS = ("inner_product", "l2")
CODEBOOKS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)  # IVFPQ::isSupportedPQCodeLength
# S that impl/PQCodeDistances has a kernel for
NATIVE_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32)
SCALAR_TYPES = (
    "QT_8bit",
    "QT_8bit_uniform",
    "QT_8bit_direct",
    "QT_4bit",
    "QT_4bit_uniform",
    "QT_6bit",
    "QT_fp16",
)
SHARED_MEMORY = 49_152  # bytes a block on every card since Kepler (cudaDeviceProp.sharedMemPerBlock)
SELECTION = {False: 2048, True: 16384}  # largest k and nprobe: classic, cuVS (getMaxKSelection)
MIN_QUERY_TILE = 8  # queries that a scan takes at once at least (getIVFQueryTileSize)

REMEDIES = {  # by a part of the class name, first match
    "Refine": "Clone its base_index and rerank on the CPU.",
    "PQR": "Export an IndexIVFPQ: a clone would drop the refinement codes.",
    "FastScan": "Clone the index it was converted from; 4 bits need cuVS.",
    "Residual": "Search on the CPU.",
    "Additive": "Search on the CPU.",
    "LocalSearch": "Search on the CPU.",
    "QINCo": "Search on the CPU.",
    "RaBitQ": "Search on the CPU.",
    "HNSW": "Search on the CPU, or export --index.kind flat.",
    "NSG": "Search on the CPU, or export --index.kind flat.",
    "Shards": "Clone the whole index to several cards.",
    "Replicas": "Clone the whole index to several cards.",
    "IndexPQ": "Export with --index.kind ivfpq --index.nlist 64: the same scores, from zero centroids.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlan:
    """Whether and how an index goes to a GPU.

    Attributes:
        reasons: Why it cannot: what, the value, what to do. Empty if it can.
        notes: What to know if it can: slower paths, what stays on the CPU.
        memory: Bytes on each card.
        query_bytes: Temporary bytes of one query in flight (IVFUtils.cu, two streams).
        cuvs: Whether cuVS's code is planned for, else classic.
        float16: Look-up tables (IndexIVFPQ) or stored vectors (IndexFlat) in half precision.
        precomputed: Whether tables of L2 residuals are kept on the card.
        indices: Where document numbers are kept.
        nprobe: Lists probed.
    """

    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    memory: CardMemory
    query_bytes: int
    cuvs: bool
    float16: bool
    precomputed: bool
    indices: Indices
    nprobe: int

    @property
    def possible(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons

    @property
    def bytes(self) -> int:
        """Bytes on each card."""
        return self.memory.total


def plan_gpu(
    index_or_shape: FaissIndex | IndexShape,
    *,
    cuvs: bool | None = None,
    k: int = 10,
    nprobe: int | None = None,
    cards: int = 1,
    memory_bytes: int | None = None,
    mode: Mode = "shards",
    float16: bool | None = None,
    precomputed: bool = False,
    indices: Indices = "int64",
    temporary: int = TEMPORARY,
) -> GpuPlan:
    """Say whether an index, built or planned, can live on GPUs, why not, and what it takes there.

    Args:
        index_or_shape: A CPU index, or the shape of one that does not exist yet.
        cuvs: cuVS's code or classic; by default as the installed FAISS is built (without a GPU build: classic).
        k: Results a query asked for.
        nprobe: Lists to probe; by default the index's own.
        cards: Number of GPUs.
        memory_bytes: Free bytes of a card; None leaves memory out of the verdict.
        mode: Several cards share the documents ("shards"), or each holds all of them ("replicas").
        float16: Half precision tables (IndexIVFPQ) or vectors (IndexFlat); by default only where classic tables would
            not fit a block's shared memory otherwise.
        precomputed: Keep tables of L2 residuals on the card: faster, 4 L M K bytes (2 with float16).
        indices: How document numbers are kept: 8 bytes, 4 bytes, or on the CPU.
        temporary: Bytes a card set aside for searches.

    Raises:
        InputError: If an argument is out of its range, whatever the index.
    """
    if cards < 1:
        raise InputError(f"cards must be at least 1, got {cards}.")
    if mode not in get_args(Mode):
        raise InputError(f"mode must be shards or replicas, got {mode!r}.")
    if indices not in ID_BYTES:
        raise InputError(f"indices must be one of {', '.join(ID_BYTES)}, got {indices!r}.")
    shape = index_or_shape if isinstance(index_or_shape, IndexShape) else shape_of(index_or_shape)
    cuvs = built_with_cuvs() if cuvs is None else cuvs
    nprobe = shape.nprobe if nprobe is None else nprobe
    if float16 is None:
        float16 = not cuvs and shape.kind == "IndexIVFPQ" and table_bytes(shape, 4) > SHARED_MEMORY
    options = GpuOptions(k, nprobe, cards, mode, cuvs, float16, precomputed, indices, temporary)
    memory = card_memory(shape, options)
    reasons = [*_kind_reasons(shape, options), *_search_reasons(shape, options)]
    reasons += _coarse_reasons(shape)
    if shape.kind == "IndexIVFPQ":
        reasons += _cuvs_product_reasons(shape) if cuvs else _classic_product_reasons(shape, options)
    if shape.kind == "IndexIVFScalarQuantizer":
        reasons += _scalar_reasons(shape, options)
    if memory_bytes is not None and memory.total > memory_bytes:
        reasons.append(
            f"it takes {memory.total:,} bytes of a card, and {memory_bytes:,} are free. Take more cards with "
            "mode=shards, lower temporary, or choose fewer bytes a document."
        )
    per_query = query_bytes(shape, options)
    return GpuPlan(
        reasons=tuple(reasons),
        notes=tuple(_notes(shape, options, per_query)),
        memory=memory,
        query_bytes=per_query,
        cuvs=cuvs,
        float16=float16,
        precomputed=precomputed,
        indices=indices,
        nprobe=nprobe,
    )


# --- the rules ---


def _kind_reasons(shape: IndexShape, options: GpuOptions) -> Iterator[str]:
    half_flat = shape.kind == "IndexScalarQuantizer" and shape.scalar_type == "QT_fp16"
    if not (shape.kind in FLAT or shape.kind in INVERTED or half_flat):
        remedy = next((text for part, text in REMEDIES.items() if part in shape.kind), "Search on the CPU.")
        named = f"{shape.kind} {shape.scalar_type}".strip()
        yield f"FAISS has no GPU form of {named}. {remedy}"
    if options.cuvs and shape.kind in ("IndexScalarQuantizer", "IndexIVFScalarQuantizer"):
        yield f"cuVS does not take {shape.kind}. Choose cuvs=False."
    if half_flat and options.cards > 1:
        yield (
            f"FAISS clones IndexScalarQuantizer to one card only, got {options.cards} cards; with several it would "
            "stay on the CPU. Give one device."
        )
    if shape.metric not in METRICS:
        yield f"a GPU index scores by inner product or L2, got {shape.metric}. Export with one of them."
    if not shape.trained:
        yield "the index is not trained, got is_trained=False. Build it with Endex or train it first."
    if options.cuvs and options.indices != "int64":
        yield f"cuVS keeps document numbers as int64 only, got indices={options.indices!r}. Leave it out."
    if options.indices == "int32" and shape.ntotal > 2**31 - 1:
        yield f"int32 numbers {2**31 - 1:,} documents, got {shape.ntotal:,}. Choose indices int64."


def _search_reasons(shape: IndexShape, options: GpuOptions) -> Iterator[str]:
    limit = SELECTION[options.cuvs]
    remedy = f"Ask for at most {limit}" + ("." if options.cuvs else f"; cuVS goes to {SELECTION[True]}.")
    if not 1 <= options.k <= limit:
        yield f"k must be between 1 and {limit}, got {options.k}. {remedy}"
    if shape.nlist and not 1 <= options.nprobe <= limit:
        yield (
            f"nprobe must be between 1 and {limit}, got {options.nprobe}. {remedy} A flat quantizer spread over lists "
            "probes them all: export it with fewer, --index.nlist."
        )
    if shape.nlist and options.cuvs and options.nprobe > shape.nlist:
        yield f"cuVS probes at most nlist={shape.nlist} lists, got nprobe={options.nprobe}. Lower nprobe."


def _coarse_reasons(shape: IndexShape) -> Iterator[str]:
    if shape.kind not in INVERTED:
        return
    if shape.nlist < 1:
        yield f"nlist must be at least 1, got {shape.nlist}. Give the number of lists."
    if shape.quantizer not in FLAT:
        yield (
            f"the coarse quantizer must be an IndexFlat, got {shape.quantizer}. Put the same centroids into an "
            "IndexFlat (faiss.contrib.ivf_tools.replace_ivf_quantizer)."
        )
    if shape.quantizer_ntotal is not None and shape.quantizer_ntotal != shape.nlist:
        yield (
            f"the coarse quantizer must hold nlist={shape.nlist} centroids, got {shape.quantizer_ntotal}. Export again."
        )
    coarse = shape.quantizer_metric or shape.metric
    if shape.kind != "IndexIVFFlat" and shape.by_residual and coarse != shape.metric:
        yield (
            f"a GPU adds the coarse score as the coarse quantizer returns it, so its metric must be the index's "
            f"{shape.metric}, got {coarse}. Export again with that coarse quantizer."
        )


def _product_reasons(shape: IndexShape) -> Iterator[str]:
    if shape.num_codebooks < 1 or shape.d % shape.num_codebooks:
        yield (
            f"the dimension must be a multiple of the codebooks, got d={shape.d} and M={shape.num_codebooks}. "
            "Train with another num_codebooks."
        )
    if not shape.by_residual:
        yield (
            "GPU codes are of residuals, got by_residual=False. Set zeros as centroids, of which such codes are "
            "residuals, or search on the CPU."
        )
    if shape.polysemous:
        yield f"a GPU has no polysemous search, got polysemous_ht={shape.polysemous}. Set it to 0."


def _classic_product_reasons(shape: IndexShape, options: GpuOptions) -> Iterator[str]:
    yield from _product_reasons(shape)
    if shape.nbits != 8:
        yield f"codes must have 8 bits, got nbits={shape.nbits}. Train with codebook_bits=8, or use cuVS (4 to 8 bits)."
    if shape.num_codebooks not in CODEBOOKS:
        known = ", ".join(map(str, CODEBOOKS))
        yield (
            f"num_codebooks must be one of {known}, got M={shape.num_codebooks}. Train with one of these, or use "
            "cuVS."
        )
    table = table_bytes(shape, 2 if options.float16 else 4)
    if table > SHARED_MEMORY:
        remedy = "Take fewer codebooks." if options.float16 else "Choose float16=True or leave it out."
        yield (
            f"look-up tables must fit {SHARED_MEMORY} bytes of shared memory, got {table} for "
            f"M={shape.num_codebooks}. {remedy}"
        )


def _cuvs_product_reasons(shape: IndexShape) -> Iterator[str]:
    yield from _product_reasons(shape)
    if not 4 <= shape.nbits <= 8:
        yield f"cuVS codes have 4 to 8 bits, got nbits={shape.nbits}. Train with codebook_bits in that range."
    bits = shape.num_codebooks * shape.nbits
    if bits % 8:
        yield (
            f"cuVS codes fill whole bytes, got M={shape.num_codebooks} times nbits={shape.nbits} = {bits} bits. "
            "Train with an even num_codebooks."
        )


def _scalar_reasons(shape: IndexShape, options: GpuOptions) -> Iterator[str]:
    if shape.scalar_type not in SCALAR_TYPES:
        yield f"a GPU knows the scalar types {', '.join(SCALAR_TYPES)}, got {shape.scalar_type}. Export one of them."
    limit = SHARED_MEMORY // 8  # two float32 a dimension in shared memory
    if shape.scalar_type in ("QT_8bit", "QT_4bit") and shape.d >= limit and not options.cuvs:
        yield f"{shape.scalar_type} takes fewer than {limit} dimensions on a GPU, got {shape.d}. Choose QT_fp16."


def _notes(shape: IndexShape, options: GpuOptions, per_query: int) -> Iterator[str]:
    if shape.transformed:
        yield "the rotation is applied to queries on the CPU."
    if (
        shape.kind == "IndexIVFPQ"
        and not options.cuvs
        and shape.num_codebooks
        and shape.d % shape.num_codebooks == 0
    ):
        width = shape.d // shape.num_codebooks
        if width not in NATIVE_WIDTHS:
            yield f"no kernel for {width} dimensions a codebook: look-ups go through a matrix product, which is slower."
    if options.float16 and shape.kind == "IndexIVFPQ":
        yield "look-up tables in half precision: scores are rounded to about 3 digits."
    elif options.float16 and shape.kind in FLAT:
        yield "vectors are stored in half precision: scores are rounded to about 3 digits."
    elif options.float16:
        yield f"float16 changes nothing for {shape.kind}."
    if options.precomputed and (shape.metric != "l2" or shape.kind != "IndexIVFPQ" or options.cuvs):
        yield "precomputed tables serve classic L2 IndexIVFPQ only; none are made."
    if not options.cuvs and MIN_QUERY_TILE * per_query > options.temporary:
        yield (
            f"{MIN_QUERY_TILE} queries at once need {MIN_QUERY_TILE * per_query:,} temporary bytes, more than the "
            f"{options.temporary:,} set aside: FAISS then allocates in every search, which is slow. Raise temporary or "
            "lower nprobe."
        )


# --- FAISS ---


def has_gpu_code(faiss: ModuleType) -> bool:
    """Return whether this FAISS was built for GPUs."""
    return hasattr(faiss, "StandardGpuResources")


def built_with_cuvs() -> bool:
    """Return whether FAISS is a cuVS build: there, and only there, its own default is cuVS (GpuClonerOptions.h)."""
    faiss = load_faiss()
    return has_gpu_code(faiss) and bool(faiss.GpuClonerOptions().use_cuvs)

"""A CPU index cloned to GPUs, after the rules of `index.gpu_rules` have allowed it.

A GPU index is always a clone: FAISS adds no codes on a GPU, so the index is built on the CPU from codebooks and codes
and uploaded.

Shapes: B queries, D dimensions, P probed lists, k results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from index._faiss import load_faiss
from index.builders import FaissIndex
from index.gpu_rules import GpuPlan, built_with_cuvs, has_gpu_code, plan_gpu
from index.gpu_shape import TEMPORARY, CardMemory, IndexShape, Indices, Mode, shape_of
from retriever.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import NDArray

__all__ = [
    "CardMemory",
    "GpuPlan",
    "IndexShape",
    "NonResidualGpuIndex",
    "plan_gpu",
    "search_without_coarse",
    "shape_of",
    "to_gpu",
]


def to_gpu(
    index: FaissIndex,
    *,
    devices: Sequence[int] = (0,),
    k: int = 10,
    nprobe: int | None = None,
    float16: bool | None = None,
    mode: Mode = "shards",
    cuvs: bool | None = None,
    precomputed: bool = False,
    indices: Indices = "int64",
    temporary: int = TEMPORARY,
) -> FaissIndex:
    """Clone a CPU index to one or several GPUs; the CPU index stays as it is.

    Args:
        index: What a builder made, or `faiss.read_index` read.
        devices: Numbers of the cards, as CUDA counts them.
        k: Largest number of results that searches will ask for.
        nprobe: Lists that the clone probes; by default the index's own.
        float16: See `plan_gpu`, as the other arguments.
        mode: See `plan_gpu`.
        cuvs: See `plan_gpu`.
        precomputed: See `plan_gpu`.
        indices: See `plan_gpu`.
        temporary: See `plan_gpu`.

    Returns:
        A FAISS index on the cards, searched like any other; it keeps its cards' resources alive.

    Raises:
        InputError: If a rule forbids it (all reasons at once), FAISS has no GPU support, or a card is not there.
    """
    free = _free_bytes(devices)
    plan = plan_gpu(
        index,
        cuvs=cuvs,
        k=k,
        nprobe=nprobe,
        cards=max(1, len(devices)),
        memory_bytes=free,
        mode=mode,
        float16=float16,
        precomputed=precomputed,
        indices=indices,
        temporary=temporary,
    )
    if not plan.possible:
        raise InputError("the index cannot go to a GPU: " + " Also: ".join(plan.reasons))
    faiss = _faiss_with_cards(devices, cuvs=plan.cuvs)
    options = faiss.GpuMultipleClonerOptions()
    options.shard = mode == "shards"
    options.use_cuvs = plan.cuvs
    options.useFloat16 = plan.float16
    options.usePrecomputed = plan.precomputed
    options.indicesOptions = {
        "int64": faiss.INDICES_64_BIT,
        "int32": faiss.INDICES_32_BIT,
        "cpu": faiss.INDICES_CPU,
    }[plan.indices]
    resources = [faiss.StandardGpuResources() for _ in devices]
    for each in resources:
        each.setTempMemory(temporary)
    lists = faiss.try_extract_index_ivf(index)
    before = lists.nprobe if lists else 0
    try:
        if lists:
            lists.nprobe = plan.nprobe  # cloning checks and copies it
        clone = faiss.index_cpu_to_gpu_multiple_py(resources, index, options, list(devices))
    finally:
        if lists:
            lists.nprobe = before
    clone.referenced_objects = resources
    return clone


class NonResidualGpuIndex:
    """Inner-product search on a GPU over codes of whole vectors in lists, which FAISS has on the CPU only.

    A classic `GpuIndexIVFPQ` scores a document by the coarse score it is given plus the sum of look-ups, <q, c> +
    sum_m <q_m, r_m>. Given zeros as coarse scores it returns the sum alone: the score of a code without residual. The
    coarse search itself runs on the CPU. L2 has no such form: its look-ups contain the centroid.

    Args:
        index: IndexIVFPQ with `by_residual=False`, or an IndexPreTransform around it. It must outlive this object.
        device: Number of the card.
        k: Largest number of results that searches will ask for.
        nprobe: Lists to probe; by default the index's own.
        float16: See `plan_gpu`.

    Raises:
        InputError: If the index has another form, or `to_gpu` refuses it.
    """

    def __init__(
        self,
        index: FaissIndex,
        *,
        device: int = 0,
        k: int = 10,
        nprobe: int | None = None,
        float16: bool | None = None,
    ) -> None:
        faiss = load_faiss()
        shape = shape_of(index)
        if shape.kind != "IndexIVFPQ" or shape.by_residual or shape.metric != "inner_product":
            raise InputError(
                f"this search needs an IndexIVFPQ of inner products with by_residual=False, got {shape.kind}, "
                f"{shape.metric}, by_residual={shape.by_residual}. Use to_gpu."
            )
        self._index = faiss.downcast_index(index)
        self._lists = faiss.downcast_index(faiss.try_extract_index_ivf(index))
        self.nprobe = shape.nprobe if nprobe is None else nprobe
        self._lists.by_residual = True  # what the clone is told; it is never asked for its own coarse scores
        try:
            self._clone = to_gpu(
                self._lists, devices=[device], k=k, nprobe=self.nprobe, float16=float16, cuvs=False
            )
        finally:
            self._lists.by_residual = False

    def search(
        self, queries: Float[NDArray[np.float32], "B D"], k: int
    ) -> tuple[Float[NDArray[np.float32], "B k"], Int[NDArray[np.int64], "B k"]]:
        """Return scores, falling, and rows."""
        x = np.ascontiguousarray(queries, dtype=np.float32)
        for transform in _transforms(self._index):
            x = transform.apply(x)
        _, lists = self._lists.quantizer.search(x, self.nprobe)
        return search_without_coarse(self._clone, x, lists, k)


def search_without_coarse(
    lists: FaissIndex,
    queries: Float[NDArray[np.float32], "B D"],
    probed: Int[NDArray[np.int64], "B P"],
    k: int,
) -> tuple[Float[NDArray[np.float32], "B k"], Int[NDArray[np.int64], "B k"]]:
    """Search given lists with zeros as coarse scores; `lists.nprobe` must be P."""
    return lists.search_preassigned(queries, k, probed, np.zeros(probed.shape, dtype=np.float32))  # type: ignore[no-any-return]


def _faiss_with_cards(devices: Sequence[int], *, cuvs: bool) -> ModuleType:
    """Return FAISS if it can use these cards."""
    faiss = load_faiss()
    if not has_gpu_code(faiss):
        raise InputError(
            f"the FAISS installed ({faiss.__version__}) has no GPU support. Run: pip uninstall -y faiss-cpu && pip "
            "install 'endex[gpu]'  (or [cuvs]); docs/gpu.md says which wheel fits which CUDA."
        )
    count = faiss.get_num_gpus()
    if not count:
        raise InputError(
            "FAISS sees no GPU, got 0 cards. Check that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES does not "
            "hide it."
        )
    if not devices or len(set(devices)) != len(devices) or not all(0 <= each < count for each in devices):
        raise InputError(
            f"devices must be different numbers between 0 and {count - 1}, got {list(devices)}. Give one for each card."
        )
    if cuvs and not built_with_cuvs():
        raise InputError(
            f"the FAISS installed ({faiss.__version__}) has no cuVS, got cuvs=True. Run: pip uninstall -y faiss-gpu && "
            "pip install 'endex[cuvs]', or choose cuvs=False."
        )
    return faiss


def _free_bytes(devices: Sequence[int]) -> int | None:
    """Return the free bytes of the fullest card, or None where torch cannot tell."""
    if not torch.cuda.is_available():
        return None
    known = [each for each in devices if 0 <= each < torch.cuda.device_count()]
    return min((torch.cuda.mem_get_info(each)[0] for each in known), default=None)


def _transforms(index: FaissIndex) -> Iterator[FaissIndex]:
    """Yield the vector transforms that lie around an index, outermost first."""
    faiss = load_faiss()
    if isinstance(index, faiss.IndexPreTransform):
        for row in range(index.chain.size()):
            yield faiss.downcast_VectorTransform(index.chain.at(row))

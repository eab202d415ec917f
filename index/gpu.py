"""A CPU index cloned to GPUs, after the rules of `index.gpu_rules` have allowed it.

A GPU index is always a clone: FAISS adds no codes on a GPU, so the index is built on the CPU from codebooks and codes
and uploaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from index._faiss import load_faiss
from index.builders import FaissIndex
from index.gpu_rules import GpuPlan, built_with_cuvs, has_gpu_code, plan_gpu
from index.gpu_shape import TEMPORARY, CardMemory, IndexShape, Indices, Mode, shape_of
from retriever.errors import InputError

__all__ = [
    "CardMemory",
    "GpuPlan",
    "IndexShape",
    "plan_gpu",
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

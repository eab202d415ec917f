"""Codes -> FAISS -> answers. The only package that imports FAISS, and only when it is used."""

from index.artifact import (
    ExportReport,
    ShardReport,
    export_index,
    export_shard,
)
from index.clustering import FaissFit
from index.config import IndexConfig
from index.encode import Shard, count_blocks
from index.estimate import ExportEstimate, estimate_export
from index.gpu import GpuPlan, IndexShape, plan_gpu, to_gpu
from index.merge import merge_indexes
from index.parity import Parity, ParityError, assert_parity, prove_parity
from index.search import Searcher
from index.stages import Widths

__all__ = [
    "ExportEstimate",
    "ExportReport",
    "FaissFit",
    "GpuPlan",
    "IndexConfig",
    "IndexShape",
    "Parity",
    "ParityError",
    "Searcher",
    "Shard",
    "ShardReport",
    "Widths",
    "assert_parity",
    "count_blocks",
    "estimate_export",
    "export_index",
    "export_shard",
    "merge_indexes",
    "plan_gpu",
    "prove_parity",
    "to_gpu",
]

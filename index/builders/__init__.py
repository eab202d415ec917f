"""Index families: one family, one file. A new family is one file and one line of `BUILDERS`."""

from index.builders.base import FaissIndex, IndexBuilder, inverted_file, probing_all, search_index
from index.builders.cascade import CascadeBuilder
from index.builders.flat import FlatBuilder
from index.builders.hnsw import HNSWBuilder
from index.builders.hnsw_sq8 import HNSWSQ8Builder
from index.builders.ivfflat import IVFFlatBuilder
from index.builders.ivfpq import IVFPQBuilder
from index.builders.ivfpq_fastscan import IVFPQFastScanBuilder
from index.builders.ivfrq import IVFRQBuilder
from index.builders.ivfrq_fastscan import IVFRQFastScanBuilder
from index.builders.pq import PQBuilder
from index.builders.pq_fastscan import PQFastScanBuilder
from index.builders.rq import RQBuilder
from index.builders.rq_fastscan import RQFastScanBuilder
from index.builders.sq4 import SQ4Builder
from index.builders.sq8 import SQ8Builder

BUILDERS: dict[str, type[IndexBuilder]] = {
    "flat": FlatBuilder,
    "sq8": SQ8Builder,
    "sq4": SQ4Builder,
    "hnsw": HNSWBuilder,
    "hnsw_sq8": HNSWSQ8Builder,
    "pq": PQBuilder,
    "pq_fastscan": PQFastScanBuilder,
    "ivfflat": IVFFlatBuilder,
    "ivfpq": IVFPQBuilder,
    "ivfpq_fastscan": IVFPQFastScanBuilder,
    "rq": RQBuilder,
    "rq_fastscan": RQFastScanBuilder,
    "ivfrq": IVFRQBuilder,
    "ivfrq_fastscan": IVFRQFastScanBuilder,
    "cascade": CascadeBuilder,
}

__all__ = [
    "BUILDERS",
    "CascadeBuilder",
    "FaissIndex",
    "FlatBuilder",
    "HNSWBuilder",
    "HNSWSQ8Builder",
    "IVFFlatBuilder",
    "IVFPQBuilder",
    "IVFPQFastScanBuilder",
    "IVFRQBuilder",
    "IVFRQFastScanBuilder",
    "IndexBuilder",
    "PQBuilder",
    "PQFastScanBuilder",
    "RQBuilder",
    "RQFastScanBuilder",
    "SQ4Builder",
    "SQ8Builder",
    "inverted_file",
    "probing_all",
    "search_index",
]

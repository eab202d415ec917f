"""Index families: one family, one file. A new family is one file and one line of `BUILDERS`."""

from index.builders.base import FaissIndex, IndexBuilder, inverted_file, probing_all, search_index
from index.builders.flat import FlatBuilder
from index.builders.ivfpq import IVFPQBuilder
from index.builders.pq import PQBuilder

BUILDERS: dict[str, type[IndexBuilder]] = {
    "flat": FlatBuilder,
    "pq": PQBuilder,
    "ivfpq": IVFPQBuilder,
}

__all__ = [
    "BUILDERS",
    "FaissIndex",
    "FlatBuilder",
    "IVFPQBuilder",
    "IndexBuilder",
    "PQBuilder",
    "inverted_file",
    "probing_all",
    "search_index",
]

"""Codes -> FAISS -> answers. The only package that imports FAISS, and only when it is used."""

from index.artifact import ExportReport, export_index
from index.clustering import FaissFit
from index.config import IndexConfig
from index.parity import ParityError, assert_parity
from index.search import Searcher

__all__ = [
    "ExportReport",
    "FaissFit",
    "IndexConfig",
    "ParityError",
    "Searcher",
    "assert_parity",
    "export_index",
]

"""Compression heads: one method, one file. A new head is one file and one line of `HEADS`."""

from retriever.heads.base import (
    CompressionHead,
    FaissExport,
    FlatVectors,
    HeadConfig,
    HeadOutput,
    ProductCodebooks,
    QuantizerFit,
    pack_codes,
    unpack_codes,
)
from retriever.heads.none import NoCompression, NoCompressionConfig
from retriever.heads.pq import ProductQuantizer, ProductQuantizerConfig

HEADS: dict[str, type[HeadConfig]] = {
    "none": NoCompressionConfig,
    "pq": ProductQuantizerConfig,
}

__all__ = [
    "HEADS",
    "CompressionHead",
    "FaissExport",
    "FlatVectors",
    "HeadConfig",
    "HeadOutput",
    "NoCompression",
    "NoCompressionConfig",
    "ProductCodebooks",
    "ProductQuantizer",
    "ProductQuantizerConfig",
    "QuantizerFit",
    "pack_codes",
    "unpack_codes",
]

"""Compression heads: one method, one file. A new head is one file and one line of `HEADS`."""

from retriever.heads.base import (
    AdditiveCodebooks,
    CoarseAdditiveCodebooks,
    CoarseProductCodebooks,
    CompressionHead,
    FaissExport,
    FlatVectors,
    HeadConfig,
    HeadOutput,
    NeuralCodec,
    ProductCodebooks,
    QuantizerFit,
    pack_codes,
    pack_list_numbers,
    unpack_codes,
)
from retriever.heads.ivfpq import IVFProductQuantizer, IVFProductQuantizerConfig
from retriever.heads.none import NoCompression, NoCompressionConfig
from retriever.heads.pq import ProductQuantizer, ProductQuantizerConfig

HEADS: dict[str, type[HeadConfig]] = {
    "none": NoCompressionConfig,
    "pq": ProductQuantizerConfig,
    "ivfpq": IVFProductQuantizerConfig,
}

__all__ = [
    "HEADS",
    "AdditiveCodebooks",
    "CoarseAdditiveCodebooks",
    "CoarseProductCodebooks",
    "CompressionHead",
    "FaissExport",
    "FlatVectors",
    "HeadConfig",
    "HeadOutput",
    "IVFProductQuantizer",
    "IVFProductQuantizerConfig",
    "NeuralCodec",
    "NoCompression",
    "NoCompressionConfig",
    "ProductCodebooks",
    "ProductQuantizer",
    "ProductQuantizerConfig",
    "QuantizerFit",
    "pack_codes",
    "pack_list_numbers",
    "unpack_codes",
]

"""Compression heads: one method, one file. A new head is one file and one line of `HEADS`."""

from retriever.heads.base import (
    CompressionHead,
    HeadConfig,
    HeadOutput,
    QuantizerFit,
    pack_codes,
    pack_list_numbers,
    unpack_codes,
)
from retriever.heads.cnt import CNT, CNTConfig
from retriever.heads.exports import (
    AdditiveCodebooks,
    CoarseAdditiveCodebooks,
    CoarseFlatVectors,
    CoarseProductCodebooks,
    FaissExport,
    FlatVectors,
    NeuralCodec,
    ProductCodebooks,
)
from retriever.heads.ivfflat import IVFFlat, IVFFlatConfig
from retriever.heads.ivfpq import IVFProductQuantizer, IVFProductQuantizerConfig
from retriever.heads.ivfrq import IVFResidualQuantizer, IVFResidualQuantizerConfig
from retriever.heads.none import NoCompression, NoCompressionConfig
from retriever.heads.pca import PCA, PCAConfig
from retriever.heads.pq import ProductQuantizer, ProductQuantizerConfig
from retriever.heads.projection import Projection, ProjectionConfig
from retriever.heads.qinco import QINCo, QINCoConfig
from retriever.heads.qinco2 import QINCo2, QINCo2Config
from retriever.heads.rq import ResidualQuantizer, ResidualQuantizerConfig
from retriever.heads.unq import UNQ, UNQConfig

HEADS: dict[str, type[HeadConfig]] = {
    "none": NoCompressionConfig,
    "pq": ProductQuantizerConfig,
    "ivfpq": IVFProductQuantizerConfig,
    "rq": ResidualQuantizerConfig,
    "ivfrq": IVFResidualQuantizerConfig,
    "qinco": QINCoConfig,
    "qinco2": QINCo2Config,
    "unq": UNQConfig,
    "cnt": CNTConfig,
    "pca": PCAConfig,
    "projection": ProjectionConfig,
    "ivfflat": IVFFlatConfig,
}

__all__ = [
    "CNT",
    "HEADS",
    "PCA",
    "UNQ",
    "AdditiveCodebooks",
    "CNTConfig",
    "CoarseAdditiveCodebooks",
    "CoarseFlatVectors",
    "CoarseProductCodebooks",
    "CompressionHead",
    "FaissExport",
    "FlatVectors",
    "HeadConfig",
    "HeadOutput",
    "IVFFlat",
    "IVFFlatConfig",
    "IVFProductQuantizer",
    "IVFProductQuantizerConfig",
    "IVFResidualQuantizer",
    "IVFResidualQuantizerConfig",
    "NeuralCodec",
    "NoCompression",
    "NoCompressionConfig",
    "PCAConfig",
    "ProductCodebooks",
    "ProductQuantizer",
    "ProductQuantizerConfig",
    "Projection",
    "ProjectionConfig",
    "QINCo",
    "QINCo2",
    "QINCo2Config",
    "QINCoConfig",
    "QuantizerFit",
    "ResidualQuantizer",
    "ResidualQuantizerConfig",
    "UNQConfig",
    "pack_codes",
    "pack_list_numbers",
    "unpack_codes",
]

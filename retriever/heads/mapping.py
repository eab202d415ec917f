"""MappingHead: a map to fewer dimensions in front of another head, which compresses what comes out.

Shapes: N documents, B queries, D dimensions, E dimensions of the map's output, M codes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from retriever.errors import InputError
from retriever.heads.base import CompressionHead, HeadConfig, HeadOutput
from retriever.heads.exports import FaissExport
from retriever.heads.none import NoCompressionConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = ["MappingHead", "MappingHeadConfig"]


@dataclass(frozen=True, kw_only=True)
class MappingHeadConfig(HeadConfig):
    """Base of the configurations of heads that map.

    Attributes:
        inner: Head that compresses the output, with metric l2; by default none, which leaves float32 vectors.
    """

    maps: ClassVar[bool] = True

    inner: HeadConfig | None = None

    def __post_init__(self) -> None:
        if self.inner is not None and (self.inner.maps or isinstance(self.inner, NoCompressionConfig)):
            raise InputError(
                f"inner must be a head that quantizes, got {self.inner.name!r}. Leave inner out for float vectors."
            )

    @abstractmethod
    def out_dim(self, dim: int) -> int:
        """Return E for vectors of `dim` dimensions."""

    @property
    def selects_softly(self) -> bool:
        """Whether the inner head's codes have probabilities."""
        return self.inner is not None and self.inner.selects_softly

    def check(self, dim: int) -> None:
        """Raise InputError if the inner head cannot compress the output."""
        if self.inner is not None:
            self.inner.check(self.out_dim(dim))

    def check_sample(self, documents: int) -> None:
        """Raise InputError if the warm start would have too few documents for the inner head."""
        if self.inner is not None:
            self.inner.check_sample(documents)


class MappingHead(CompressionHead):
    """Queries and documents pass through one map, are compared by L2 behind it, and an inner head compresses documents.

    Exports what the inner head exports, of E dimensions; the index folder's `head/` holds the map for queries.

    Args:
        config: The inner head, and the dimension E of the map's output.
        dim: Dimension D of the vectors.

    Raises:
        InputError: If D does not fit `config`, or the inner head's metric is not l2.
    """

    def __init__(self, config: MappingHeadConfig, dim: int) -> None:
        config.check(dim)
        out_dim = config.out_dim(dim)
        built = (config.inner or NoCompressionConfig()).build(out_dim)
        if config.inner is not None and built.metric != "l2":
            raise InputError(
                f"a map that keeps distances needs an inner head with metric l2, got {built.metric!r}. Set "
                "inner.metric l2."
            )
        super().__init__(
            dim=dim, num_codes=built.num_codes, code_bits=built.code_bits, metric="l2", out_dim=out_dim
        )
        self.inner = built

    @abstractmethod
    def _map(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """Return the map's output in this mode, with gradients."""

    @abstractmethod
    def map_queries(self, queries: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        """Return queries as the finished model maps them, and documents alike."""

    @property
    def code_size(self) -> int:
        """Bytes of a compressed vector."""
        return self.inner.code_size

    @property
    def rate(self) -> float:
        """Bits of the inner head's code and list."""
        return self.inner.rate

    def forward(self, x: Float[Tensor, "N D"]) -> HeadOutput:
        """Map and compress, in float32 whatever the autocast."""
        return self._compress(self._map(x))

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N M"]:
        """Map as queries are mapped, then return the inner head's codes."""
        return self.inner.encode(self.map_queries(x))

    def decode(self, codes: Int[Tensor, "N M"]) -> Float[Tensor, "N E"]:
        """Return the vectors of E dimensions that codes stand for."""
        return self.inner.decode(codes)

    def pack(self, codes: Int[Tensor, "N M"]) -> NDArray[np.uint8]:
        """Pack as the inner head does."""
        return self.inner.pack(codes)

    def unpack(self, packed: UInt8[NDArray[np.uint8], "N size"]) -> Int[Tensor, "N M"]:
        """Invert `pack`."""
        return self.inner.unpack(packed)

    def export(self) -> FaissExport:
        """Return the inner head's export; without one, float32 vectors of E dimensions."""
        return replace(self.inner.export(), metric=self.metric)

    def manual_parameters(self) -> list[nn.Parameter]:
        """Return those of the inner head."""
        return self.inner.manual_parameters()

    def descend(self, factor: float, generator: torch.Generator) -> None:
        """Move the inner head's manual parameters."""
        self.inner.descend(factor, generator)

    def count(self, codes: Int[Tensor, "N M"]) -> None:
        """Add codes to the inner head's counts."""
        self.inner.count(codes)

    def usage_statistics(self) -> dict[str, float]:
        """Return those of the inner head."""
        return self.inner.usage_statistics()

    def restart_dead_codes(
        self, x: Float[Tensor, "N E"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """Restart the inner head's codewords from mapped vectors."""
        return self.inner.restart_dead_codes(x, generator)

    def _compress(self, y: Float[Tensor, "N E"]) -> HeadOutput:
        output: HeadOutput = self.inner(y)
        return replace(output, mapped=y)

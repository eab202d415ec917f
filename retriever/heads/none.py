"""No compression: the dense model as a head, the control of every comparison.

A code is a dimension's 32 float bits, so the packed codes are the float32 vector that `faiss.IndexFlat` stores.

Shapes: N vectors, D dimensions, M = D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from retriever.heads.base import CompressionHead, HeadConfig, HeadOutput, QuantizerFit
from retriever.heads.exports import FlatVectors

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["NoCompression", "NoCompressionConfig"]


@dataclass(frozen=True, kw_only=True)
class NoCompressionConfig(HeadConfig):
    """Leave the vectors as they are; there is nothing to set."""

    name: ClassVar[str] = "none"

    def check(self, dim: int) -> None:
        """Accept every dimension."""

    def build(self, dim: int) -> NoCompression:
        """Return the identity on vectors of `dim` dimensions."""
        return NoCompression(self, dim)


class NoCompression(CompressionHead):
    """The identity. Exports to `faiss.IndexFlatIP`."""

    def __init__(self, config: NoCompressionConfig, dim: int) -> None:
        super().__init__(dim=dim, num_codes=dim, code_bits=32)
        self._config = config

    @property
    def config(self) -> NoCompressionConfig:
        """The (empty) configuration."""
        return self._config

    def forward(self, x: Float[Tensor, "N D"]) -> HeadOutput:
        """Return `x` itself."""
        return HeadOutput(reconstruction=x, codes=self.encode(x.detach()))

    def encode(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N D"]:
        """Return the float32 bit patterns as int32."""
        return x.float().contiguous().view(torch.int32)

    def decode(self, codes: Int[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Return the floats behind bit patterns."""
        return codes.to(torch.int32).view(torch.float32)

    def export(self) -> FlatVectors:
        """Return the dimension."""
        return FlatVectors(dim=self.dim)

    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Do nothing: there is no parameter."""

    def count(self, codes: Int[Tensor, "N D"]) -> None:
        """Do nothing: there is no codebook."""

    def usage_statistics(self) -> dict[str, float]:
        """Return nothing: there is no codebook."""
        return {}

    def restart_dead_codes(
        self, x: Float[Tensor, "N D"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """Return nothing: there is no codebook."""
        return {}

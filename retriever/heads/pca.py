"""PCA head: principal components of live vectors in front of another head (OPQ to fewer dimensions, Ge et al., 2013).

Few codes cannot describe many dimensions: what a codeword learns of directions with little variance is noise. Between
the components that are kept, distances are those of the vectors; what is left out of a query is the same for all
documents, so that L2 ranks by the reconstruction from the components alone.

Shapes: N documents, B queries, D dimensions, E components, M codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from retriever.errors import InputError
from retriever.heads.base import QuantizerFit
from retriever.heads.mapping import MappingHead, MappingHeadConfig

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["PCA", "PCAConfig"]


@dataclass(frozen=True, kw_only=True)
class PCAConfig(MappingHeadConfig):
    """Size of a `PCA`, and the head behind it.

    Attributes:
        components: E, at most the dimension; 6 to 8 a byte of the code.
    """

    name: ClassVar[str] = "pca"

    components: int = 96

    def __post_init__(self) -> None:
        if self.components < 1:
            raise InputError(f"components must be at least 1, got {self.components}.")
        super().__post_init__()

    def out_dim(self, dim: int) -> int:
        """Return E, whatever the dimension."""
        return self.components

    def check(self, dim: int) -> None:
        """Raise InputError unless there are so many components, which the inner head can compress."""
        if self.components > dim:
            raise InputError(f"components must be at most the dimension {dim}, got {self.components}.")
        super().check(dim)

    def build(self, dim: int) -> PCA:
        """Return the head for vectors of `dim` dimensions."""
        return PCA(self, dim)


class PCA(MappingHead):
    """y = A (x - mean), then the inner head. A and mean are fixed at the warm start; towers and inner head train on.

    Args:
        config: Number of components, the inner head.
        dim: Dimension D of the vectors.

    Raises:
        InputError: If D does not fit `config`, or the inner head's metric is not l2.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, config: PCAConfig, dim: int) -> None:
        super().__init__(config, dim)
        self._config = config
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(config.components, dim))

    @property
    def config(self) -> PCAConfig:
        """The configuration that built this head."""
        return self._config

    def map_queries(self, queries: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        """Return the components of queries."""
        return self._map(queries)

    @torch.no_grad()
    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Take mean and principal components of the sample, and start the inner head from its components."""
        self._config.check_sample(len(sample))
        self._start_components(sample)
        self._start_inner(sample, fit, seed)

    def _start_components(self, sample: Float[Tensor, "n D"]) -> None:
        exact = sample.double()
        mean = exact.mean(0)
        _, vectors = torch.linalg.eigh((exact - mean).T @ (exact - mean) / len(exact))  # rising eigenvalues
        self.mean.copy_(mean)
        self.matrix.copy_(vectors[:, -self.out_dim :].flip(1).T)

    def _start_inner(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        self.inner.warm_start(self._map(sample.to(self.mean)), fit, seed)

    def _map(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() - self.mean) @ self.matrix.T

"""Learned inverted lists of uncompressed vectors: a search looks at a part of the documents, each with its exact score.

Shapes: N vectors, D dimensions, J lists. A document's codes are its list number and the bits of D floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from retriever.heads.base import HeadConfig, HeadOutput, QuantizerFit
from retriever.heads.checks import check_choices, check_not_negative
from retriever.heads.codebooks import AssignmentName, Codebooks
from retriever.heads.exports import CoarseFlatVectors
from retriever.heads.listed import InvertedListHead
from retriever.heads.lists import check_list_sample, check_lists
from retriever.scores import Metric

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["IVFFlat", "IVFFlatConfig"]


@dataclass(frozen=True, kw_only=True)
class IVFFlatConfig(HeadConfig):
    """Lists of an `IVFFlat`.

    Attributes:
        num_lists: J, inverted lists; FAISS's rule of thumb is 4 to 16 times the square root of the documents.
        list_assignment: A document's list is that of the nearest current centroid ("live"), or of the nearest starting
            centroid for ever ("frozen") or in training ("frozen_in_training").
        metric: Score of a query with a document; "l2" needs unit vectors, whose cosine it then is.
        distortion_weight: Weight of mean ||sg(x) - centroid||^2, by which centroids follow the vectors.
        restart_window: Training documents a list, on average, after which empty lists are restarted.
    """

    name: ClassVar[str] = "ivfflat"

    num_lists: int = 256
    list_assignment: AssignmentName = "live"
    metric: Metric = "l2"
    distortion_weight: float = 1.0
    restart_window: float = 20.0

    def __post_init__(self) -> None:
        check_lists(self.num_lists, self.list_assignment, "free")
        check_choices(self, {"metric": Metric})
        check_not_negative(self, ("distortion_weight", "restart_window"))

    def check(self, dim: int) -> None:
        """Accept every dimension."""

    def check_sample(self, documents: int) -> None:
        """Raise InputError if the warm start would have fewer documents than lists."""
        check_list_sample(documents, self.num_lists)

    def build(self, dim: int) -> IVFFlat:
        """Return the head for vectors of `dim` dimensions."""
        return IVFFlat(self, dim)


class IVFFlat(InvertedListHead):
    """The identity, and the list of the nearest centroid. Exports to `faiss.IndexIVFFlat`.

    Args:
        config: Number and assignment of the lists, metric.
        dim: Dimension D of the vectors.
    """

    def __init__(self, config: IVFFlatConfig, dim: int) -> None:
        super().__init__(
            dim=dim, num_lists=config.num_lists, num_codebooks=dim, code_bits=32, metric=config.metric
        )
        self._config = config
        self.coarse: Codebooks = Codebooks(
            1, config.num_lists, dim, estimator="codeword", assignment=config.list_assignment
        )

    @property
    def config(self) -> IVFFlatConfig:
        """The configuration that built this head."""
        return self._config

    def forward(self, x: Float[Tensor, "N D"]) -> HeadOutput:
        """Return `x` itself, and the centroid of its list."""
        with torch.autocast(x.device.type, enabled=False):
            coarse, lists = self.coarse(x.float()[:, None])
            losses = {}
            if self._config.distortion_weight:
                error = (x.detach() - self.coarse.select(lists).squeeze(1)).square().sum(1).mean()
                losses["distortion"] = self._config.distortion_weight * error
        return HeadOutput(
            reconstruction=x,
            codes=torch.cat([lists, _bits(x.detach())], 1),
            losses=losses,
            coarse=coarse.codewords.squeeze(1),
        )

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N 1+D"]:
        """Return list numbers and float32 bit patterns."""
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([self.coarse.encode(x.float()[:, None]), _bits(x)], 1)

    def decode(self, codes: Int[Tensor, "N 1+D"]) -> Float[Tensor, "N D"]:
        """Return the floats behind bit patterns."""
        return codes[:, 1:].to(torch.int32).contiguous().view(torch.float32)

    def export(self) -> CoarseFlatVectors:
        """Return the centroids on the CPU."""
        return CoarseFlatVectors(dim=self.dim, metric=self.metric, centroids=self.centroids.detach().cpu())

    @torch.no_grad()
    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Start from k-means of live vectors.

        Raises:
            InputError: If the sample has fewer vectors than lists.
        """
        self._config.check_sample(len(sample))
        _, centroids, _ = fit.coarse_product_codebooks(  # a codebook of two words comes along and is not used
            sample.float().cpu(),
            num_lists=self.num_lists,
            num_codebooks=1,
            codebook_bits=1,
            rotate=False,
            on_residuals=False,
            seed=seed,
        )
        self.coarse.start(centroids[None])

    def count(self, codes: Int[Tensor, "N 1+D"]) -> None:
        """Add list numbers to the counts of the current window."""
        self.coarse.count(codes[:, :1])

    def usage_statistics(self) -> dict[str, float]:
        """Return perplexity and share of empty lists in the window."""
        return {f"list_{name}": value for name, value in self.coarse.usage_statistics().items()}

    @torch.no_grad()
    def restart_dead_codes(
        self, x: Float[Tensor, "N D"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """Once the window is full, put a random vector in the place of the centroid of every list left empty."""
        return self.coarse.restart_dead_codes(x.float()[:, None], self._config.restart_window, generator)


def _bits(x: Float[Tensor, "N D"]) -> Int[Tensor, "N D"]:
    return x.float().contiguous().view(torch.int32).long()

"""Learned inverted file with residual quantization: a coarse centroid, then codewords that add up to what is left.

Shapes: N vectors, D dimensions, J lists, M codebooks, K = 2**bits codewords of D dimensions.
A document's codes are its list number and M codewords.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from retriever.heads.base import (
    CoarseAdditiveCodebooks,
    HeadOutput,
    QuantizerFit,
)
from retriever.heads.cells import Cells, build_coarse
from retriever.heads.codebooks import AssignmentName
from retriever.heads.listed import InvertedListHead
from retriever.heads.lists import ListStructure, check_list_sample, check_lists
from retriever.heads.residual import beam_search, residuals
from retriever.heads.rq import ResidualQuantizerConfig, quantize, step_losses

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["IVFResidualQuantizer", "IVFResidualQuantizerConfig"]


@dataclass(frozen=True, kw_only=True)
class IVFResidualQuantizerConfig(ResidualQuantizerConfig):
    """Size and training of an `IVFResidualQuantizer`: that of a residual quantizer, and its lists.

    Attributes:
        num_lists: J, inverted lists; FAISS's rule of thumb is 4 to 16 times the square root of the documents.
        list_assignment: A document's list is that of the nearest current centroid ("live"), or of the nearest
            starting centroid for ever ("frozen") or in training ("frozen_in_training").
        list_structure: Every centroid is a vector of its own ("free"), or a sum S_i + alpha_ij T_j of two codebooks
            ("gno_imi", GNO-IMI; "no_imi" with alpha = 1), which makes K squared lists of 2 K vectors.
    """

    name: ClassVar[str] = "ivfrq"

    num_lists: int = 256
    list_assignment: AssignmentName = "live"
    list_structure: ListStructure = "free"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lists(self.num_lists, self.list_assignment, self.list_structure)

    def check_sample(self, documents: int) -> None:
        """Raise InputError if the warm start would have fewer documents than lists or codewords."""
        super().check_sample(documents)
        check_list_sample(documents, self.num_lists, self.list_structure)

    def build(self, dim: int) -> IVFResidualQuantizer:  # type: ignore[override]
        """Return the head for vectors of `dim` dimensions."""
        return IVFResidualQuantizer(self, dim)


class IVFResidualQuantizer(InvertedListHead):
    """Coarse centroid plus residual-quantized residual.

    T(x) = v_a + sum_m c_m with a = argmin_j ||x - v_j||^2 and c the codewords of x - v_a.
    Exports to `faiss.IndexIVFResidualQuantizer` without loss: centroids become its lists, and every code keeps the
    list it has here.

    Args:
        config: Lists, codebooks, beam, gradient estimator, weights.
        dim: Dimension D of the vectors.
    """

    def __init__(self, config: IVFResidualQuantizerConfig, dim: int) -> None:
        config.check(dim)
        super().__init__(
            dim=dim,
            num_lists=config.num_lists,
            num_codebooks=config.num_codebooks,
            code_bits=config.codebook_bits,
            metric=config.metric,
        )
        self._config = config
        self.coarse = build_coarse(
            config.num_lists,
            dim,
            estimator=config.estimator,
            assignment=config.list_assignment,
            structure=config.list_structure,
        )
        self.fine = config.build_codebooks(dim)

    @property
    def config(self) -> IVFResidualQuantizerConfig:
        """The configuration that built this head."""
        return self._config

    @property
    def codebooks(self) -> nn.Parameter:
        """Codewords of the residuals, (M, K, D)."""
        return self.fine.codewords

    def forward(self, x: Float[Tensor, "N D"]) -> HeadOutput:
        """Quantize with the configured gradient estimator, in float32 whatever the autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            coarse, lists = self.coarse(x[:, None])
            centroid = self.coarse.select(lists).squeeze(1)
            # "codeword" passes on the vector's gradient once, in the residual, where it must not reach the centroid
            residual = x - (centroid.detach() if self._config.estimator == "codeword" else centroid)
            fine, codes = quantize(self._config, self.fine, residual)
            whole = self.fine.select(codes)
            whole = torch.cat([whole[:, :1] + centroid[:, None], whole[:, 1:]], 1)
            losses = step_losses(self._config, x, whole)
        return HeadOutput(
            reconstruction=centroid + fine.codewords.sum(1),
            codes=torch.cat([lists, codes], 1),
            losses=losses,
            log_assignment=fine.log_assignment,
            coarse=coarse.codewords.squeeze(1),
        )

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N 1+M"]:
        """Return list numbers and the codes that the beam search finds for the residuals."""
        with torch.autocast(x.device.type, enabled=False):
            lists, residual = self._residual(x.float())
            return torch.cat([lists, beam_search(residual, self.codebooks, self._config.beam)], 1)

    def decode(self, codes: Int[Tensor, "N 1+M"]) -> Float[Tensor, "N D"]:
        """Return centroid plus codewords."""
        return self.coarse.select(codes[:, :1]).squeeze(1) + self.fine.select(codes[:, 1:]).sum(1)

    def export(self) -> CoarseAdditiveCodebooks:
        """Return centroids and codebooks on the CPU."""
        return CoarseAdditiveCodebooks(
            centroids=self.centroids.detach().cpu(),
            codebooks=self.codebooks.detach().cpu(),
            metric=self.metric,
        )

    @torch.no_grad()
    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Start from k-means and the residual quantizer of what it leaves of live vectors.

        Raises:
            InputError: If the sample has fewer vectors than lists, or than a codebook has codewords.
        """
        self._config.check_sample(len(sample))
        sample = sample.float().cpu()
        size = {
            "num_codebooks": self._config.num_codebooks,
            "codebook_bits": self.code_bits,
            "beam": self._config.beam,
            "seed": seed,
        }
        if isinstance(self.coarse, Cells):
            codebooks = fit.additive_codebooks(self.coarse.fit(sample, fit, seed), **size)
        else:
            centroids, codebooks = fit.coarse_additive_codebooks(
                sample, num_lists=self._config.num_lists, **size
            )
            self.coarse.start(centroids[None])
        self.fine.start(codebooks)

    @torch.no_grad()
    def restart_dead_codes(
        self, x: Float[Tensor, "N D"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """Restart unused centroids by vectors and unused codewords by residuals, each when its window is full."""
        x, window, masks = x.float(), self._config.restart_window, {}
        if self.fine.has_dead_codes(window):  # otherwise the search would be for nothing
            _, residual = self._residual(x)
            chosen = self.fine.select(beam_search(residual, self.codebooks, self._config.beam))
            steps = residuals(residual, chosen, gradient_once=True)
            masks = self.fine.restart_dead_codes(steps, window, generator)
        return {**self.coarse.restart_dead_codes(x[:, None], window, generator), **masks}

    def _residual(self, x: Float[Tensor, "N D"]) -> tuple[Int[Tensor, "N 1"], Float[Tensor, "N D"]]:
        """Return list numbers, and the residuals to the current centroids of those lists, which decode adds."""
        lists = self.coarse.encode(x[:, None])
        return lists, x - self.coarse.select(lists).squeeze(1)

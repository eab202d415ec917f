"""Learned inverted file with residual product quantization (Poeem, arXiv:2105.03933; Distill-VQ, arXiv:2204.00185).

A coarse quantizer of J centroids names a document's inverted list; a product quantizer encodes what is left. Both
live in the rotated space and train with the towers.

Shapes: N vectors, D dimensions, J lists, M codebooks, K = 2**bits codewords, S = D // M sub-dimensions.
A document's codes are its list number and M codewords.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from retriever.errors import InputError
from retriever.heads.base import HeadOutput, QuantizerFit
from retriever.heads.cells import Cells, build_coarse
from retriever.heads.codebooks import AssignmentName, Codebooks
from retriever.heads.exports import CoarseProductCodebooks
from retriever.heads.listed import InvertedListHead
from retriever.heads.lists import ListStructure, check_list_sample, check_lists
from retriever.heads.pq import ProductQuantizerConfig, auxiliary_losses
from retriever.transforms import ROTATIONS

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["IVFProductQuantizer", "IVFProductQuantizerConfig"]


@dataclass(frozen=True, kw_only=True)
class IVFProductQuantizerConfig(ProductQuantizerConfig):
    """Size and training of an `IVFProductQuantizer`: that of a product quantizer, and its lists.

    Attributes:
        num_lists: J, inverted lists; FAISS's rule of thumb is 4 to 16 times the square root of the documents.
        list_assignment: A document's list is that of the nearest current centroid ("live", Poeem), or of the nearest
            starting centroid for ever ("frozen", Distill-VQ) or in training ("frozen_in_training", LibVQ's export).
        list_structure: Every centroid is a vector of its own ("free"), or a sum S_i + alpha_ij T_j of two codebooks
            ("gno_imi", GNO-IMI; "no_imi" with alpha = 1), which makes K squared lists of 2 K vectors.
        residual_start: Fit the codebooks to residuals; false fits them to whole vectors, as Poeem released.
        leave_one_out: Start from centroids that are fitted to what they would leave of documents that had no part in
            them, and from codebooks of that, as `ResidualQuantizerConfig.leave_one_out`.
    """

    name: ClassVar[str] = "ivfpq"

    num_lists: int = 256
    list_assignment: AssignmentName = "live"
    list_structure: ListStructure = "free"
    residual_start: bool = True
    leave_one_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lists(self.num_lists, self.list_assignment, self.list_structure)
        if self.leave_one_out and (self.list_structure != "free" or self.start == "uniform"):
            raise InputError(
                f"leave_one_out is for fitted centroids of their own, got list_structure={self.list_structure} and "
                f"start={self.start}. Set leave_one_out false, or list_structure free and start fit."
            )
        if self.list_assignment != "live" and ROTATIONS[self.rotation].learned:
            raise InputError(
                f"list_assignment {self.list_assignment!r} keeps lists only behind a fixed rotation, got "
                f"{self.rotation!r}. Set rotation opq."
            )
        if self.assignment != "live" and self.list_assignment == "live":
            raise InputError(
                f"assignment {self.assignment!r} takes residuals from starting centroids, so list_assignment cannot "
                "be 'live'. Set list_assignment frozen."
            )

    def check_sample(self, documents: int) -> None:
        """Raise InputError if the warm start would have fewer documents than lists or codewords."""
        super().check_sample(documents)
        check_list_sample(documents, self.num_lists, self.list_structure)

    def build(self, dim: int) -> IVFProductQuantizer:  # type: ignore[override]
        """Return the head for vectors of `dim` dimensions."""
        return IVFProductQuantizer(self, dim)


class IVFProductQuantizer(InvertedListHead):
    """Coarse centroid plus product-quantized residual.

    T(x) = (v_a + concat_m c_m) A with z = A x, a = argmin_j ||z - v_j||^2, and c_m the codeword of (z - v_a)_m.
    Exports to `faiss.IndexIVFPQ` without loss: centroids become its lists, and every code keeps the list it has here.

    Args:
        config: Lists, codebooks, rotation, gradient estimator, weights.
        dim: Dimension D of the vectors; a multiple of `config.num_codebooks`.

    Raises:
        InputError: If `dim` is not a multiple of `config.num_codebooks`.
    """

    def __init__(self, config: IVFProductQuantizerConfig, dim: int) -> None:
        config.check(dim)
        super().__init__(
            dim=dim,
            num_lists=config.num_lists,
            num_codebooks=config.num_codebooks,
            code_bits=config.codebook_bits,
            metric=config.metric,
        )
        self._config = config
        self.rotate = ROTATIONS[config.rotation](dim)
        self.coarse = build_coarse(
            config.num_lists,
            dim,
            estimator=config.estimator,
            assignment=config.list_assignment,
            structure=config.list_structure,
        )
        self.fine = config.build_codebooks(dim)

    @property
    def config(self) -> IVFProductQuantizerConfig:
        """The configuration that built this head."""
        return self._config

    @property
    def rotation(self) -> Float[Tensor, "D D"]:
        """Matrix A of z = A x."""
        return self.rotate.matrix

    def forward(self, x: Float[Tensor, "N D"]) -> HeadOutput:
        """Quantize with the configured gradient estimator, in float32 whatever the autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x, matrix = x.float(), self.rotation
            z = x @ matrix.detach().T
            coarse, lists = self.coarse(z[:, None])
            centroid = self.coarse.select(lists).squeeze(1)
            # "codeword" passes on the vector's gradient once, in the residual, where it must not reach the centroid
            residual = z - (centroid.detach() if self._config.estimator == "codeword" else centroid)
            fine, codes = self.fine(self._split(residual), self._start_residual(z, lists))
            back = matrix.detach() if self._config.estimator == "identity" else matrix
            reconstruction = (centroid + fine.codewords.flatten(1)) @ back
            whole = centroid + self.fine.select(codes).flatten(1)
            losses = auxiliary_losses(self._config, x, matrix, whole)
            listed = coarse.codewords.squeeze(1) @ back
        return HeadOutput(
            reconstruction=reconstruction,
            codes=torch.cat([lists, codes], 1),
            losses=losses,
            log_assignment=fine.log_assignment,
            coarse=listed,
        )

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N 1+M"]:
        """Return list numbers and codes."""
        with torch.autocast(x.device.type, enabled=False):
            z = x.float() @ self.rotation.T
            lists = self.coarse.encode(z[:, None])
            # a live assignment takes residuals from the current centroids, those that decode adds
            residual = z - self.coarse.select(lists).squeeze(1)
            codes = self.fine.encode(self._split(residual), self._start_residual(z, lists))
        return torch.cat([lists, codes], 1)

    def decode(self, codes: Int[Tensor, "N 1+M"]) -> Float[Tensor, "N D"]:
        """Return centroid plus codewords, rotated back."""
        centroid = self.coarse.select(codes[:, :1]).squeeze(1)
        return (centroid + self.fine.select(codes[:, 1:]).flatten(1)) @ self.rotation

    def export(self) -> CoarseProductCodebooks:
        """Return centroids, codebooks and rotation on the CPU."""
        return CoarseProductCodebooks(
            centroids=self.centroids.detach().cpu(),
            codebooks=self.fine.codewords.detach().cpu(),
            rotation=None if self._config.rotation == "none" else self.rotation.detach().cpu(),
            orthonormal=self.rotate.orthonormal,
            metric=self.metric,
        )

    @torch.no_grad()
    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Start from (OPQ,) k-means and the PQ of the residuals of live vectors, or from the random values there.

        Raises:
            InputError: If the sample has fewer vectors than lists, or than a codebook has codewords.
        """
        if self._config.start == "uniform":
            return
        self._config.check_sample(len(sample))
        sample = sample.float().cpu()
        if isinstance(self.coarse, Cells):
            rotation, codebooks = self._fit_cells(self.coarse, sample, fit, seed)
        else:
            rotation, centroids, codebooks = fit.coarse_product_codebooks(
                sample,
                num_lists=self._config.num_lists,
                num_codebooks=self._config.num_codebooks,
                codebook_bits=self.code_bits,
                rotate=self._config.rotation != "none",
                on_residuals=self._config.residual_start,
                seed=seed,
                leave_one_out=self._config.leave_one_out,
            )
            self.coarse.start(centroids[None])
        self.fine.start(codebooks)
        if rotation is not None:
            self.rotate.start(rotation)

    def manual_parameters(self) -> list[nn.Parameter]:
        """Return a Givens rotation's matrix."""
        return self.rotate.manual_parameters()

    def descend(self, factor: float, generator: torch.Generator) -> None:
        """Turn a Givens rotation."""
        self.rotate.descend(factor * self._config.rotation_lr, generator)

    @torch.no_grad()
    def restart_dead_codes(
        self, x: Float[Tensor, "N D"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """Restart unused centroids by vectors and unused codewords by residuals, each when its window is full."""
        z = x.float() @ self.rotation.T
        residual = z - self.coarse.select(self.coarse.encode(z[:, None])).squeeze(1)
        window = self._config.restart_window
        return {
            **self.coarse.restart_dead_codes(z[:, None], window, generator),
            **self.fine.restart_dead_codes(self._split(residual), window, generator),
        }

    def _fit_cells(
        self, cells: Cells, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int
    ) -> tuple[Float[Tensor, "D D"] | None, Float[Tensor, "M K S"]]:
        """Learn the cells behind the rotation; return rotation and codebooks of what they leave."""
        size = {"num_codebooks": self._config.num_codebooks, "codebook_bits": self.code_bits, "seed": seed}
        rotation, z = None, sample
        if self._config.rotation != "none":
            rotation, _ = fit.product_codebooks(sample, rotate=True, **size)
            assert rotation is not None, "asked for"
            z = sample @ rotation.T
        rest = cells.fit(z, fit, seed)
        _, codebooks = fit.product_codebooks(rest if self._config.residual_start else z, rotate=False, **size)
        return rotation, codebooks

    def _start_residual(self, z: Float[Tensor, "N D"], lists: Int[Tensor, "N 1"]) -> Tensor | None:
        """Return the residuals to the starting centroids, by which frozen codes are chosen."""
        if self._config.assignment == "live":
            return None
        assert isinstance(self.coarse, Codebooks), "cells are assigned live, and so are then the codes"
        return self._split(z - self.coarse.anchors[0, lists.squeeze(1)])

    def _split(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N M S"]:
        return z.view(len(z), *self.fine.codewords.shape[::2])

"""Learned inverted file with residual quantization: a coarse centroid, then codewords that add up to what is left.

Shapes: N vectors, D dimensions, J lists, L of them that a beam begins with, M codebooks, K = 2**bits codewords of D
dimensions.
A document's codes are its list number and M codewords.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from retriever.errors import InputError
from retriever.heads.base import HeadOutput, QuantizerFit
from retriever.heads.cells import Cells, build_coarse
from retriever.heads.codebooks import ROWS_AT_ONCE, AssignmentName, Codebooks
from retriever.heads.exports import CoarseAdditiveCodebooks
from retriever.heads.listed import InvertedListHead
from retriever.heads.lists import ListStructure, check_list_sample, check_lists
from retriever.heads.pieces import at_once
from retriever.heads.refit import refit
from retriever.heads.residual import Asked, asked_of, beam_search_from, residuals, squared_distances
from retriever.heads.rq import ResidualQuantizerConfig, estimate_steps, step_losses

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
        list_beam: L, nearest lists that the beam begins with: a document goes to the one in which its sum ends
            nearest; all lists where there are fewer. 1 is the nearest list alone, FAISS's own choice. Encoding costs
            the same while L is at most `beam`.
    """

    name: ClassVar[str] = "ivfrq"

    num_lists: int = 256
    list_assignment: AssignmentName = "live"
    list_structure: ListStructure = "free"
    list_beam: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lists(self.num_lists, self.list_assignment, self.list_structure)
        if self.list_beam < 1:
            raise InputError(
                f"list_beam must be at least 1, which is the nearest list, got {self.list_beam}."
            )
        if self.refit and self.list_structure != "free":
            raise InputError(
                f"refit is for centroids of their own, got list_structure={self.list_structure}. Set refit false, or "
                "list_structure free."
            )
        if self.list_beam > 1 and (self.list_assignment != "live" or self.list_structure != "free"):
            raise InputError(
                f"list_beam {self.list_beam} chooses among current centroids of their own, got list_assignment="
                f"{self.list_assignment} and list_structure={self.list_structure}. Set list_beam 1, or "
                "list_assignment live and list_structure free."
            )

    def check_sample(self, documents: int) -> None:
        """Raise InputError if the warm start would have fewer documents than lists or codewords."""
        super().check_sample(documents)
        check_list_sample(documents, self.num_lists, self.list_structure)

    def build(self, dim: int) -> IVFResidualQuantizer:  # type: ignore[override]
        """Return the head for vectors of `dim` dimensions."""
        return IVFResidualQuantizer(self, dim)


class IVFResidualQuantizer(InvertedListHead):
    """Coarse centroid plus residual-quantized residual.

    T(x) = v_a + sum_m c_m with a = argmin_j ||x - v_j||^2 and c the codewords of x - v_a; with a `list_beam` of L, the
    list among the L nearest and its codewords for which the beam ends nearest to x.
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
            if self._config.list_beam == 1:
                coarse, lists = self.coarse(x[:, None])
                codes = self._search(x, lists)[:, 1:]
            else:
                assert isinstance(self.coarse, Codebooks), "the configuration allows no cells here"
                found = self._search(x, self._nearest_lists(x))
                lists, codes = found[:, :1], found[:, 1:]
                coarse = self.coarse.estimate(x[:, None], lists)
            centroid = self.coarse.select(lists).squeeze(1)
            # "codeword" passes on the vector's gradient once, in the residual, where it must not reach the centroid
            residual = x - (centroid.detach() if self._config.estimator == "codeword" else centroid)
            fine = estimate_steps(self._config, self.fine, residual, codes)
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
    def encode(self, x: Float[Tensor, "N D"], asked: Asked | None = None) -> Int[Tensor, "N 1+M"]:
        """Return list numbers and the codes that the beam search finds for the residuals."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return self._search(x, self._nearest_lists(x), asked)

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
        options: dict[str, Any] = {
            "num_codebooks": self._config.num_codebooks,
            "codebook_bits": self.code_bits,
            "beam": self._config.beam,
            "seed": seed,
            "leave_one_out": self._config.leave_one_out,
        }
        if isinstance(self.coarse, Cells):
            codebooks = fit.additive_codebooks(self.coarse.fit(sample, fit, seed), **options)
        else:
            centroids, codebooks = fit.coarse_additive_codebooks(
                sample, num_lists=self._config.num_lists, list_beam=self._config.list_beam, **options
            )
            self.coarse.start(centroids[None])
        self.fine.start(codebooks)
        if self._config.refit:
            assert isinstance(self.coarse, Codebooks), "the configuration allows no cells here"
            x, training = sample.to(self.codebooks.device), self.training
            codes = self.eval().encode(x)  # those that the index would hold
            self.train(training)
            centroids, *books = refit(x, [self.centroids, *self.codebooks], codes)
            self.coarse.start(centroids[None])
            self.fine.start(torch.stack(books))

    @torch.no_grad()
    def restart_dead_codes(
        self, x: Float[Tensor, "N D"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """Restart unused centroids by vectors and unused codewords by residuals, each when its window is full."""
        x, window, masks = x.float(), self._config.restart_window, {}
        if self.fine.has_dead_codes(window):  # otherwise the search would be for nothing
            codes = self.encode(x)
            residual = x - self.coarse.select(codes[:, :1]).squeeze(1)
            steps = residuals(residual, self.fine.select(codes[:, 1:]), gradient_once=True)
            masks = self.fine.restart_dead_codes(steps, window, generator)
        return {**self.coarse.restart_dead_codes(x[:, None], window, generator), **masks}

    @torch.no_grad()
    def _nearest_lists(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N L"]:
        """Return the lists that a beam begins with."""
        count = min(self._config.list_beam, self.num_lists)
        if count == 1:
            return self.coarse.encode(x[:, None])
        rows = x[:, None].split(at_once(ROWS_AT_ONCE, x.device))
        distances = (squared_distances(part, self.centroids).squeeze(1) for part in rows)
        return torch.cat([part.topk(count, largest=False).indices for part in distances])

    @torch.no_grad()
    def _search(
        self, x: Float[Tensor, "N D"], lists: Int[Tensor, "N L"], asked: Asked | None = None
    ) -> Int[Tensor, "N 1+M"]:
        """Return the list, of those given, and the codes of the residual to its current centroid."""
        beam = self._config.beam_size(self.training)

        def search(x: Tensor, lists: Tensor, asked: Asked | None) -> Tensor:
            starts = x[:, None] - self.coarse.select(lists.reshape(-1, 1)).view(*lists.shape, -1)
            found = beam_search_from(starts, self.codebooks, beam, asked)
            return torch.cat([lists.gather(1, found[:, :1]), found[:, 1:]], 1)

        rows = at_once(ROWS_AT_ONCE, x.device)
        parts = x.split(rows)
        return torch.cat(list(map(search, parts, lists.split(rows), asked_of(parts, asked))))

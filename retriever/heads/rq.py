"""Residual quantization head (Chen et al., Sensors 2010), trained with the towers.

Shapes: N vectors, D dimensions, M codebooks, K = 2**bits codewords of D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from retriever.errors import InputError
from retriever.heads.base import CompressionHead, HeadConfig, HeadOutput, QuantizerFit
from retriever.heads.checks import check_choices, check_not_negative, check_sample_size, check_size
from retriever.heads.codebooks import Codebooks
from retriever.heads.estimators import Estimate, EstimatorName
from retriever.heads.exports import AdditiveCodebooks
from retriever.heads.refit import refit
from retriever.heads.residual import Asked, beam_search, residuals
from retriever.scores import Metric

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["ResidualQuantizer", "ResidualQuantizerConfig", "estimate_steps", "step_losses"]

CHOICES = {"metric": Metric, "estimator": EstimatorName, "distortion_steps": Literal["last", "all"]}


@dataclass(frozen=True, kw_only=True)
class ResidualQuantizerConfig(HeadConfig):
    """Size and training of a `ResidualQuantizer`.

    Attributes:
        num_codebooks: M, the steps; bytes of a document when codebook_bits is 8. Any number goes with any dimension.
        codebook_bits: log2 of the codewords in a codebook.
        beam: Sums that the encoder keeps at every step but the last; 1 is greedy, 5 FAISS's default. Encoding takes
            as many times longer, search does not.
        eval_beam: Sums that it keeps outside training; by default as many.
        metric: Score of a query with a compressed document. "l2" is 1 - ||q - x||^2 / 2, the cosine of unit vectors
            before compression, and adds a norm of 4 bytes, or 1, to a code in the index; "inner_product" adds nothing.
        estimator: What the retrieval loss's gradient reaches: "identity" the vectors only, "codeword" the vectors and
            the chosen codewords, both unchanged, "softmax" vectors and all codewords through each step's softmax
            over distances to the residual, whose earlier codewords are constants.
        selection_temperature: Divides the squared distances in the softmax.
        distortion_weight: Weight of mean ||T(x) - sg(x)||^2, which moves the codewords.
        distortion_steps: Which sums T(x) the distortion sees: that of "last" step, or those of "all" steps, added up,
            so that the first codebooks alone are a good quantizer too (`ResidualQuantizer.truncated`).
        commitment_weight: Weight of mean ||x - sg(T(x))||^2, which moves the towers.
        restart_window: Training documents a codeword, on average, after which unused codewords are restarted.
        leave_one_out: Start from codewords that are fitted to what they would leave of documents that had no part in
            them, instead of FAISS's, which are nearer to the documents of the warm start and farther from others. For
            an index to which documents are added; the warm start takes a little longer.
        refit: Fit all codewords of the start together to the codes that the documents of the warm start get: nearer to
            these, and no nearer to others. For a corpus that is known when the model is trained.
    """

    name: ClassVar[str] = "rq"

    num_codebooks: int = 16
    codebook_bits: int = 8
    beam: int = 5
    eval_beam: int | None = None
    metric: Metric = "l2"
    estimator: EstimatorName = "codeword"
    selection_temperature: float = 1.0
    distortion_weight: float = 0.0
    distortion_steps: Literal["last", "all"] = "last"
    commitment_weight: float = 0.0
    restart_window: float = 20.0
    leave_one_out: bool = False
    refit: bool = False

    def __post_init__(self) -> None:
        check_size(self.num_codebooks, self.codebook_bits)
        check_choices(self, CHOICES)
        check_not_negative(self, ("distortion_weight", "commitment_weight", "restart_window"))
        for name in ("beam", "eval_beam"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, which is greedy, got {value}.")
        if not 0 < self.selection_temperature < float("inf"):
            raise InputError(f"selection_temperature must be positive, got {self.selection_temperature}.")
        if self.refit and self.leave_one_out:
            raise InputError(
                "refit fits codewords to the documents of the warm start, leave_one_out to others, got both. Set refit "
                "true for a corpus that is known, leave_one_out true for documents to come."
            )

    @property
    def selects_softly(self) -> bool:
        """Whether the estimator is the softmax over codewords."""
        return self.estimator == "softmax"

    def beam_size(self, training: bool) -> int:
        """Return the sums that the encoder keeps."""
        return self.beam if training else self.eval_beam or self.beam

    def check(self, dim: int) -> None:
        """Do nothing: codewords have as many dimensions as the vectors, so any will do."""

    def check_sample(self, documents: int) -> None:
        """Raise InputError if the warm start would have fewer documents than a codebook has codewords."""
        check_sample_size(documents, self.codebook_bits)

    def build(self, dim: int) -> ResidualQuantizer:
        """Return the head for vectors of `dim` dimensions."""
        return ResidualQuantizer(self, dim)

    def build_codebooks(self, dim: int) -> Codebooks:
        """Return the codebooks of all steps for vectors of `dim` dimensions."""
        return Codebooks(
            self.num_codebooks,
            2**self.codebook_bits,
            dim,
            estimator=self.estimator,
            temperature=self.selection_temperature,
        )


class ResidualQuantizer(CompressionHead):
    """Sum of M codewords, each chosen for what the ones before it leave.

    T(x) = sum_m c_m. Exports to `faiss.IndexResidualQuantizer` without loss: codewords become `rq.codebooks`.

    Args:
        config: Number and size of the codebooks, beam, gradient estimator, weights.
        dim: Dimension D of the vectors.
    """

    def __init__(self, config: ResidualQuantizerConfig, dim: int) -> None:
        config.check(dim)
        super().__init__(
            dim=dim, num_codes=config.num_codebooks, code_bits=config.codebook_bits, metric=config.metric
        )
        self._config = config
        self.fine = config.build_codebooks(dim)

    @property
    def config(self) -> ResidualQuantizerConfig:
        """The configuration that built this head."""
        return self._config

    @property
    def codebooks(self) -> nn.Parameter:
        """Codewords, (M, K, D)."""
        return self.fine.codewords

    def forward(self, x: Float[Tensor, "N D"]) -> HeadOutput:
        """Quantize with the configured gradient estimator, in float32 whatever the autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            codes = self._search(x)
            estimate = estimate_steps(self._config, self.fine, x, codes)
            losses = step_losses(self._config, x, self.fine.select(codes))
        return HeadOutput(
            reconstruction=estimate.codewords.sum(1),
            codes=codes,
            losses=losses,
            log_assignment=estimate.log_assignment,
        )

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "N D"], asked: Asked | None = None) -> Int[Tensor, "N M"]:
        """Return the codes that the beam search finds."""
        with torch.autocast(x.device.type, enabled=False):
            return self._search(x.float(), asked)

    def decode(self, codes: Int[Tensor, "N M"]) -> Float[Tensor, "N D"]:
        """Return the sums of the codewords."""
        return self.fine.select(codes).sum(1)

    def truncated(self, num_codebooks: int) -> ResidualQuantizer:
        """Return a head of the first codebooks, for which the first `num_codebooks` of every code are valid codes.

        With beam 1 they are the codes that it would choose itself; a longer code's beam looks further ahead.

        Raises:
            InputError: If there are not so many codebooks.
        """
        if not 1 <= num_codebooks <= self.num_codes:
            raise InputError(
                f"num_codebooks must be between 1 and {self.num_codes}, those of the head, got {num_codebooks}."
            )
        head = replace(self._config, num_codebooks=num_codebooks).build(self.dim).to(self.codebooks.device)
        head.fine.start(self.codebooks[:num_codebooks])
        return head

    def export(self) -> AdditiveCodebooks:
        """Return the codebooks on the CPU."""
        return AdditiveCodebooks(codebooks=self.codebooks.detach().cpu(), metric=self.metric)

    @torch.no_grad()
    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Start from the residual quantizer of a sample of live vectors.

        Raises:
            InputError: If the sample has fewer vectors than a codebook has codewords.
        """
        self._config.check_sample(len(sample))
        codebooks = fit.additive_codebooks(
            sample.float().cpu(),
            num_codebooks=self.num_codes,
            codebook_bits=self.code_bits,
            beam=self._config.beam,
            seed=seed,
            leave_one_out=self._config.leave_one_out,
        )
        self.fine.start(codebooks)
        if self._config.refit:
            x = sample.float().to(self.codebooks.device)
            codes = beam_search(x, self.codebooks, self._config.beam_size(training=False))
            self.fine.start(torch.stack(refit(x, self.codebooks.unbind(), codes)))

    def count(self, codes: Int[Tensor, "N M"]) -> None:
        """Add codes to the usage counts of the current window."""
        self.fine.count(codes)

    def usage_statistics(self) -> dict[str, float]:
        """Return perplexity (exp of the entropy of use, 1 to K) and the share of codewords unused in the window.

        Empty while the window holds fewer documents than a codebook has codewords.
        """
        return self.fine.usage_statistics()

    @torch.no_grad()
    def restart_dead_codes(
        self, x: Float[Tensor, "N D"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "M K"]]:
        """Once the window is full, put a residual of its step in the place of every codeword it did not use."""
        window = self._config.restart_window
        if not self.fine.has_dead_codes(window):  # the search would be for nothing
            return {}
        x = x.float()
        steps = residuals(x, self.fine.select(self.encode(x)), gradient_once=True)
        return self.fine.restart_dead_codes(steps, window, generator)

    def _search(self, x: Float[Tensor, "N D"], asked: Asked | None = None) -> Int[Tensor, "N M"]:
        return beam_search(x.detach(), self.codebooks, self._config.beam_size(self.training), asked)


def estimate_steps(
    config: ResidualQuantizerConfig, books: Codebooks, x: Float[Tensor, "N D"], codes: Int[Tensor, "N M"]
) -> Estimate:
    """Return the codewords of every step, (N, M, D), with the estimator's gradient path."""
    steps = residuals(x, books.select(codes).detach(), gradient_once=config.estimator != "softmax")
    return books.estimate(steps, codes)


def step_losses(
    config: ResidualQuantizerConfig, x: Float[Tensor, "N D"], codewords: Float[Tensor, "N M D"]
) -> dict[str, Tensor]:
    """Return distortion and commitment, as far as their weight is not 0.

    The distortion moves the codewords, the commitment the towers.
    """
    losses = {}
    if config.distortion_weight:
        sums = codewords.cumsum(1) if config.distortion_steps == "all" else codewords.sum(1, keepdim=True)
        error = (sums - x.detach()[:, None]).square().sum((1, 2)).mean()
        losses["distortion"] = config.distortion_weight * error
    if config.commitment_weight:
        error = (x - codewords.detach().sum(1)).square().sum(1).mean()
        losses["commitment"] = config.commitment_weight * error
    return losses

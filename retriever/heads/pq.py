"""Product quantization head (Jegou et al., 2011), with an optional fixed or learned rotation (OPQ, Ge et al., 2013).

Shapes: N vectors, D dimensions, M codebooks, K = 2**bits codewords, S = D // M sub-dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from retriever.distributed import world_size
from retriever.errors import InputError
from retriever.heads.base import CompressionHead, HeadConfig, HeadOutput, QuantizerFit
from retriever.heads.checks import check_choices, check_not_negative, check_sample_size, check_size
from retriever.heads.codebooks import AssignmentName, Balance, Codebooks
from retriever.heads.estimators import EstimatorName
from retriever.heads.exports import ProductCodebooks
from retriever.heads.selection import SelectionName
from retriever.scores import Metric
from retriever.transforms import ROTATIONS, RotationName

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["ProductQuantizer", "ProductQuantizerConfig", "auxiliary_losses"]

CHOICES = {
    "rotation": RotationName,
    "metric": Metric,
    "estimator": EstimatorName,
    "selection": SelectionName,
    "assignment": AssignmentName,
    "balance": Literal["none", "sinkhorn"],
    "start": Literal["fit", "uniform"],
    "distortion_reduction": Literal["mean", "sum"],
}


@dataclass(frozen=True, kw_only=True)
class ProductQuantizerConfig(HeadConfig):
    """Size and training of a `ProductQuantizer`.

    Attributes:
        num_codebooks: M; bytes of a document when codebook_bits is 8.
        codebook_bits: log2 of the codewords in a codebook.
        rotation: "none"; "opq" is learned at the warm start and then fixed; "givens_greedy", "givens_random" and
            "givens_steepest" (Givens coordinate descent) and "cayley" go on learning an orthonormal matrix from
            there by the distortion; "free" an unconstrained one (Poeem's release; inner product only).
        rotation_lr: Radians per unit of gradient that a Givens rotation turns, at the peak of the schedule.
        metric: Score of a query with a compressed document. "l2" is 1 - ||q - x||^2 / 2, the cosine of unit vectors
            before compression; it ranks better than "inner_product" after it, and needs unit vectors.
        estimator: What the retrieval loss's gradient reaches: "identity" the vectors only (Poeem),
            "softmax" vectors and all codewords through the selection softmax (MoPQ),
            "codeword" the vectors and the chosen codewords, both unchanged (RepCONC).
        selection: Score by which a codeword is chosen, as MoPQ compares them; "l2" unless you study them.
        selection_temperature: Divides the selection scores in the softmax; 1 as MoPQ released.
        assignment: Codes are chosen by the current codewords ("live"), by the starting ones for ever ("frozen", JPQ),
            or by the starting ones in training and the final ones at export ("frozen_in_training", LibVQ).
        balance: "sinkhorn" makes every codeword serve equally many documents of a batch in training (RepCONC).
        sinkhorn_epsilon: Entropic regularization, on costs mapped to [-1, 1]; 0.003 as RepCONC.
        sinkhorn_iterations: Row and column normalizations; 100 as RepCONC.
        start: "fit" is k-means (or OPQ) on live vectors, "uniform" MoPQ's random codewords in (-1, 1).
        distortion_weight: Weight of ||T(x) - sg(x)||^2, which moves codebooks and learned rotations (Poeem).
        distortion_reduction: "mean" over the documents of a batch, or "sum" as Poeem released.
        commitment_weight: Weight of mean ||x - sg(T(x))||^2, which moves the towers (VQ-VAE, arXiv:1711.00937).
        restart_window: Training documents a codeword, on average, after which unused codewords are restarted.
    """

    name: ClassVar[str] = "pq"

    num_codebooks: int = 16
    codebook_bits: int = 8
    rotation: RotationName = "opq"
    rotation_lr: float = 0.01
    metric: Metric = "l2"
    estimator: EstimatorName = "codeword"
    selection: SelectionName = "l2"
    selection_temperature: float = 1.0
    assignment: AssignmentName = "live"
    balance: Literal["none", "sinkhorn"] = "none"
    sinkhorn_epsilon: float = 0.003
    sinkhorn_iterations: int = 100
    start: Literal["fit", "uniform"] = "fit"
    distortion_weight: float = 0.0
    distortion_reduction: Literal["mean", "sum"] = "mean"
    commitment_weight: float = 0.0
    restart_window: float = 20.0

    def __post_init__(self) -> None:
        check_size(self.num_codebooks, self.codebook_bits)
        check_choices(self, CHOICES)
        for name in ("selection_temperature", "sinkhorn_epsilon", "sinkhorn_iterations"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be positive, got {getattr(self, name)}.")
        check_not_negative(self, ("distortion_weight", "commitment_weight", "restart_window", "rotation_lr"))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.sinkhorn_epsilon < 0.002:
            raise InputError(
                f"sinkhorn_epsilon must be at least 0.002, or exp(-2 / epsilon) is 0 in float64, got "
                f"{self.sinkhorn_epsilon}."
            )
        if not ROTATIONS[self.rotation].orthonormal and self.metric != "inner_product":
            raise InputError(
                f"rotation {self.rotation!r} keeps no distances, so it needs metric inner_product, got "
                f"{self.metric!r}. Set metric inner_product, or rotation givens_greedy."
            )
        if ROTATIONS[self.rotation].learned and not self.distortion_weight and self.estimator == "identity":
            raise InputError(
                f"rotation {self.rotation!r} learns nothing with estimator identity and distortion_weight 0. "
                "Set distortion_weight 1, or rotation opq."
            )
        if self.assignment != "live" and ROTATIONS[self.rotation].learned:
            raise InputError(
                f"assignment {self.assignment!r} keeps codes only behind a fixed rotation, got {self.rotation!r}. "
                "Set rotation opq."
            )
        if self.assignment != "live" and (self.selection != "l2" or self.balance != "none"):
            raise InputError(
                f"assignment {self.assignment!r} chooses by starting codewords, so it goes with selection l2 and "
                f"balance none, got {self.selection!r} and {self.balance!r}."
            )

    @property
    def selects_softly(self) -> bool:
        """Whether the estimator is the softmax over codewords."""
        return self.estimator == "softmax"

    def check(self, dim: int) -> None:
        """Raise InputError if `dim` is not a multiple of `num_codebooks`."""
        if dim % self.num_codebooks:
            divisors = [m for m in range(1, dim + 1) if dim % m == 0]
            nearest = min(divisors, key=lambda m: (abs(m - self.num_codebooks), -m))
            raise InputError(
                f"the dimension must be a multiple of num_codebooks, got dim={dim} and "
                f"num_codebooks={self.num_codebooks}. Try num_codebooks={nearest}."
            )

    def check_sample(self, documents: int) -> None:
        """Raise InputError if the warm start would have fewer documents than a codebook has codewords."""
        check_sample_size(documents, self.codebook_bits)

    def build(self, dim: int) -> ProductQuantizer:
        """Return the head for vectors of `dim` dimensions."""
        return ProductQuantizer(self, dim)

    def build_codebooks(self, dim: int) -> Codebooks:
        """Return the codebooks of sub-vectors for vectors of `dim` dimensions."""
        balance = Balance(epsilon=self.sinkhorn_epsilon, iterations=self.sinkhorn_iterations)
        return Codebooks(
            self.num_codebooks,
            2**self.codebook_bits,
            dim // self.num_codebooks,
            estimator=self.estimator,
            selection=self.selection,
            temperature=self.selection_temperature,
            assignment=self.assignment,
            balance=balance if self.balance == "sinkhorn" else None,
        )


class ProductQuantizer(CompressionHead):
    """Quantizes M disjoint sub-vectors independently.

    Exports to `faiss.IndexPQ` without loss: codewords become `pq.centroids`, the rotation a `LinearTransform`.

    Args:
        config: Number and size of the codebooks, rotation, gradient estimator, weights.
        dim: Dimension D of the vectors; a multiple of `config.num_codebooks`.

    Raises:
        InputError: If `dim` is not a multiple of `config.num_codebooks`.
    """

    def __init__(self, config: ProductQuantizerConfig, dim: int) -> None:
        config.check(dim)
        super().__init__(
            dim=dim, num_codes=config.num_codebooks, code_bits=config.codebook_bits, metric=config.metric
        )
        self._config = config
        self.rotate = ROTATIONS[config.rotation](dim)
        self.fine = config.build_codebooks(dim)

    @property
    def config(self) -> ProductQuantizerConfig:
        """The configuration that built this head."""
        return self._config

    @property
    def codebooks(self) -> nn.Parameter:
        """Codewords, (M, K, S)."""
        return self.fine.codewords

    @property
    def rotation(self) -> Float[Tensor, "D D"]:
        """Matrix A of z = A x."""
        return self.rotate.matrix

    @property
    def usage(self) -> Int[Tensor, "M K"]:
        """How often each codeword was used in the current window."""
        return self.fine.usage

    def forward(self, x: Float[Tensor, "N D"]) -> HeadOutput:
        """Quantize with the configured gradient estimator, in float32 whatever the autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x, matrix = x.float(), self.rotation
            z = x @ matrix.detach().T
            estimate, codes = self.fine(self._split(z))
            back = matrix.detach() if self._config.estimator == "identity" else matrix
            losses = auxiliary_losses(self._config, x, matrix, self.fine.select(codes).flatten(1))
            reconstruction = estimate.codewords.flatten(1) @ back
        return HeadOutput(
            reconstruction=reconstruction, codes=codes, losses=losses, log_assignment=estimate.log_assignment
        )

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N M"]:
        """Return the best codeword of every sub-vector, by default the nearest."""
        with torch.autocast(x.device.type, enabled=False):
            return self.fine.encode(self._split(x.float() @ self.rotation.T))

    def decode(self, codes: Int[Tensor, "N M"]) -> Float[Tensor, "N D"]:
        """Return the codewords, joined and rotated back."""
        return self.fine.select(codes).flatten(1) @ self.rotation

    def export(self) -> ProductCodebooks:
        """Return codebooks and rotation on the CPU."""
        return ProductCodebooks(
            codebooks=self.codebooks.detach().cpu(),
            rotation=None if self._config.rotation == "none" else self.rotation.detach().cpu(),
            orthonormal=self.rotate.orthonormal,
            metric=self.metric,
        )

    @torch.no_grad()
    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Start from the (O)PQ of a sample of live vectors, or from the random codewords that are there.

        Raises:
            InputError: If the sample has fewer vectors than a codebook has codewords.
        """
        if self._config.start == "uniform":
            return
        self._config.check_sample(len(sample))
        rotation, codebooks = fit.product_codebooks(
            sample.float().cpu(),
            num_codebooks=self.num_codes,
            codebook_bits=self.code_bits,
            rotate=self._config.rotation != "none",
            seed=seed,
        )
        self.fine.start(codebooks)
        if rotation is not None:
            self.rotate.start(rotation)

    def manual_parameters(self) -> list[nn.Parameter]:
        """Return a Givens rotation's matrix."""
        return self.rotate.manual_parameters()

    def descend(self, factor: float, generator: torch.Generator) -> None:
        """Turn a Givens rotation."""
        self.rotate.descend(factor * self._config.rotation_lr, generator)

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
        """Once the window is full, put a random sub-vector of `x` in the place of every codeword it did not use."""
        z = self._split(x.float() @ self.rotation.T)
        return self.fine.restart_dead_codes(z, self._config.restart_window, generator)

    def _split(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N M S"]:
        return z.view(len(z), *self.fine.codewords.shape[::2])


def auxiliary_losses(
    config: ProductQuantizerConfig,
    x: Float[Tensor, "N D"],
    matrix: Float[Tensor, "D D"],
    codewords: Float[Tensor, "N D"],
) -> dict[str, Tensor]:
    """Return distortion and commitment, as far as their weight is not 0.

    The distortion moves codewords and a learned rotation, (T(x) - sg(x))^2 = (codewords - A sg(x))^2; the
    commitment moves the towers.
    """
    losses = {}
    if config.distortion_weight:
        error = (codewords - x.detach() @ matrix.T).square().sum(1)
        # gradients are averaged over the devices, so a sum over all of them needs their number as a factor
        reduced = error.mean() if config.distortion_reduction == "mean" else world_size() * error.sum()
        losses["distortion"] = config.distortion_weight * reduced
    if config.commitment_weight:
        error = (x @ matrix.detach().T - codewords.detach()).square().sum(1).mean()
        losses["commitment"] = config.commitment_weight * error
    return losses

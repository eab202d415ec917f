"""Product quantization head (Jegou et al., 2011), with an optional frozen OPQ rotation (Ge et al., 2013).

Shapes: N vectors, D dimensions, M codebooks, K = 2**bits codewords, S = D // M sub-dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from retriever.errors import InputError
from retriever.heads.base import CompressionHead, HeadConfig, HeadOutput, ProductCodebooks, QuantizerFit
from retriever.heads.estimators import ESTIMATORS, select
from retriever.scores import Metric

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["ProductQuantizer", "ProductQuantizerConfig"]

ROWS_AT_ONCE = 4096  # bounds the (rows, M, K) table of distances in `encode`

Rotation = Literal["none", "opq"]
EstimatorName = Literal["identity", "codeword", "softmax"]


@dataclass(frozen=True, kw_only=True)
class ProductQuantizerConfig(HeadConfig):
    """Size and training of a `ProductQuantizer`.

    Attributes:
        num_codebooks: M; bytes of a document when codebook_bits is 8.
        codebook_bits: log2 of the codewords in a codebook.
        rotation: "opq" learns an orthonormal rotation at the warm start and freezes it; "none" has none.
        metric: Score of a query with a compressed document. "l2" is 1 - ||q - x||^2 / 2, the cosine of unit vectors
            before compression; it ranks better than "inner_product" after it, and needs unit vectors.
        estimator: What the retrieval loss's gradient reaches: "identity" the vectors only (Poeem),
            "softmax" vectors and all codewords through the selection softmax (MoPQ),
            "codeword" the vectors and the chosen codewords, both unchanged (RepCONC).
        selection_temperature: Divides the squared distances in the selection softmax; 1 as MoPQ released.
        distortion_weight: Weight of mean ||T(x) - sg(x)||^2, which moves the codebooks (Poeem).
        commitment_weight: Weight of mean ||x - sg(T(x))||^2, which moves the towers (VQ-VAE, arXiv:1711.00937).
        restart_window: Training documents a codeword, on average, after which unused codewords are restarted.
    """

    name: ClassVar[str] = "pq"

    num_codebooks: int = 16
    codebook_bits: int = 8
    rotation: Rotation = "opq"
    metric: Metric = "l2"
    estimator: EstimatorName = "codeword"
    selection_temperature: float = 1.0
    distortion_weight: float = 0.0
    commitment_weight: float = 0.0
    restart_window: float = 20.0

    def __post_init__(self) -> None:
        if self.num_codebooks < 1:
            raise InputError(f"num_codebooks must be at least 1, got {self.num_codebooks}.")
        if not 1 <= self.codebook_bits <= 16:
            raise InputError(f"codebook_bits must be between 1 and 16, got {self.codebook_bits}.")
        if self.rotation not in get_args(Rotation):
            raise InputError(
                f"rotation must be one of {', '.join(get_args(Rotation))}, got {self.rotation!r}."
            )
        if self.metric not in get_args(Metric):
            raise InputError(f"metric must be one of {', '.join(get_args(Metric))}, got {self.metric!r}.")
        if self.estimator not in ESTIMATORS:
            raise InputError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}.")
        if not 0 < self.selection_temperature < float("inf"):
            raise InputError(f"selection_temperature must be positive, got {self.selection_temperature}.")
        for name in ("distortion_weight", "commitment_weight", "restart_window"):
            if not 0 <= getattr(self, name) <= float("inf"):
                raise InputError(f"{name} must be zero or more, got {getattr(self, name)}.")

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
        if documents < 2**self.codebook_bits:
            raise InputError(
                f"the warm start needs at least {2**self.codebook_bits} documents for {self.codebook_bits}-bit "
                f"codebooks, got {documents}. Raise warm_start_documents or lower codebook_bits."
            )

    def build(self, dim: int) -> ProductQuantizer:
        """Return the head for vectors of `dim` dimensions."""
        return ProductQuantizer(self, dim)


class ProductQuantizer(CompressionHead):
    """Quantizes M disjoint sub-vectors independently.

    Exports to `faiss.IndexPQ` without loss: codewords become `pq.centroids`, the rotation a `LinearTransform`.

    Args:
        config: Number and size of the codebooks, rotation, gradient estimator, weights.
        dim: Dimension D of the vectors; a multiple of `config.num_codebooks`.

    Raises:
        InputError: If `dim` is not a multiple of `config.num_codebooks`.
    """

    codebooks: nn.Parameter
    rotation: Tensor
    usage: Tensor

    def __init__(self, config: ProductQuantizerConfig, dim: int) -> None:
        config.check(dim)
        super().__init__(
            dim=dim, num_codes=config.num_codebooks, code_bits=config.codebook_bits, metric=config.metric
        )
        self._config = config
        self._estimator = ESTIMATORS[config.estimator]
        shape = (self.num_codes, 2**self.code_bits, dim // self.num_codes)
        self.codebooks = nn.Parameter(torch.empty(shape).uniform_(-1, 1))  # MoPQ's start; see warm_start
        self.register_buffer("rotation", torch.eye(dim))
        self.register_buffer("usage", torch.zeros(shape[:2], dtype=torch.int64))

    @property
    def config(self) -> ProductQuantizerConfig:
        """The configuration that built this head."""
        return self._config

    def forward(self, x: Float[Tensor, "N D"]) -> HeadOutput:
        """Quantize with the configured gradient estimator, in float32 whatever the autocast."""
        with torch.autocast(x.device.type, enabled=False):
            z = self._split(x.float())
            distances = self._distances(z)
            codes = distances.argmin(-1)
            estimate = self._estimator(
                z, self.codebooks, -distances / self._config.selection_temperature, codes
            )
            reconstruction = estimate.codewords.flatten(1) @ self.rotation
            losses = self._auxiliary_losses(z, select(self.codebooks, codes))
        return HeadOutput(
            reconstruction=reconstruction, codes=codes, losses=losses, log_assignment=estimate.log_assignment
        )

    def _auxiliary_losses(self, z: Tensor, codewords: Tensor) -> dict[str, Tensor]:
        """Squared error of a vector, averaged over the vectors, for each side that has a weight."""
        losses = {}
        if self._config.distortion_weight:
            error = (codewords - z.detach()).square().sum((1, 2)).mean()
            losses["distortion"] = self._config.distortion_weight * error
        if self._config.commitment_weight:
            error = (z - codewords.detach()).square().sum((1, 2)).mean()
            losses["commitment"] = self._config.commitment_weight * error
        return losses

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N M"]:
        """Return the nearest codeword of every sub-vector, by squared L2 distance."""
        with torch.autocast(x.device.type, enabled=False):
            parts = [self._distances(self._split(rows.float())).argmin(-1) for rows in x.split(ROWS_AT_ONCE)]
        return torch.cat(parts) if parts else x.new_empty((0, self.num_codes), dtype=torch.int64)

    def decode(self, codes: Int[Tensor, "N M"]) -> Float[Tensor, "N D"]:
        """Return the codewords, joined and rotated back."""
        return select(self.codebooks, codes).flatten(1) @ self.rotation

    def export(self) -> ProductCodebooks:
        """Return codebooks and rotation on the CPU."""
        rotation = None if self._config.rotation == "none" else self.rotation.detach().cpu()
        return ProductCodebooks(
            codebooks=self.codebooks.detach().cpu(), rotation=rotation, metric=self.metric
        )

    @torch.no_grad()
    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Start from the (O)PQ of a sample of live vectors.

        Raises:
            InputError: If the sample has fewer vectors than a codebook has codewords.
        """
        self._config.check_sample(len(sample))
        rotation, codebooks = fit.product_codebooks(
            sample.float().cpu(),
            num_codebooks=self.num_codes,
            codebook_bits=self.code_bits,
            rotate=self._config.rotation == "opq",
            seed=seed,
        )
        self.codebooks.copy_(codebooks)
        if rotation is not None:
            self.rotation.copy_(rotation)
        self.usage.zero_()

    @torch.no_grad()
    def count(self, codes: Int[Tensor, "N M"]) -> None:
        """Add codes to the usage counts of the current window."""
        ones = torch.ones_like(codes.T)
        self.usage.scatter_add_(1, codes.T, ones)

    def usage_statistics(self) -> dict[str, float]:
        """Return perplexity (exp of the entropy of use, 1 to K) and the share of codewords unused in the window.

        Empty while the window holds fewer documents than a codebook has codewords.
        """
        if int(self.usage[0].sum()) < self.usage.shape[1]:
            return {}
        share = self.usage.double() / self.usage.sum(1, keepdim=True).clamp(min=1)
        entropy = -(share * share.clamp(min=1e-12).log()).sum(1)  # (M,)
        dead = (self.usage == 0).double().mean()
        return {"perplexity": entropy.exp().mean().item(), "dead_codes": dead.item()}

    @torch.no_grad()
    def restart_dead_codes(
        self, x: Float[Tensor, "N D"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "M K"]]:
        """Once the window is full, put a random sub-vector of `x` in the place of every codeword it did not use."""
        if int(self.usage[0].sum()) < self._config.restart_window * self.usage.shape[1]:
            return {}
        z = self._split(x.float()).transpose(0, 1)  # (M, N, S)
        dead = self.usage == 0
        rows = torch.randint(len(x), dead.shape, generator=generator).to(x.device)  # (M, K)
        replacement = z.gather(1, rows.unsqueeze(-1).expand(-1, -1, z.shape[-1]))
        self.codebooks.copy_(torch.where(dead.unsqueeze(-1), replacement, self.codebooks))
        self.usage.zero_()
        return {self.codebooks: dead} if bool(dead.any()) else {}

    def _split(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N M S"]:
        return (x @ self.rotation.T).view(len(x), self.num_codes, self.codebooks.shape[-1])

    def _distances(self, z: Float[Tensor, "N M S"]) -> Float[Tensor, "N M K"]:
        """Squared L2 distance of every sub-vector to every codeword."""
        products = torch.einsum("nms,mks->nmk", z, self.codebooks)
        return z.square().sum(-1, keepdim=True) - 2 * products + self.codebooks.square().sum(-1)

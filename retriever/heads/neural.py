"""What the neural residual quantizers (QINCo, QINCo2) share: codebooks conditioned on the reconstruction so far.

    x^0 = 0, or the centroid of the vector's inverted list;  x^m = x^(m-1) + f_m(c_m, x^(m-1))

f_1 is the codeword itself where there is no list. All of this is in the space of standardized vectors,
z = (x - offset) / scale.

Shapes: N vectors, D dimensions, J lists, M codebooks, K = 2**bits codewords. A vector's codes are M codewords, behind
the number of its list where there are lists.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from retriever.errors import InputError
from retriever.heads.base import (
    CompressionHead,
    HeadConfig,
    HeadOutput,
    QuantizerFit,
    list_number_size,
    pack_codes,
    unpack_codes,
)
from retriever.heads.checks import check_choices, check_not_negative, check_sample_size, check_size
from retriever.heads.codebooks import Codebooks
from retriever.heads.exports import NeuralCodec
from retriever.heads.lists import check_list_sample, pack_listed, unpack_listed
from retriever.heads.residual import beam_search
from retriever.heads.step_network import StepNetwork
from retriever.scores import Metric

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool, Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = ["NeuralQuantizer", "NeuralQuantizerConfig"]


@dataclass(frozen=True, kw_only=True)
class NeuralQuantizerConfig(HeadConfig):
    """Size and training that the neural residual quantizers share.

    Attributes:
        num_codebooks: M; bytes of a document when codebook_bits is 8. The first m codes of a document are a code of m
            bytes (see `truncated`), so train the longest that you want.
        codebook_bits: log2 of the codewords in a codebook.
        num_lists: J, inverted lists of k-means centroids that stay as they are (IVF-QINCo); 0 for none.
        metric: Score of a query with a compressed document; "l2" is 1 - ||q - x||^2 / 2 and needs unit vectors.
        distortion_weight: Weight of the sum over the steps of the squared error, mean over documents and dimensions,
            of standardized vectors. It moves codebooks and networks, not the towers.
        commitment_weight: Weight of mean ||x - sg(T(x))||^2, which moves the towers (VQ-VAE, arXiv:1711.00937).
        task_gradient: Let the retrieval loss reach codebooks and networks too, through the decoded vectors
            (Endex's extension); otherwise it reaches the vectors alone.
        detach_steps: Keep the gradient of a step from the steps before it (an ablation of QINCo's paper).
        restart_window: Training documents a codeword, on average, after which unused codewords are restarted.
    """

    num_codebooks: int = 16
    codebook_bits: int = 8
    num_lists: int = 0
    metric: Metric = "l2"
    distortion_weight: float = 1.0
    commitment_weight: float = 0.0
    task_gradient: bool = False
    detach_steps: bool = False
    restart_window: float = 20.0

    def __post_init__(self) -> None:
        check_size(self.num_codebooks, self.codebook_bits)
        check_choices(self, {"metric": Metric})
        check_not_negative(self, ("distortion_weight", "commitment_weight", "restart_window"))
        if self.num_lists < 0:
            raise InputError(f"num_lists must be 0, for no lists, or more, got {self.num_lists}.")
        if not self.distortion_weight and not self.task_gradient:
            raise InputError(
                "distortion_weight 0 leaves nothing that trains codebooks and networks. Set it to 1, or "
                "task_gradient true."
            )

    def check(self, dim: int) -> None:
        """Accept every dimension."""

    def check_sample(self, documents: int) -> None:
        """Raise InputError if the warm start would have fewer documents than lists or codewords."""
        check_sample_size(documents, self.codebook_bits)
        check_list_sample(documents, self.num_lists)

    @abstractmethod
    def build(self, dim: int) -> NeuralQuantizer:
        """Return the head for vectors of `dim` dimensions."""

    @abstractmethod
    def build_network(self, dim: int) -> StepNetwork:
        """Return the network of a step."""


class NeuralQuantizer(CompressionHead):
    """Residual quantizer whose codewords a network adapts to the reconstruction so far.

    Args:
        config: Lists, codebooks, networks, weights.
        dim: Dimension D of the vectors.
    """

    offset: Tensor
    scale: Tensor
    centroids: Tensor | None

    def __init__(self, config: NeuralQuantizerConfig, dim: int) -> None:
        config.check(dim)
        listed = int(config.num_lists > 0)
        super().__init__(
            dim=dim,
            num_codes=listed + config.num_codebooks,
            code_bits=config.codebook_bits,
            metric=config.metric,
        )
        self._config = config
        self.books = Codebooks(config.num_codebooks, 2**config.codebook_bits, dim, estimator="identity")
        self.networks = nn.ModuleList(
            config.build_network(dim) for _ in range(config.num_codebooks - 1 + listed)
        )
        self.register_buffer("offset", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("centroids", torch.zeros(config.num_lists, dim) if listed else None)

    @property
    def config(self) -> NeuralQuantizerConfig:
        """The configuration that built this head."""
        return self._config

    @property
    def codebooks(self) -> nn.Parameter:
        """Codewords of standardized vectors, (M, K, D)."""
        return self.books.codewords

    @property
    def list_bytes(self) -> int:
        """Bytes of a list number, as `faiss.IndexIVF` counts them; 0 where there are no lists."""
        return list_number_size(self._config.num_lists) if self._config.num_lists else 0

    @property
    def code_size(self) -> int:
        """Bytes of a packed row: list number, if any, and code."""
        return self.list_bytes + (self._config.num_codebooks * self.code_bits + 7) // 8

    @property
    def rate(self) -> float:
        """Bits of a list's number, if any, and of a code."""
        return math.log2(self._config.num_lists or 1) + self._config.num_codebooks * self.code_bits

    def network(self, step: int) -> StepNetwork | None:
        """Return the network of a step, counted from 0; None for a first step without lists."""
        place = step if self.centroids is not None else step - 1
        return None if place < 0 else self.networks[place]  # type: ignore[return-value]

    def standardize(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Return z = (x - offset) / scale in float32."""
        return (x.float() - self.offset) / self.scale

    def restore(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Invert `standardize`."""
        return z * self.scale + self.offset

    def forward(self, x: Float[Tensor, "N D"]) -> HeadOutput:
        """Encode without a graph, then decode the codes with one (QINCo's two passes), in float32.

        The retrieval loss's gradient reaches the vectors unchanged, and with `task_gradient` also what decodes them.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            z = self.standardize(x.detach())
            codes = self._encode(z)
            steps = self.reconstructions(codes)
            decoded = self.restore(steps[-1])
            losses = self._losses(x, z, codes, steps)
            if self._config.task_gradient:
                reconstruction = decoded + (x - x.detach())
            else:
                reconstruction = x + (decoded - x).detach()
            coarse = None
            if self.centroids is not None:
                coarse = x + (self.restore(self.centroids[codes[:, 0]]) - x).detach()
        return HeadOutput(reconstruction=reconstruction, codes=codes, losses=losses, coarse=coarse)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N M"]:
        """Return the codes, list number first where there are lists."""
        with torch.autocast(x.device.type, enabled=False):
            return self._encode(self.standardize(x))

    def decode(self, codes: Int[Tensor, "N M"]) -> Float[Tensor, "N D"]:
        """Return the vectors that codes stand for."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.restore(self.reconstructions(codes)[-1])

    def reconstructions(self, codes: Int[Tensor, "N M"]) -> list[Float[Tensor, "N D"]]:
        """Return the standardized reconstruction after every step."""
        steps: list[Tensor] = []
        context = self._begin(codes)
        fine = codes[:, self.num_codes - self._config.num_codebooks :]
        for step, codeword in enumerate(self.books.select(fine).unbind(1)):
            network = self.network(step)
            if self._config.detach_steps:
                context = context.detach()
            context = context + (codeword if network is None else network(codeword, context))
            steps.append(context)
        return steps

    def truncated(self, num_codebooks: int) -> Self:
        """Return a head of the first steps, for which the first `num_codebooks` of every code are valid codes.

        Greedy codes are those that it would choose itself; a longer code's beam looks further ahead.

        Raises:
            InputError: If there are not so many steps.
        """
        if not 1 <= num_codebooks <= self._config.num_codebooks:
            raise InputError(
                f"num_codebooks must be between 1 and {self._config.num_codebooks}, those of the head, got "
                f"{num_codebooks}."
            )
        head = replace(self._config, num_codebooks=num_codebooks).build(self.dim).to(self.codebooks.device)
        mine = self.state_dict()
        # of what there is for every step, the first ones; the rest is named by its step, or has none
        head.load_state_dict(
            {
                name: mine[name] if mine[name].shape == value.shape else mine[name][: len(value)]
                for name, value in head.state_dict().items()
            }
        )
        return head  # type: ignore[return-value]

    def pack(self, codes: Int[Tensor, "N M"]) -> NDArray[np.uint8]:
        """Pack as FAISS does: list number (little-endian) where there are lists, then the code."""
        if self.centroids is None:
            return pack_codes(codes, self.code_bits)
        return pack_listed(codes, self._config.num_lists, self.code_bits)

    def unpack(self, packed: UInt8[NDArray[np.uint8], "N size"]) -> Int[Tensor, "N M"]:
        """Invert `pack`."""
        if self.centroids is None:
            return unpack_codes(packed, self.num_codes, self.code_bits)
        return unpack_listed(packed, self._config.num_lists, self._config.num_codebooks, self.code_bits)

    def export(self) -> NeuralCodec:
        """Return the sizes and, where there are lists, their centroids."""
        centroids = None if self.centroids is None else self.restore(self.centroids).cpu()
        return NeuralCodec(
            dim=self.dim,
            num_codes=self._config.num_codebooks,
            code_bits=self.code_bits,
            centroids=centroids,
            metric=self.metric,
        )

    @torch.no_grad()
    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Start from the residual quantizer of a sample of live vectors, standardized.

        Raises:
            InputError: If the sample has fewer vectors than lists, or than a codebook has codewords.
        """
        self._config.check_sample(len(sample))
        offset, scale = self._standardization(sample.float())
        self.offset.copy_(offset)
        self.scale.copy_(scale)
        z, size = self.standardize(sample).cpu(), self._config.num_codebooks
        options: dict[str, Any] = {
            "num_codebooks": size,
            "codebook_bits": self.code_bits,
            "beam": 1,
            "seed": seed,
        }
        if self.centroids is None:
            codebooks = fit.additive_codebooks(z, **options)
        else:
            centroids, codebooks = fit.coarse_additive_codebooks(
                z, num_lists=self._config.num_lists, **options
            )
            self.centroids.copy_(centroids)
        self._start_codebooks(codebooks.to(self.codebooks.device), seed)

    def count(self, codes: Int[Tensor, "N M"]) -> None:
        """Add codes to the usage counts of the current window."""
        self.books.count(codes[:, self.num_codes - self._config.num_codebooks :])

    def usage_statistics(self) -> dict[str, float]:
        """Return perplexity and the share of codewords unused in the window; empty while it is short."""
        return self.books.usage_statistics()

    @torch.no_grad()
    def restart_dead_codes(
        self, x: Float[Tensor, "N D"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """Once the window is full, put what a step had to add to a vector of `x` in the place of unused codewords."""
        window = self._config.restart_window
        if not self.books.has_dead_codes(window):
            return {}
        z = self.standardize(x)
        codes = self._encode(z)
        before = [self._begin(codes), *self.reconstructions(codes)[:-1]]
        residuals = z[:, None] - torch.stack(before, 1)  # (N, M, D)
        return self.books.restart_dead_codes(residuals, window, generator)

    @torch.no_grad()
    def _encode(self, z: Float[Tensor, "N D"]) -> Int[Tensor, "N M"]:
        """Return the codes of standardized vectors."""
        if self.centroids is None:
            return self._choose(z, torch.zeros_like(z[:1]), torch.zeros_like(z[:, 0], dtype=torch.int64))
        lists = beam_search(z, self.centroids[None], 1)
        return torch.cat([lists, self._choose(z, self.centroids, lists[:, 0])], 1)

    @abstractmethod
    def _choose(
        self, z: Float[Tensor, "N D"], starts: Float[Tensor, "J D"], lists: Int[Tensor, " N"]
    ) -> Int[Tensor, "N M"]:
        """Return the codes of standardized vectors, without list numbers.

        Args:
            z: Vectors.
            starts: Reconstructions before the first step.
            lists: Which of these is a vector's.
        """

    @abstractmethod
    def _standardization(self, sample: Float[Tensor, "n D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, ""]]:
        """Return offset and scale for vectors like those of a sample."""

    def _start_codebooks(self, codebooks: Float[Tensor, "M K D"], seed: int) -> None:
        """Take over the codebooks of a residual quantizer."""
        self.books.start(codebooks)

    def _begin(self, codes: Int[Tensor, "N M"]) -> Float[Tensor, "N D"]:
        """Return the reconstruction before the first step: zero, or the list's centroid."""
        if self.centroids is None:
            return self.codebooks.new_zeros(len(codes), self.dim)
        return self.centroids[codes[:, 0]]

    def _losses(
        self,
        x: Float[Tensor, "N D"],
        z: Float[Tensor, "N D"],
        codes: Int[Tensor, "N M"],
        steps: list[Float[Tensor, "N D"]],
    ) -> dict[str, Tensor]:
        """Return distortion and commitment, as far as their weight is not 0."""
        losses = {}
        if self._config.distortion_weight:
            errors = torch.stack([(step - z).square().mean() for step in steps])
            losses["distortion"] = self._config.distortion_weight * errors.sum()
        if self._config.commitment_weight:
            error = (x - self.restore(steps[-1]).detach()).square().sum(1).mean()
            losses["commitment"] = self._config.commitment_weight * error
        return losses

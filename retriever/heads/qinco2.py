"""QINCo2: QINCo with a short list of candidates, a beam, and networks of any width (Vallaeys et al., arXiv:2501.03078).

    f_m(c, x^(m-1)):  u = P_in c;  u <- u + W [u ; x^(m-1)] + b;  L times u <- u + V relu(U u);  c + P_out u

Written from the paper's equations.

Shapes: N vectors, D dimensions, M codebooks, K = 2**bits codewords, A candidates, B hypotheses of the beam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from retriever.errors import InputError
from retriever.heads.checks import check_choices, check_not_negative
from retriever.heads.estimators import select
from retriever.heads.neural import NeuralQuantizer, NeuralQuantizerConfig
from retriever.heads.step_network import StepNetwork
from retriever.heads.step_search import CandidateStep, PlainStep, SearchStep, search_codes

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["PRESETS", "QINCo2", "QINCo2Config"]

Preset = Literal["S", "M", "L"]

PRESETS: dict[Preset, dict[str, int]] = {
    "S": {"num_blocks": 2, "width": 128, "hidden": 256},
    "M": {"num_blocks": 4, "width": 384, "hidden": 384},
    "L": {"num_blocks": 16, "width": 384, "hidden": 384},
}
"""Sizes of the paper's models."""


@dataclass(frozen=True, kw_only=True)
class QINCo2Config(NeuralQuantizerConfig):
    """Size and training of a `QINCo2`.

    Attributes:
        preset: Sizes of the networks as published: "S" (2 blocks, width 128, 256 hidden units), "M" (4, 384, 384) or
            "L" (16, 384, 384). Each of the next three overrides its part.
        num_blocks: L, residual blocks of a step.
        width: Width of the blocks, d_e; projections lead to and from it where it is not the dimension.
        hidden: Hidden units of a block.
        candidates: A, codewords that the network is evaluated on for a hypothesis in training: those nearest to the
            residual in a codebook of their own.
        beam: B, hypotheses that the encoder keeps at every step but the last in training; 1 is greedy.
        eval_candidates: A outside training; by default as in training. The paper takes twice as many.
        eval_beam: B outside training; by default as in training. The paper takes twice as many.
        pout_zero_init: Start P_out at 0, so that f(c, x) = c. The release's random P_out destroys the start.
        start_noise: Noise on the starting codewords, in standard deviations of their components; the paper has 0.1.
    """

    name: ClassVar[str] = "qinco2"

    preset: Preset = "S"
    num_blocks: int | None = None
    width: int | None = None
    hidden: int | None = None
    candidates: int = 16
    beam: int = 32
    eval_candidates: int | None = None
    eval_beam: int | None = None
    pout_zero_init: bool = True
    start_noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"preset": Preset})
        check_not_negative(self, ("start_noise",))
        for name in ("num_blocks", "width", "hidden", "candidates", "beam", "eval_candidates", "eval_beam"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")

    def size(self, name: str) -> int:
        """Return `num_blocks`, `width` or `hidden`: as set, else the preset's."""
        return getattr(self, name) or PRESETS[self.preset][name]

    def build(self, dim: int) -> QINCo2:
        """Return the head for vectors of `dim` dimensions."""
        return QINCo2(self, dim)

    def build_network(self, dim: int) -> StepNetwork:
        """Return the network of a step."""
        return StepNetwork(
            dim,
            num_blocks=self.size("num_blocks"),
            hidden=self.size("hidden"),
            width=self.size("width"),
            zero_output=self.pout_zero_init,
        )


class QINCo2(NeuralQuantizer):
    """Every step tries the A most promising codewords of each of B hypotheses and keeps the B best.

    With A = K and B = 1 the encoder is QINCo's. Where the width is the dimension there are no projections, and c is
    added once, not twice, so that the start is the residual quantizer there too.
    """

    _config: QINCo2Config

    def __init__(self, config: QINCo2Config, dim: int) -> None:
        super().__init__(config, dim)
        shape = (len(self.networks), *self.codebooks.shape[1:])
        self.shortlists = nn.Parameter(torch.empty(shape).uniform_(-1, 1))  # one of each step with a network

    @property
    def config(self) -> QINCo2Config:
        """The configuration that built this head."""
        return self._config

    def _choose(
        self, z: Float[Tensor, "N D"], starts: Float[Tensor, "J D"], lists: Int[Tensor, " N"]
    ) -> Int[Tensor, "N M"]:
        """Return what a beam search with the widths of training, or of evaluation, finds."""
        config = self._config
        candidates, beam = config.candidates, config.beam
        if not self.training:
            candidates, beam = config.eval_candidates or candidates, config.eval_beam or beam
        steps: list[SearchStep] = []
        for number, words in enumerate(self.codebooks):
            network = self.network(number)
            if network is None:
                steps.append(PlainStep(words))
            else:
                # a single hypothesis, the list's centroid, needs as many candidates as the beam is to keep
                enough = candidates if steps else max(candidates, beam)
                shortlist = self.shortlists[number - len(self.codebooks)]
                steps.append(CandidateStep(words, network, shortlist, enough))
        return search_codes(z, starts[lists], steps, beam)

    def _standardization(self, sample: Float[Tensor, "n D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, ""]]:
        """Return the mean vector, and one standard deviation of all components around it."""
        mean = sample.mean(0)
        return mean, (sample - mean).std()

    def _start_codebooks(self, codebooks: Float[Tensor, "M K D"], seed: int) -> None:
        """Take over the codebooks of a residual quantizer with noise, and the same ones to choose candidates by."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(codebooks.shape, generator=generator).to(codebooks.device)
        spread = codebooks.std((1, 2), keepdim=True)
        super()._start_codebooks(codebooks + self._config.start_noise * spread * noise, seed)
        self.shortlists.copy_(self._conditioned(self.codebooks))

    def _losses(
        self,
        x: Float[Tensor, "N D"],
        z: Float[Tensor, "N D"],
        codes: Int[Tensor, "N M"],
        steps: list[Float[Tensor, "N D"]],
    ) -> dict[str, Tensor]:
        """Return the losses of every neural quantizer, and the distance of the residuals to what short-lists them."""
        losses = super()._losses(x, z, codes, steps)
        weight = self._config.distortion_weight
        if weight and len(self.shortlists):
            before = torch.stack([self._begin(codes), *steps[:-1]]).detach()  # (M, N, D)
            chosen = select(self.shortlists, self._conditioned(codes.T).T).transpose(0, 1)
            error = (self._conditioned(before) + chosen - z).square().mean((1, 2)).sum()
            losses["preselection"] = weight * error
        return losses

    @torch.no_grad()
    def restart_dead_codes(
        self, x: Float[Tensor, "N D"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """Restart unused codewords, each in both of its codebooks."""
        restarted = super().restart_dead_codes(x, generator)
        if restarted:
            dead = self._conditioned(restarted[self.codebooks])
            words = self._conditioned(self.codebooks)
            self.shortlists.copy_(torch.where(dead[:, :, None], words, self.shortlists))
            restarted[self.shortlists] = dead
        return restarted

    def _conditioned(self, steps: Tensor) -> Tensor:
        """Return the rows of the steps that have a network."""
        return steps[len(steps) - len(self.shortlists) :]

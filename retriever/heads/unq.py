"""UNQ: a quantizer in a learned space (Morozov and Babenko, ICCV 2019), by Gumbel-softmax.

An encoder maps a vector to M learned spaces, where codewords are chosen by inner product; a decoder maps the sum of
the chosen codewords back. Written from the paper's equations.

Shapes: N vectors, D dimensions, M codebooks, K = 2**bits codewords of C dimensions, H hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from retriever.errors import InputError
from retriever.heads.base import CompressionHead, HeadConfig, HeadOutput, QuantizerFit
from retriever.heads.checks import check_choices, check_not_negative, check_sample_size, check_size
from retriever.heads.codebooks import Codebooks
from retriever.heads.exports import NeuralCodec
from retriever.scores import Metric
from retriever.transforms.batch_norm import BatchNorm, alone, calibrate, inference, perceptron

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["UNQ", "UNQConfig"]

START_ROWS = 8192  # vectors of the sample by which statistics, codewords and temperatures start
START_CLIP = 10.0  # norm to which gradients of the start are clipped, as published
NEGATIVE_RANKS = (100, 200)  # among a vector's neighbours, as published
BISECTIONS = 60  # halve the interval of a log-temperature to nothing


@dataclass(frozen=True, kw_only=True)
class UNQConfig(HeadConfig):
    """Size and training of a `UNQ`.

    Attributes:
        num_codebooks: M; bytes of a document when codebook_bits is 8.
        codebook_bits: log2 of the codewords in a codebook.
        code_dim: C, dimensions of a learned space.
        hidden: H, hidden units of encoder and decoder.
        num_layers: Hidden layers of either.
        metric: Score of a query with a compressed document; "l2" is 1 - ||q - x||^2 / 2 and needs unit vectors.
        distortion_weight: Weight of the squared error of standardized vectors, mean over documents. It moves encoder,
            codewords and decoder, not the towers.
        triplet_weight: Weight of the triplet loss, of a vector's logits at the codes of near and of far vectors of the
            batch; the paper has 0.01 at 8 bytes and 0.001 at 16.
        triplet_margin: Its margin.
        balance_weight: Weight, at the start, of the squared coefficient of variation of the codewords' mean
            probabilities; it falls linearly.
        balance_floor: The weight at which it stays.
        balance_steps: Training batches in which it would reach 0.
        commitment_weight: Weight of mean ||x - sg(T(x))||^2, which moves the towers.
        task_gradient: Let the retrieval loss reach the networks and codewords too, through the decoded vectors
            (Endex's extension); otherwise it reaches the vectors alone.
        start_entropy: Mean entropy, in nats for 8 bits and in proportion to the bits, that temperatures start with.
        start_steps: Steps by the losses above on the sample, before the head takes part: networks start at random.
        start_batch: Vectors of such a step.
        start_lr: Adam's learning rate there.
        restart_window: Training documents a codeword, on average, after which unused codewords are restarted.
    """

    name: ClassVar[str] = "unq"

    num_codebooks: int = 8
    codebook_bits: int = 8
    code_dim: int = 256
    hidden: int = 1024
    num_layers: int = 2
    metric: Metric = "l2"
    distortion_weight: float = 1.0
    triplet_weight: float = 0.0
    triplet_margin: float = 0.1
    balance_weight: float = 1.0
    balance_floor: float = 0.05
    balance_steps: int = 100_000
    commitment_weight: float = 0.0
    task_gradient: bool = False
    start_entropy: float = 3.0
    start_steps: int = 1000
    start_batch: int = 256
    start_lr: float = 1e-3
    restart_window: float = 20.0

    def __post_init__(self) -> None:
        check_size(self.num_codebooks, self.codebook_bits)
        check_choices(self, {"metric": Metric})
        weights = ("distortion_weight", "triplet_weight", "triplet_margin", "balance_weight", "balance_floor")
        check_not_negative(self, (*weights, "commitment_weight", "restart_window", "start_steps"))
        for name in ("code_dim", "hidden", "num_layers", "balance_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.start_batch < 2:
            raise InputError(f"start_batch must be at least 2, to normalize over, got {self.start_batch}.")
        if not 0 < self.start_lr < float("inf"):
            raise InputError(f"start_lr must be positive, got {self.start_lr}.")
        if not 0 < self.start_entropy < 5.5:
            raise InputError(
                f"start_entropy must be above 0 and below 5.5, nearly log 256, got {self.start_entropy}."
            )
        if not self.distortion_weight and not self.task_gradient:
            raise InputError(
                "distortion_weight 0 leaves nothing that trains the decoder. Set it to 1, or task_gradient true."
            )

    def check(self, dim: int) -> None:
        """Do nothing: the encoder takes any dimension."""

    def check_sample(self, documents: int) -> None:
        """Raise InputError if the warm start would have fewer documents than a codebook has codewords."""
        check_sample_size(documents, self.codebook_bits)

    def build(self, dim: int) -> UNQ:
        """Return the head for vectors of `dim` dimensions."""
        return UNQ(self, dim)


class UNQ(CompressionHead):
    """Codewords chosen in learned spaces; their sum, decoded by a network, is the reconstruction.

    T(x) = decoder(sum_m c_m) with c_m the codeword of the largest <e_m(x), c> / tau_m. Vectors are standardized first.

    Args:
        config: Sizes, weights, start.
        dim: Dimension D of the vectors.
    """

    offset: Tensor
    scale: Tensor
    batches: Tensor

    def __init__(self, config: UNQConfig, dim: int) -> None:
        config.check(dim)
        super().__init__(
            dim=dim, num_codes=config.num_codebooks, code_bits=config.codebook_bits, metric=config.metric
        )
        self._config = config
        books, width = config.num_codebooks, config.code_dim
        self.encoder = perceptron(dim, config.hidden, config.num_layers, books * width)
        self.decoder = nn.Sequential(
            BatchNorm(width), perceptron(width, config.hidden, config.num_layers, dim)
        )
        self.books = Codebooks(
            books, 2**config.codebook_bits, width, estimator="softmax", selection="inner_product"
        )
        self.log_temperature = nn.Parameter(torch.zeros(books))
        self.register_buffer("offset", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def config(self) -> UNQConfig:
        """The configuration that built this head."""
        return self._config

    @property
    def balance_weight(self) -> float:
        """Weight of the balance now: it falls with the batches trained on."""
        config = self._config
        left = 1 - int(self.batches) / config.balance_steps
        return max(min(config.balance_floor, config.balance_weight), config.balance_weight * left)

    def forward(self, x: Float[Tensor, "N D"]) -> HeadOutput:
        """Quantize, in training with Gumbel noise and the statistics of the batch, in float32 whatever the autocast.

        The retrieval loss's gradient reaches the vectors unchanged, and with `task_gradient` also the networks. The
        codes are those without noise.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            z = (x.detach() - self.offset) / self.scale
            logits, chosen = self._choose(z, None)
            decoded_z = self.decoder(chosen.sum(1))
            decoded = decoded_z * self.scale + self.offset
            losses = self._losses(z, decoded_z, logits, None)
            if self._config.commitment_weight:
                error = (x - decoded.detach()).square().sum(1).mean()
                losses["commitment"] = self._config.commitment_weight * error
            if self._config.task_gradient:
                reconstruction = decoded + (x - x.detach())
            else:
                reconstruction = x + (decoded - x).detach()
        if self.training:
            self.batches += 1
        return HeadOutput(reconstruction=reconstruction, codes=logits.detach().argmax(-1), losses=losses)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N M"]:
        """Return the codes of the largest logits."""
        with torch.autocast(x.device.type, enabled=False), inference(self.encoder):
            return self.books.encode(self._embed((x.float() - self.offset) / self.scale))

    def decode(self, codes: Int[Tensor, "N M"]) -> Float[Tensor, "N D"]:
        """Return the vectors that the decoder makes of the sums of codewords."""
        with torch.autocast(codes.device.type, enabled=False), inference(self.decoder):
            return cast(Tensor, self.decoder(self.books.select(codes).sum(1))) * self.scale + self.offset

    def export(self) -> NeuralCodec:
        """Return the sizes: the networks stay with the head."""
        return NeuralCodec(
            dim=self.dim, num_codes=self.num_codes, code_bits=self.code_bits, metric=self.metric
        )

    @torch.no_grad()
    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Start from live vectors: standardization, codewords, temperatures, then `start_steps` of training.

        Raises:
            InputError: If the sample has fewer vectors than a codebook has codewords.
        """
        self._config.check_sample(len(sample))
        generator = torch.Generator().manual_seed(seed)
        sample = sample.float().to(self.offset.device)
        self.offset.copy_(sample.mean(0))
        self.scale.copy_((sample - self.offset).square().mean().sqrt().clamp(min=1e-12))
        z = (sample - self.offset) / self.scale
        rows = torch.randperm(len(z), generator=generator)[:START_ROWS].to(z.device)
        calibrate(self.encoder, z[rows])
        with inference(self.encoder):
            self._start_codebooks(self._split(self.encoder(z[rows])), generator)
        with inference(self.encoder):
            calibrate(self.decoder, self.books.select(self.books.encode(self._embed(z[rows]))).sum(1))
        self.batches.zero_()
        self._train(z, generator)
        self.books.usage.zero_()

    def count(self, codes: Int[Tensor, "N M"]) -> None:
        """Add codes to the usage counts of the current window."""
        self.books.count(codes)

    def usage_statistics(self) -> dict[str, float]:
        """Return perplexity and the share of codewords unused in the window; empty while it is short."""
        return self.books.usage_statistics()

    @torch.no_grad()
    def restart_dead_codes(
        self, x: Float[Tensor, "N D"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "M K"]]:
        """Once the window is full, put an encoded vector in the place of every codeword it did not use."""
        window = self._config.restart_window
        if not self.books.has_dead_codes(window):
            return {}
        with inference(self.encoder):
            encoded = self._split(self.encoder((x.float() - self.offset) / self.scale))
        return self.books.restart_dead_codes(encoded, window, generator)

    def _split(self, encoded: Float[Tensor, "N MC"]) -> Float[Tensor, "N M C"]:
        return encoded.view(len(encoded), self.num_codes, -1)

    def _embed(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N M C"]:
        """Return e_m / tau_m, whose inner products with codewords are the logits."""
        return self._split(self.encoder(z)) * (-self.log_temperature).exp()[:, None]

    def _choose(
        self, z: Float[Tensor, "N D"], generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "N M K"], Float[Tensor, "N M C"]]:
        """Return the logits, and the chosen codewords with the gradient of the (Gumbel-)softmax."""
        embedded = self._embed(z)
        logits = self.books.selection(embedded, self.books.codewords)
        scores = logits
        if (
            self.training
        ):  # -log of an exponential variable is a Gumbel variable (Jang et al., arXiv:1611.01144)
            noise = torch.empty(logits.shape, device="cpu" if generator else logits.device)
            scores = logits - noise.exponential_(generator=generator).log().to(logits.device)
        chosen = self.books.estimate(embedded, scores.detach().argmax(-1), scores)
        return logits, chosen.codewords

    def _losses(
        self,
        z: Float[Tensor, "N D"],
        decoded: Float[Tensor, "N D"],
        logits: Float[Tensor, "N M K"],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Return distortion, balance and triplet loss, as far as their weight is not 0."""
        config, losses = self._config, {}
        if config.distortion_weight:
            losses["distortion"] = config.distortion_weight * (decoded - z).square().sum(1).mean()
        if config.balance_weight:
            losses["balance"] = self.balance_weight * squared_variation(logits)
        if config.triplet_weight and len(z) > 2:
            ranks = torch.randint(*NEGATIVE_RANKS, (len(z),), generator=generator).to(z.device)
            losses["triplet"] = config.triplet_weight * triplet_loss(z, logits, ranks, config.triplet_margin)
        return losses

    def _start_codebooks(self, encoded: Float[Tensor, "n M C"], generator: torch.Generator) -> None:
        """Take encoded vectors as codewords, and temperatures that give the logits their starting entropy."""
        size = 2**self.code_bits
        rows = torch.stack(
            [torch.randperm(len(encoded), generator=generator)[:size] for _ in range(self.num_codes)]
        ).to(encoded.device)  # (M, K)
        self.books.start(encoded.transpose(0, 1).gather(1, rows[:, :, None].expand(-1, -1, encoded.shape[2])))
        products = self.books.selection(encoded[:1024], self.books.codewords)
        wanted = self._config.start_entropy * self.code_bits / 8
        low, high = (torch.full_like(self.log_temperature, bound) for bound in (-20.0, 20.0))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            log_p = (products / middle.exp()[:, None]).log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1).mean(0)  # (M,), rises with the temperature
            rise = entropy < wanted
            low, high = torch.where(rise, middle, low), torch.where(rise, high, middle)
        self.log_temperature.copy_((low + high) / 2)

    @torch.enable_grad()
    def _train(self, z: Float[Tensor, "n D"], generator: torch.Generator) -> None:
        """Train on standardized vectors, in this process alone."""
        config, training = self._config, self.training
        parameters = list(self.parameters())
        optimizer = torch.optim.Adam(parameters, lr=config.start_lr)
        self.train()
        with alone(self):
            for _ in range(config.start_steps):
                rows = torch.randint(len(z), (config.start_batch,), generator=generator).to(z.device)
                logits, chosen = self._choose(z[rows], generator)
                losses = self._losses(z[rows], self.decoder(chosen.sum(1)), logits, generator)
                optimizer.zero_grad()
                torch.stack(list(losses.values())).sum().backward()
                nn.utils.clip_grad_norm_(parameters, START_CLIP)
                optimizer.step()
                self.batches += 1
        optimizer.zero_grad()
        self.train(training)


def squared_variation(logits: Float[Tensor, "N M K"]) -> Float[Tensor, ""]:
    """Return the squared coefficient of variation of the mean probabilities of codewords, mean over codebooks.

    0 where all are used alike, K - 1 where one is (CV^2 of the importance, Shazeer et al., arXiv:1701.06538).
    """
    share = logits.softmax(-1).mean(0)  # (M, K), its mean is 1 / K
    return (share.var(1, correction=0) * share.shape[1] ** 2).mean()


def triplet_loss(
    z: Float[Tensor, "N D"], logits: Float[Tensor, "N M K"], ranks: Int[Tensor, " N"], margin: float
) -> Float[Tensor, ""]:
    """Return mean max(0, margin + d(x, y+) - d(x, y-)), d the sum over m of -logit[m, code of y].

    y+ is the nearest other vector of the batch, y- the neighbour of rank `ranks`, or the farthest one if there are not
    so many. The paper has them of the whole data set, found anew every 8 epochs.
    """
    order = (
        torch.cdist(z, z).fill_diagonal_(-1).argsort(1)[:, 1:]
    )  # (N, N - 1), nearest first, without itself
    farther = order.gather(1, ranks.clamp(max=order.shape[1] - 1)[:, None]).squeeze(1)
    codes = logits.detach().argmax(-1)
    near, far = (
        -logits.gather(2, codes[rows][:, :, None]).squeeze(2).sum(1) for rows in (order[:, 0], farther)
    )
    return (margin + near - far).relu().mean()

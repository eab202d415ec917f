"""INRP, the inhomogeneous neighborhood relationship preserving loss of CCST (arXiv:2107.14415), beside a task's loss.

Shapes: n documents of this device, N documents that are scored (`optimization.cross_device`), D dimensions before and E
after the head's network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from retriever.errors import InputError
from retriever.heads import HeadConfig
from training.losses.base import DocumentPairs, LossConfig, RetrievalLoss, ScoredBatch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["INRP", "WEIGHTS", "INRPConfig", "distances", "inrp"]

WeightName = Literal["log1", "log2", "step", "li1", "li2", "li3", "none"]
PAIRS = 1_000_000  # random pairs of the sample that mu and sigma are measured from
PIECE = 16_384  # of them measured at once
LEAST = 1e-6  # of D / mu, so that its logarithm is finite


@dataclass(frozen=True, kw_only=True)
class INRPConfig(LossConfig):
    """Settings of `INRP`.

    Attributes:
        weight: How much a pair counts by its distance D, of which mu is the mean and sigma the deviation over random
            pairs: "log1" clip(-ln(D / mu), 0.01, 2), the published choice; "log2" the same with floor 0; "step" 0.9
            up to mu, 0.1 beyond; "li1" max(0, 1 - D / (mu - 3 sigma)); "li2" max(0, 1 - D / mu); "li3" the same with
            scaled targets; "none" 1.
        scale_sqrt_c: Divide target distances by sqrt(D / E), as "li3" always does.
        inrp_weight: Weight of this loss beside the task's.
        task: A retrieval loss to add (MCL + INRP); by default none: the network learns from vectors alone.
    """

    name: ClassVar[str] = "inrp"

    weight: WeightName = "log1"
    scale_sqrt_c: bool = False
    inrp_weight: float = 1.0
    task: LossConfig | None = None

    def __post_init__(self) -> None:
        if self.weight not in get_args(WeightName):
            raise InputError(f"weight must be one of {', '.join(get_args(WeightName))}, got {self.weight!r}.")
        if not 0 < self.inrp_weight < float("inf"):
            raise InputError(f"inrp_weight must be positive, got {self.inrp_weight}.")
        if isinstance(self.task, INRPConfig):
            raise InputError("task must be another loss than inrp. Set inrp_weight instead.")

    @property
    def needs_teacher(self) -> bool:
        """Whether the task does."""
        return self.task is not None and self.task.needs_teacher

    @property
    def needs_head(self) -> bool:
        """Whether there is no task to learn before the head's start."""
        return self.task is None or self.task.needs_head

    def check(self, head: HeadConfig) -> None:
        """Raise InputError if the head has no network between two spaces."""
        if not head.maps:
            raise InputError(
                f"the loss inrp compares distances before and after a network, which the head {head.name!r} has not. "
                "Use the head cnt."
            )
        if self.task is not None:
            self.task.check(head)

    def build(self) -> INRP:
        """Return the loss."""
        return INRP(self)


class INRP(RetrievalLoss):
    """mean over pairs of w(D) |D - D'|: distances D of tower vectors, D' of the network's output, near pairs first.

    No pair is of a document with itself. Targets carry no gradient; through D' it reaches the network, and the towers
    where they train. mu and sigma are measured at the head's start.
    """

    mu: Tensor
    sigma: Tensor

    def __init__(self, config: INRPConfig) -> None:
        super().__init__()
        self.config = config
        self.task = None if config.task is None else config.task.build()
        self.register_buffer("mu", torch.ones(()))
        self.register_buffer("sigma", torch.zeros(()))

    def by_queries(self, *, lists: bool) -> bool:
        """Whether there is a task that allows it; pairs of documents are looked at with every block."""
        return self.task is not None and self.task.by_queries(lists=lists)

    @torch.no_grad()
    def start(self, sample: Float[Tensor, "n D"], seed: int) -> None:
        """Measure mean and deviation of the distance of random pairs."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(len(sample), (PAIRS,), generator=generator)
        step = torch.randint(1, max(2, len(sample)), (PAIRS,), generator=generator)  # to another vector
        pairs = torch.stack([first, (first + step) % len(sample)]).to(sample.device)
        distances = torch.cat(
            [
                (sample[a] - sample[b]).norm(dim=1)
                for a, b in (part.unbind() for part in pairs.split(PIECE, 1))
            ]
        )
        if not distances.mean() > 0:
            raise InputError("all vectors of the warm start are equal: INRP has no distance to keep.")
        if self.config.weight == "li1" and not distances.mean() > 3 * distances.std():
            raise InputError(
                f"weight li1 needs distances whose mean is above 3 deviations, got {distances.mean():.3g} and "
                f"{distances.std():.3g}. Set weight li2."
            )
        self.mu.copy_(distances.mean())
        self.sigma.copy_(distances.std())
        if self.task is not None:
            self.task.start(sample, seed)

    def forward(self, batch: ScoredBatch) -> dict[str, Tensor]:
        """Return the task's parts and, once the head has started, the part inrp."""
        parts = {} if self.task is None else self.task(batch)
        if batch.pairs is not None:
            parts["inrp"] = self.config.inrp_weight * self._preserve(batch.pairs)
        return parts

    def _preserve(self, pairs: DocumentPairs) -> Tensor:
        config = self.config
        before = distances(pairs.documents.detach(), pairs.other_documents.detach())
        after = distances(pairs.mapped, pairs.other_mapped)
        weights = WEIGHTS[config.weight](before, self.mu, self.sigma)
        if config.scale_sqrt_c or config.weight == "li3":
            before = before / (pairs.documents.shape[1] / pairs.mapped.shape[1]) ** 0.5
        return inrp(before, after, pairs.same, weights)


def distances(x: Float[Tensor, "n D"], y: Float[Tensor, "N D"]) -> Float[Tensor, "n N"]:
    """Return Euclidean distances in float32; the gradient of a distance 0 is 0."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.cdist(x.float(), y.float())


def inrp(
    before: Float[Tensor, "n N"],
    after: Float[Tensor, "n N"],
    same: Bool[Tensor, "n N"],
    weights: Float[Tensor, "n N"],
) -> Tensor:
    """Return the mean of w |D - D'| over all pairs; those of a document with itself count as 0, as published."""
    return (weights * (before - after).abs()).masked_fill(same, 0).mean()


def log1(distance: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """clip(-ln(D / mu), 0.01, 2): 2 up to 0.135 mu, 0.01 from 0.99 mu."""
    return -(distance / mu).clamp(min=LEAST).log().clamp(-2.0, -0.01)


def log2(distance: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """clip(-ln(D / mu), 0, 2)."""
    return -(distance / mu).clamp(min=LEAST).log().clamp(-2.0, 0.0)


def step(distance: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """0.9 up to mu, 0.1 beyond."""
    return torch.where(distance <= mu, 0.9, 0.1)


def li1(distance: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """max(0, 1 - D / (mu - 3 sigma))."""
    return (1 - distance / (mu - 3 * sigma)).clamp(min=0)


def li2(distance: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """max(0, 1 - D / mu)."""
    return (1 - distance / mu).clamp(min=0)


def none(distance: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """1."""
    return torch.ones_like(distance)


Weight = Callable[[Tensor, Tensor, Tensor], Tensor]
WEIGHTS: dict[str, Weight] = {
    "log1": log1,
    "log2": log2,
    "step": step,
    "li1": li1,
    "li2": li2,
    "li3": li2,  # its targets are scaled
    "none": none,
}
assert tuple(WEIGHTS) == get_args(WeightName), "the type names what the registry holds"

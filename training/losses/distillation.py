"""Distillation of the dense ranking into the compressed one, Distill-VQ (Xiao et al., SIGIR 2022, arXiv:2204.00185).

Shapes: B queries, N documents. An objective takes the scores of teacher and student, (B, N), the documents that are
left out, (B, N), and the column of each query's positive, (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from retriever.distributed import world_size
from retriever.errors import InputError
from training.losses.base import LossConfig, RetrievalLoss, ScoredBatch, check_temperature
from training.losses.contrastive import cross_entropy

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["OBJECTIVES", "Distillation", "DistillationConfig"]

ObjectiveName = Literal["listnet", "kl", "margin_mse", "ranknet", "mse"]
RANKNET_DEPTH = (
    200  # the teacher's best candidates whose pairs RankNet compares; all N^2 would not fit in memory
)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(LossConfig):
    """Settings of `Distillation`.

    Attributes:
        objective: How student and teacher are compared: "listnet" (the paper's choice), "kl", "margin_mse",
            "ranknet" or "mse".
        teacher: "frozen" are the towers as they were at the head's start (Distill-VQ); "live" the uncompressed scores
            of the towers in training, which costs nothing; "given" the scores in negatives.jsonl, by a model of any
            kind: only a query's positive and its given negatives are then compared.
        temperature: Divides the scores of teacher and student; 1 as published, for unnormalized vectors.
        compressed_weight: Weight of the term on the scores that the index gives (w_pq).
        list_weight: Weight of the term on the scores of the inverted lists' centroids (w_ivf), for a head with lists.
            By default the ratio of both terms in the first batch, as published.
        dense_weight: Weight of the term on the student's own uncompressed scores (w_enc); for a frozen teacher.
        label_weight: Weight of a cross-entropy of the compressed scores with the labelled positive, our addition.
    """

    name: ClassVar[str] = "distillation"

    objective: ObjectiveName = "listnet"
    teacher: Literal["frozen", "live", "given"] = "frozen"
    temperature: float = 0.05
    compressed_weight: float = 1.0
    list_weight: float | None = None
    dense_weight: float = 0.0
    label_weight: float = 0.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        if self.teacher not in ("frozen", "live", "given"):
            raise InputError(f"teacher must be frozen, live or given, got {self.teacher!r}.")
        for name in ("compressed_weight", "list_weight", "dense_weight", "label_weight"):
            if not 0 <= (getattr(self, name) or 0.0) < float("inf"):
                raise InputError(f"{name} must be zero or more, got {getattr(self, name)}.")
        if self.dense_weight and self.teacher == "live":
            raise InputError(
                "dense_weight needs a frozen teacher: a live one is the student's own dense score."
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether a frozen copy of the towers must be kept."""
        return self.teacher == "frozen"

    @property
    def needs_head(self) -> bool:
        """Whether there is nothing to learn from before the head's start: neither labels nor given scores."""
        return not self.label_weight and self.teacher != "given"

    @property
    def needs_scores(self) -> bool:
        """Whether negatives must come with scores."""
        return self.teacher == "given"

    def build(self) -> Distillation:
        """Return the loss."""
        return Distillation(self)


class Distillation(RetrievalLoss):
    """The teacher's uncompressed ranking of the candidates is the target of the compressed scores; no labels needed.

    L = compressed_weight l(T, q . x_hat) + list_weight l(T, q . centroid) + dense_weight l(T, q . x) + labels

    Before the head's start the compressed scores are the dense ones, and the frozen teacher gives their target.
    """

    list_weight: Tensor

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__()
        self.config = config
        given = float("nan") if config.list_weight is None else config.list_weight
        self.register_buffer("list_weight", torch.tensor(given))

    def by_queries(self, *, lists: bool) -> bool:
        """Return whether a block will do: not for the batch that fixes the weight of the lists."""
        return not (lists and bool(self.list_weight.isnan()))

    def forward(self, batch: ScoredBatch) -> dict[str, Tensor]:
        """Return the parts compressed, lists, dense and labels, as far as their weight is not 0."""
        config = self.config
        teacher = (batch.dense if config.teacher == "live" else batch.teacher).detach()  # type: ignore[union-attr]

        left_out = batch.repeated
        if (
            config.teacher == "given"
        ):  # a query's own documents differ, though other queries may have brought them
            left_out, teacher = teacher.isnan(), teacher.nan_to_num()

        def compare(scores: Tensor) -> Tensor:
            return OBJECTIVES[config.objective](
                teacher / config.temperature, scores / config.temperature, left_out, batch.labels
            )

        parts = {}
        compressed = compare(batch.compressed)
        if config.compressed_weight:
            parts["compressed"] = config.compressed_weight * compressed
        if batch.coarse is not None and config.list_weight != 0:
            lists = compare(batch.coarse)
            parts["lists"] = self._list_weight(compressed, lists) * lists
        if config.dense_weight:
            parts["dense"] = config.dense_weight * compare(batch.dense)
        if config.label_weight:
            hard = cross_entropy(batch.compressed, batch.labels, batch.ignore, config.temperature)
            parts["labels"] = config.label_weight * hard
        return parts

    def _list_weight(self, compressed: Tensor, lists: Tensor) -> Tensor:
        """Return w_ivf; if it is not given, fix it by the first batch in which both terms are positive."""
        if self.list_weight.isnan():
            ratio = _mean(compressed) / _mean(lists)
            if not (bool(ratio.isfinite()) and ratio > 0):
                return torch.ones_like(ratio)
            self.list_weight.copy_(ratio)
        return self.list_weight


def _mean(value: Tensor) -> Tensor:
    """Return the mean of a number over the devices."""
    value = value.detach().clone()
    if world_size() > 1:
        torch.distributed.all_reduce(value)
    return value / world_size()


def _softmax(
    scores: Float[Tensor, "B N"], left_out: Bool[Tensor, "B N"]
) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N"]]:
    """Return probabilities and their logarithms, both 0 where a document is left out."""
    logarithm = scores.masked_fill(left_out, float("-inf")).log_softmax(1)
    return logarithm.exp(), logarithm.masked_fill(left_out, 0)


def listnet(teacher: Tensor, student: Tensor, left_out: Tensor, labels: Tensor) -> Tensor:
    """-sum softmax(T) log softmax(S): cross-entropy of the top-one probabilities (Cao et al., 2007)."""
    return -(_softmax(teacher, left_out)[0] * _softmax(student, left_out)[1]).sum(1).mean()


def kl(teacher: Tensor, student: Tensor, left_out: Tensor, labels: Tensor) -> Tensor:
    """KL(softmax(T) || softmax(S)): ListNet less the teacher's entropy, so 0 at its minimum; equal gradients."""
    p, log_p = _softmax(teacher, left_out)
    return (p * (log_p - _softmax(student, left_out)[1])).sum(1).mean()


def mse(teacher: Tensor, student: Tensor, left_out: Tensor, labels: Tensor) -> Tensor:
    """Mean of (S - T)^2 over a query's candidates."""
    return _mean_kept((student - teacher).square(), left_out)


def margin_mse(teacher: Tensor, student: Tensor, left_out: Tensor, labels: Tensor) -> Tensor:
    """Mean of ((S+ - S-) - (T+ - T-))^2 over a query's candidates but the positive (Hofstaetter et al., 2020)."""
    error = student - teacher
    margins = error.gather(1, labels[:, None]) - error
    return _mean_kept(margins.square(), left_out.scatter(1, labels[:, None], True))


def ranknet(teacher: Tensor, student: Tensor, left_out: Tensor, labels: Tensor) -> Tensor:
    """Mean of log(1 + exp(S_j - S_i)) over a query's pairs with T_i > T_j, of the teacher's best (Burges, 2005)."""
    best = (
        teacher.masked_fill(left_out, float("-inf")).topk(min(RANKNET_DEPTH, teacher.shape[1]), dim=1).indices
    )
    kept = ~left_out.gather(1, best)
    teacher, student = teacher.gather(1, best), student.gather(1, best)
    above = (teacher[:, :, None] > teacher[:, None, :]) & kept[:, :, None] & kept[:, None, :]
    terms = F.softplus(student[:, None, :] - student[:, :, None])  # [b, i, j]: S_j - S_i
    return _mean_kept(terms.flatten(1), ~above.flatten(1))


def _mean_kept(terms: Float[Tensor, "B n"], left_out: Bool[Tensor, "B n"]) -> Tensor:
    """Return the mean over queries of each one's mean over the terms that are not left out."""
    return (terms.masked_fill(left_out, 0).sum(1) / (~left_out).sum(1).clamp(min=1)).mean()


Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
OBJECTIVES: dict[str, Objective] = {
    "listnet": listnet,
    "kl": kl,
    "margin_mse": margin_mse,
    "ranknet": ranknet,
    "mse": mse,
}
assert tuple(OBJECTIVES) == get_args(ObjectiveName), "the type names what the registry holds"

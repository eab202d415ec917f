"""Codebooks: the trainable part that product quantizers share; a coarse quantizer is one codebook of whole vectors.

Shapes: N vectors, M codebooks, K codewords, S sub-dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from retriever.heads.balance import balanced_codes
from retriever.heads.estimators import ESTIMATORS, Estimate, EstimatorName, select
from retriever.heads.pieces import at_once
from retriever.heads.selection import SELECTIONS, SelectionName

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["AssignmentName", "Balance", "Codebooks", "add_use", "use_is_full", "use_statistics"]

AssignmentName = Literal["live", "frozen", "frozen_in_training"]
"""By which codewords codes are chosen: the current ones, or a copy of the starting ones, always or until training
ends."""

ROWS_AT_ONCE = 1024  # the (rows, M, K) table of scores of so many vectors stays in the caches of a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Settings of a Sinkhorn-balanced assignment in training."""

    epsilon: float
    iterations: int


class Codebooks(nn.Module):
    """M codebooks of K codewords, how codewords are chosen, and what a gradient reaches.

    Args:
        num_codebooks: M.
        codewords: K.
        width: S.
        estimator: Gradient estimator of the choice.
        selection: Selection function of the choice.
        temperature: Divides the selection scores in the estimator.
        assignment: Choose by the current codewords, or by a copy of the starting ones, so that codes do not move when
            codewords do.
        balance: Balance the choice in training; None chooses freely.
    """

    usage: Tensor
    anchors: Tensor

    def __init__(
        self,
        num_codebooks: int,
        codewords: int,
        width: int,
        *,
        estimator: EstimatorName,
        selection: SelectionName = "l2",
        temperature: float = 1.0,
        assignment: AssignmentName = "live",
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        shape = (num_codebooks, codewords, width)
        self.codewords = nn.Parameter(torch.empty(shape).uniform_(-1, 1))  # MoPQ's start
        self.selection = SELECTIONS[selection](*shape)
        self.selection.start(self.codewords)
        self.register_buffer("usage", torch.zeros(shape[:2], dtype=torch.int64))
        self.assignment = assignment
        if assignment != "live":
            self.register_buffer("anchors", self.codewords.detach().clone())
        self.balance = balance
        self._estimator = ESTIMATORS[estimator]
        self._needs_scores = estimator == "softmax"
        self._temperature = temperature

    @torch.no_grad()
    def start(self, codewords: Float[Tensor, "M K S"]) -> None:
        """Set the codewords, what depends on them, and an empty window of use."""
        self.codewords.copy_(codewords)
        self.selection.start(self.codewords)
        if self.assignment != "live":
            self.anchors.copy_(self.codewords)
        self.usage.zero_()

    def forward(
        self, z: Float[Tensor, "N M S"], start_z: Float[Tensor, "N M S"] | None = None
    ) -> tuple[Estimate, Int[Tensor, "N M"]]:
        """Return the chosen codewords with the estimator's gradient path, and the codes.

        Args:
            z: Sub-vectors.
            start_z: What they would be had nothing before these codebooks trained; a frozen assignment looks at
                these. By default `z`.
        """
        balance = self.balance if self.training and self.assignment == "live" else None
        scores = self.selection(z, self.codewords) if balance or self._needs_scores else None
        if balance and scores is not None:
            codes = balanced_codes(-scores, epsilon=balance.epsilon, iterations=balance.iterations)
        else:
            codes = self._choose(z, start_z, frozen=self.assignment != "live")
        return self.estimate(z, codes, scores), codes

    def estimate(
        self,
        z: Float[Tensor, "N M S"],
        codes: Int[Tensor, "N M"],
        scores: Float[Tensor, "N M K"] | None = None,
    ) -> Estimate:
        """Return the codewords of given codes with the estimator's gradient path.

        Args:
            z: Sub-vectors.
            codes: Chosen codewords.
            scores: Selection scores of `z`, if they are known.
        """
        if self._needs_scores:
            scores = (self.selection(z, self.codewords) if scores is None else scores) / self._temperature
        return self._estimator(z, self.codewords, scores, codes)

    @torch.no_grad()
    def encode(
        self, z: Float[Tensor, "N M S"], start_z: Float[Tensor, "N M S"] | None = None
    ) -> Int[Tensor, "N M"]:
        """Return the codes; see `forward`."""
        return self._choose(z, start_z, frozen=self.assignment == "frozen")

    @torch.no_grad()
    def _choose(
        self, z: Float[Tensor, "N M S"], start_z: Float[Tensor, "N M S"] | None, *, frozen: bool
    ) -> Int[Tensor, "N M"]:
        if frozen and start_z is not None:
            z = start_z
        codebooks = self.anchors if frozen else self.codewords
        parts = [self.selection.choose(rows, codebooks) for rows in z.split(at_once(ROWS_AT_ONCE, z.device))]
        return torch.cat(parts) if parts else z.new_empty(z.shape[:2], dtype=torch.int64)

    def select(self, codes: Int[Tensor, "N M"]) -> Float[Tensor, "N M S"]:
        """Return the codewords that codes name."""
        return select(self.codewords, codes)

    @torch.no_grad()
    def count(self, codes: Int[Tensor, "N M"]) -> None:
        """Add codes to the usage counts of the current window."""
        add_use(self.usage, codes)

    def usage_statistics(self) -> dict[str, float]:
        """Return perplexity (exp of the entropy of use, 1 to K) and the share of codewords unused in the window.

        Empty while the window holds fewer documents than a codebook has codewords.
        """
        return use_statistics(self.usage)

    def has_dead_codes(self, window: float) -> bool:
        """Return whether the window is full and has left codewords unused; a full one that has not begins anew."""
        if not use_is_full(self.usage, window):
            return False
        if bool((self.usage == 0).any()):
            return True
        self.usage.zero_()
        return False

    @torch.no_grad()
    def restart_dead_codes(
        self, z: Float[Tensor, "N M S"], window: float, generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "M K"]]:
        """Once the window is full, put a random sub-vector in the place of every codeword it did not use.

        Nothing where codes are not chosen by the codewords, as no new codeword would then be chosen either.

        Args:
            z: Sub-vectors to choose from.
            window: Documents a codeword, on average, that fill the window.
            generator: Chooses.
        """
        if self.assignment != "live" or not self.selection.by_codewords:
            return {}
        if not self.has_dead_codes(window):
            return {}
        z = z.transpose(0, 1)  # (M, N, S)
        dead = self.usage == 0
        rows = torch.randint(z.shape[1], dead.shape, generator=generator).to(z.device)  # (M, K)
        replacement = z.gather(1, rows.unsqueeze(-1).expand(-1, -1, z.shape[-1]))
        self.codewords.copy_(torch.where(dead.unsqueeze(-1), replacement, self.codewords))
        self.usage.zero_()
        return {self.codewords: dead}


def add_use(usage: Int[Tensor, "M K"], codes: Int[Tensor, "N M"]) -> None:
    """Add codes to counts of use, in place."""
    usage.scatter_add_(1, codes.T, torch.ones_like(codes.T))


def use_is_full(usage: Int[Tensor, "M K"], window: float) -> bool:
    """Return whether counts of use hold so many documents a codeword, on average."""
    return int(usage[0].sum()) >= window * usage.shape[1]


def use_statistics(usage: Int[Tensor, "M K"]) -> dict[str, float]:
    """Return perplexity and share of unused codewords; empty for fewer documents than codewords."""
    if not use_is_full(usage, 1):
        return {}
    share = usage.double() / usage.sum(1, keepdim=True).clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(1)  # (M,)
    dead = (usage == 0).double().mean()
    return {"perplexity": entropy.exp().mean().item(), "dead_codes": dead.item()}

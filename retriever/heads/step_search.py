"""The encoder of QINCo2: in every step a short list of candidates, extending the hypotheses of a beam.

What a network makes of a codeword depends on the vector through the reconstruction so far alone, and that through a
linear half (see `step_network`). So the codewords' halves are computed once a call, the vectors' once a vector, and
only what follows the first ReLU once a pair.

Shapes: N vectors, D dimensions, M steps, K codewords, E width and H hidden units of a network, B hypotheses of a beam,
A candidates of each, k hypotheses that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from retriever.heads.pieces import at_once
from retriever.heads.residual import gather_rows, squared_distances
from retriever.heads.step_network import StepNetwork

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["CandidateStep", "PlainStep", "SearchStep", "search_codes"]

PAIRS = 2048  # pairs of vector and codeword at once: their hidden units stay in the caches of a CPU


class Extended(NamedTuple):
    """The best hypotheses after a step: which one each extends, (N, k), by which code, and what that adds."""

    parents: Int[Tensor, "N k"]
    codes: Int[Tensor, "N k"]
    added: Float[Tensor, "N k D"]


class SearchStep(Protocol):
    """A step as the encoder sees it.

    Attributes:
        pairs: Pairs that a hypothesis of a vector makes.
    """

    pairs: int

    def extend(self, residual: Float[Tensor, "N B D"], sums: Float[Tensor, "N B D"], kept: int) -> Extended:
        """Return the `kept` best extensions of B hypotheses.

        Args:
            residual: What each hypothesis leaves of the vector.
            sums: The hypotheses.
            kept: k; fewer where there are fewer.
        """
        ...


class PlainStep:
    """Codewords that are added as they are.

    Args:
        codewords: Those of the step, (K, D).
    """

    pairs = 1  # a table of distances, and no hidden units

    def __init__(self, codewords: Float[Tensor, "K D"]) -> None:
        self.codewords = codewords

    def extend(self, residual: Float[Tensor, "N B D"], sums: Float[Tensor, "N B D"], kept: int) -> Extended:
        """Return the best extensions; see `SearchStep`."""
        distances = squared_distances(residual, self.codewords).flatten(1)
        best = distances.topk(min(kept, distances.shape[1]), largest=False).indices
        codes = best % len(self.codewords)
        return Extended(best // len(self.codewords), codes, self.codewords[codes])


class CandidateStep:
    """Codewords that a network adapts to the hypothesis.

    Args:
        codewords: Those of the step, (K, D).
        network: The step's network.
        shortlist: Codewords by whose distance to the residual candidates are chosen, (K, D).
        candidates: A; all codewords if there are no more.
    """

    def __init__(
        self,
        codewords: Float[Tensor, "K D"],
        network: StepNetwork,
        shortlist: Float[Tensor, "K D"],
        candidates: int,
    ) -> None:
        self.codewords = codewords
        self.network = network
        self.table = network.table(codewords)
        self.shortlist = shortlist
        self.pairs = min(candidates, len(codewords))

    def extend(self, residual: Float[Tensor, "N B D"], sums: Float[Tensor, "N B D"], kept: int) -> Extended:
        """Return the best extensions; see `SearchStep`."""
        near = squared_distances(residual, self.shortlist)
        candidates = near.topk(self.pairs, largest=False, sorted=False).indices  # (N, B, A)
        added = self._added(sums, candidates)
        distances = (residual[:, :, None] - added).square().sum(-1).flatten(1)  # (N, B A)
        best = distances.topk(min(kept, distances.shape[1]), largest=False).indices
        codes = candidates.flatten(1).gather(1, best)
        return Extended(best // self.pairs, codes, gather_rows(added.flatten(1, 2), best))

    def _added(
        self, sums: Float[Tensor, "N B D"], candidates: Int[Tensor, "N B A"]
    ) -> Float[Tensor, "N B A D"]:
        """Return f(c, sum) for the candidates c."""
        half = self.network.context_half(sums)  # (N, B, E)
        first, *others = self.network.residual_blocks
        hidden = self.table.hidden[candidates].add_(first.up(half)[:, :, None])  # (N, B, A, H)
        u = self.table.base[candidates].add_(half[:, :, None]).add_(first.down(hidden.relu_()))
        for block in others:
            u = u.add_(block.down(F.relu_(block.up(u))))
        return self.network.leave(self.codewords[candidates], u)


@torch.no_grad()
def search_codes(
    z: Float[Tensor, "N D"], start: Float[Tensor, "N D"], steps: Sequence[SearchStep], beam: int = 1
) -> Int[Tensor, "N M"]:
    """Return codes whose reconstruction comes near to `z`.

    Every step extends each of the B best reconstructions by its candidates and keeps the B nearest to `z`; the last
    keeps one. B = 1 is the greedy choice.

    Args:
        z: Vectors.
        start: Their reconstructions before the first step.
        steps: The steps in their order.
        beam: B; a step cannot keep more than there are.
    """
    rows = max(1, at_once(PAIRS, z.device) // (beam * max(step.pairs for step in steps)))
    parts = zip(z.split(rows), start.split(rows), strict=True)
    found = [_search_rows(part, begin, steps, beam) for part, begin in parts]
    return torch.cat(found) if found else z.new_empty(0, len(steps), dtype=torch.int64)


def _search_rows(
    z: Float[Tensor, "N D"], start: Float[Tensor, "N D"], steps: Sequence[SearchStep], beam: int
) -> Int[Tensor, "N M"]:
    sums = start[:, None]  # (N, B, D), from one hypothesis
    codes = torch.empty(len(z), 1, 0, dtype=torch.int64, device=z.device)
    for number, step in enumerate(steps):
        kept = 1 if number == len(steps) - 1 else beam
        best = step.extend(z[:, None] - sums, sums, kept)
        sums = gather_rows(sums, best.parents) + best.added
        codes = torch.cat([gather_rows(codes, best.parents), best.codes[:, :, None]], 2)
    return codes[:, 0]

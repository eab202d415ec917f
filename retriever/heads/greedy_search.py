"""The greedy encoder of a neural residual quantizer: the best of all codewords of every step, without most of the work.

The plain form evaluates f(c, context) for all N K pairs of vector and codeword, the concatenation and all. The codes
here are the same:

- Vectors whose codes are equal so far have one context, so their pairs are evaluated once. Behind the first step there
  are K contexts at most.
- The concatenation and the first U are linear: a part of the codeword, computed once a call, and a part of the context.
- Where it is less work, U_l V_j are multiplied once, and a block's hidden units are computed from those before it.
- Where that pays (D above L H / 4), the last V is applied to pairs only that can win. With u = known + sum_l V_l a_l,
  both r . u and the projection of u on a few directions Q cost a few numbers a hidden unit, and ||r - u||^2 >=
  ||r||^2 - 2 r . u + ||Q^T u||^2. A pair is out where that is above the distance of the most promising pair.

On a card the first and the last are left out: there calls cost more than such work.

Shapes: N vectors, D dimensions, K codewords, H hidden units, G contexts, R rows worked on at once, P = R K pairs,
Q directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retriever.heads.pieces import at_once, on_cpu
from retriever.heads.residual import squared_distances
from retriever.heads.step_network import StepNetwork

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["GreedyStep", "Memory", "greedy_codes"]

BLOCK = 16_384  # vectors that share contexts, to bound memory
PAIRS = 2048  # pairs at once: their hidden units stay in the caches of a CPU
DIRECTIONS = 15  # with r, a product of 16 columns
ROUNDING = 1e-5  # of the squared lengths; a bound nearer than that to the best distance decides nothing


@dataclass(frozen=True, slots=True)
class Pairs:
    """f(c, context) of R contexts and all codewords, but for the last products: known + sum_l hidden_l downs_l."""

    known: Float[Tensor, "P D"]
    hidden: list[Float[Tensor, "P H"]]
    downs: list[Float[Tensor, "H D"]]

    def rows(self, chosen: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        """Return chosen pairs whole."""
        u = self.known[chosen]
        for units, down in zip(self.hidden, self.downs, strict=True):
            u = u.addmm_(units[chosen], down)
        return u

    def whole(self) -> Float[Tensor, "P D"]:
        """Return all pairs whole, in the place of `known`."""
        for units, down in zip(self.hidden, self.downs, strict=True):
            self.known.addmm_(units, down)
        return self.known


class Memory:
    """Buffers that calls and steps share: fresh pages for every call would take as long as the work in them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return a tensor of a shape, of the type and device of another; it is valid until `name` is taken again."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = like.new_empty(size)
        return self._buffers[name][:size].view(shape)


class PairNetwork:
    """A step's network on all pairs of some contexts and all codewords.

    Args:
        codewords: Those of the step, (K, D).
        network: As wide as the vectors.
        memory: Where the pairs are.
    """

    def __init__(self, codewords: Float[Tensor, "K D"], network: StepNetwork, memory: Memory) -> None:
        assert network.project_out is None, "what is known of a pair has as many dimensions as the vectors"
        blocks = network.residual_blocks
        self.network = network
        self.base = network.table(codewords).base
        self.ups = [block.up.weight.T.contiguous() for block in blocks]  # (D, H)
        self.downs = [block.down.weight.T.contiguous() for block in blocks]  # (H, D)
        self.firsts = [self.base @ up for up in self.ups]  # (K, H)
        dim, hidden = self.ups[0].shape
        self.folded = len(blocks) * hidden < 4 * dim  # L (L - 1) / 2 H^2 < 2 (L - 1) D H
        self.products = [[down @ up for down in self.downs[:place]] for place, up in enumerate(self.ups)]
        self._memory = memory

    def __call__(self, contexts: Float[Tensor, "R D"]) -> Pairs:
        """Return the pairs, each context's together; valid until the next call."""
        count = len(contexts)
        half = self.network.context_half(contexts)
        known = self._memory.take("known", half, count, *self.base.shape)
        known = torch.add(self.base, half[:, None], out=known).flatten(0, 1)
        hidden: list[Tensor] = []
        for place, up in enumerate(self.ups):
            name = f"units {place if self.folded else place % 2}"
            units = self._memory.take(name, half, count, *self.firsts[place].shape)
            if place and not self.folded:
                known.addmm_(hidden.pop(), self.downs[place - 1])
                units = torch.mm(known, up, out=units.flatten(0, 1))
            else:
                units = torch.add(self.firsts[place], (half @ up)[:, None], out=units).flatten(0, 1)
                for before, product in zip(hidden, self.products[place], strict=True):
                    units.addmm_(before, product)
            hidden.append(units.relu_())
        return Pairs(known, hidden, self.downs[-len(hidden) :])


class GreedyStep:
    """A step as the greedy encoder sees it.

    Args:
        codewords: Those of the step, (K, D).
        network: The step's network, as wide as the vectors; None where codewords are added as they are.
        memory: Buffers, which steps may share.
    """

    def __init__(self, codewords: Float[Tensor, "K D"], network: StepNetwork | None, memory: Memory) -> None:
        self.codewords = codewords
        self.network = network
        self.pieces = at_once(PAIRS, codewords.device)
        self.rows = max(1, self.pieces // len(codewords))
        self.frugal = on_cpu(codewords.device)
        if network is None:
            return
        self.pairs = PairNetwork(codewords, network, memory)
        if not (self.frugal and self.pairs.folded):
            return
        self.directions = torch.linalg.svd(codewords, full_matrices=False).Vh[:DIRECTIONS].T  # (D, Q)
        leading = self.pairs.base @ self.directions
        self.rest = self.pairs.base.square().sum(1) - leading.square().sum(1)  # (K,)

    def added(self, codes: Int[Tensor, " G"], contexts: Float[Tensor, "G D"]) -> Float[Tensor, "G D"]:
        """Return what the step adds to each context by its code."""
        words = self.codewords[codes]
        if self.network is None:
            return words
        parts = zip(words.split(self.pieces), contexts.split(self.pieces), strict=True)
        return torch.cat([self.network(some, context) for some, context in parts])

    def choose(
        self, z: Float[Tensor, "N D"], contexts: Float[Tensor, "G D"], groups: Int[Tensor, " N"]
    ) -> Int[Tensor, " N"]:
        """Return the code of every vector.

        Args:
            z: Vectors.
            contexts: Reconstructions so far, those of all vectors.
            groups: Which one is a vector's.
        """
        residual = z - contexts[groups]
        if self.network is None:
            return squared_distances(residual[None], self.codewords)[0].argmin(1)
        if not self.frugal:
            parts = zip(residual.split(self.rows), contexts[groups].split(self.rows), strict=True)
            return torch.cat([self._choose_by_distances(some, context) for some, context in parts])
        codes = torch.empty_like(groups)
        order, sizes = groups.argsort(), groups.bincount(minlength=len(contexts))
        single = sizes[groups[order]] == 1
        # the bounds cost as much as the last products where those are small
        choose_alone = self._choose_by_bounds if self.pairs.folded else self._choose_by_distances
        for part in _parts(order[single], self.rows):
            codes[part] = choose_alone(residual[part], contexts[groups[part]])
        members = order[~single]
        for part in _parts((sizes > 1).nonzero()[:, 0], self.rows):
            several = sizes[part].tolist()
            some, members = members[: sum(several)], members[sum(several) :]
            codes[some] = self._choose_together(residual[some], contexts[part], several)
        return codes

    def _choose_together(
        self, residual: Float[Tensor, "n D"], contexts: Float[Tensor, "R D"], sizes: Sequence[int]
    ) -> Int[Tensor, " n"]:
        """Return the codes of vectors in the order of their contexts, of which each has as many as `sizes` says."""
        u = self.pairs(contexts).whole().view(len(contexts), len(self.codewords), -1)
        parts = zip(residual.split(sizes), u, strict=True)
        return torch.cat([squared_distances(some[None], words)[0].argmin(1) for some, words in parts])

    def _choose_by_distances(
        self, residual: Float[Tensor, "R D"], contexts: Float[Tensor, "R D"]
    ) -> Int[Tensor, " R"]:
        """Return the codes of vectors that share no context, from all pairs whole."""
        u = self.pairs(contexts).whole().view(len(contexts), len(self.codewords), -1)
        distances: Tensor = torch.linalg.vector_norm(u.sub_(residual[:, None]), dim=-1)
        return distances.argmin(1)

    def _choose_by_bounds(
        self, residual: Float[Tensor, "R D"], contexts: Float[Tensor, "R D"]
    ) -> Int[Tensor, " R"]:
        """Return the codes of vectors that share no context, from the pairs whole that can win."""
        count, size = len(residual), len(self.codewords)
        pairs = self.pairs(contexts)
        lower = self._bounds(residual, pairs)  # (R, K), of ||r - u||^2 - ||r||^2
        first = torch.arange(count, device=residual.device) * size
        promising = (lower + self.rest).argmin(
            1
        )  # what the bound leaves out of ||u||^2 is nearly that of base
        guess = pairs.rows(first + promising)
        squares = residual.square().sum(1)
        upper = (residual - guess).square().sum(1) - squares + ROUNDING * (squares + guess.square().sum(1))
        kept = (lower <= upper[:, None]).flatten().nonzero()[:, 0]
        distances = torch.full_like(lower, float("inf")).flatten()
        distances[kept] = (residual[kept // size] - pairs.rows(kept)).square_().sum(1)
        return distances.view(count, size).argmin(1)

    def _bounds(self, residual: Float[Tensor, "R D"], pairs: Pairs) -> Float[Tensor, "R K"]:
        """Return ||Q^T u||^2 - 2 r . u."""
        count, dim = residual.shape
        scores = torch.bmm(pairs.known.view(count, -1, dim), self._columns(residual, self.directions))
        for units, down in zip(pairs.hidden, pairs.downs, strict=True):
            columns = self._columns(residual @ down.T, down @ self.directions)
            scores.baddbmm_(units.view(count, -1, units.shape[1]), columns)
        inner, leading = scores[:, :, 0], scores[:, :, 1:]
        return leading.square().sum(-1).sub_(inner, alpha=2)

    @staticmethod
    def _columns(own: Float[Tensor, "R n"], shared: Float[Tensor, "n Q"]) -> Float[Tensor, "R n 1+Q"]:
        """Return a column of each row's own, and those that all share."""
        return torch.cat([own[:, :, None], shared.expand(len(own), -1, -1)], 2)


def _parts(rows: Int[Tensor, " n"], size: int) -> Sequence[Int[Tensor, " R"]]:
    """Return rows in parts of a size; no part where there is no row."""
    return rows.split(size) if len(rows) else ()


@torch.no_grad()
def greedy_codes(
    z: Float[Tensor, "N D"],
    contexts: Float[Tensor, "G D"],
    groups: Int[Tensor, " N"],
    steps: Sequence[GreedyStep],
) -> Int[Tensor, "N M"]:
    """Return codes of which each is the best of its step.

    Args:
        z: Vectors.
        contexts: What there is before the first step.
        groups: Which of these is a vector's.
        steps: The steps in their order.
    """
    parts = zip(z.split(BLOCK), groups.split(BLOCK), strict=True)
    found = [_encode_block(part, contexts, some, steps) for part, some in parts]
    return torch.cat(found) if found else groups.new_empty(0, len(steps))


def _encode_block(
    z: Float[Tensor, "N D"],
    contexts: Float[Tensor, "G D"],
    groups: Int[Tensor, " N"],
    steps: Sequence[GreedyStep],
) -> Int[Tensor, "N M"]:
    used, groups = groups.unique(return_inverse=True)
    contexts, codes = contexts[used], []
    for step in steps:
        chosen = step.choose(z, contexts, groups)
        codes.append(chosen)
        keys, groups = (groups * len(step.codewords) + chosen).unique(return_inverse=True)
        parents = contexts[keys // len(step.codewords)]
        contexts = parents + step.added(keys % len(step.codewords), parents)
    return torch.stack(codes, 1)

"""Balanced assignment by optimal transport (RepCONC, arXiv:2110.05789; Sinkhorn, Cuturi 2013).

Shapes: N vectors of all devices, M codebooks, K codewords.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retriever.distributed import all_gather, world_size

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["balanced_codes", "sinkhorn"]


def sinkhorn(costs: Float[Tensor, "N M K"], *, epsilon: float, iterations: int) -> Float[Tensor, "N M K"]:
    """Return the transport plan of every codebook whose rows sum to 1 / N and whose columns sum to 1 / K.

    Costs are mapped to [-1, 1] codebook by codebook first, so that `epsilon` has one meaning; all in float64, since
    exp(-1 / epsilon) is 1e-145 for RepCONC's 0.003.
    """
    c = costs.double().transpose(0, 1)  # (M, N, K)
    low, high = c.amin((1, 2), keepdim=True), c.amax((1, 2), keepdim=True)
    kernel = torch.exp(-(2 * (c - low) / (high - low).clamp(min=1e-300) - 1) / epsilon)
    rows, columns = kernel.shape[1:]
    v = kernel.new_ones(len(kernel), columns, 1)
    u = kernel.new_ones(len(kernel), rows, 1)
    for _ in range(iterations):
        v = 1 / (columns * (kernel.transpose(1, 2) @ u))
        u = 1 / (rows * (kernel @ v))
    return (u * kernel * v.transpose(1, 2)).transpose(0, 1)


@torch.no_grad()
def balanced_codes(costs: Float[Tensor, "n M K"], *, epsilon: float, iterations: int) -> Int[Tensor, "n M"]:
    """Return the codes of this device's vectors when every codeword must serve about equally many of all devices'."""
    own = len(costs)
    plan = sinkhorn(all_gather(costs.detach()), epsilon=epsilon, iterations=iterations)
    first = torch.distributed.get_rank() * own if world_size() > 1 else 0
    return plan[first : first + own].argmax(-1)

"""Gathering over devices: differentiable, exact, on any backend.

Shapes: n rows of this device, W devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Shaped

__all__ = ["all_gather", "gather_detached", "gather_padded", "world_size"]


def world_size() -> int:
    """Return the number of processes W; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_gather(x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "Wn ..."]:
    """Join the rows of all devices in rank order. Every device must bring the same number of rows.

    The gradient of the own rows is the sum of what every device sends back. When each device's loss is the mean
    over its own queries and gradients are averaged over devices (as DDP does), the result is exactly the gradient
    of the mean over all queries: MoPQ's differentiable cross-device sampling at 1/W of its cost.
    """
    if world_size() == 1:
        return x
    if x.is_floating_point():
        return _AllGather.apply(x)  # type: ignore[no-any-return,no-untyped-call]
    return _gather(x)


def gather_detached(x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "Wn ..."]:
    """Join the rows of all devices; only this device's rows keep their gradient path, and none comes from others."""
    if world_size() == 1:
        return x
    rows, rank = len(x), dist.get_rank()
    joined = _gather(x.detach())
    return torch.cat([joined[: rank * rows], x, joined[(rank + 1) * rows :]])


def gather_padded(x: Shaped[Tensor, "n width"]) -> Shaped[Tensor, "Wn widest"]:
    """Join rows whose width differs by device, with zeros on the right."""
    if world_size() == 1:
        return x
    width = torch.tensor(x.shape[1], device=x.device)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    return _gather(torch.nn.functional.pad(x, (0, int(width) - x.shape[1])))


def _gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _AllGather(torch.autograd.Function):
    """all_gather forward; sum over devices of the own slice backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return _gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        if dist.get_backend() == "nccl":
            own = total.new_empty((ctx.rows, *total.shape[1:]))
            dist.reduce_scatter_tensor(own, total)
            return own
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.rows :][: ctx.rows]

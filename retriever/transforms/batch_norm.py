"""Batch normalization over all processes, on any backend, and networks with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retriever.distributed import all_gather, world_size

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Affine", "BatchNorm", "alone", "calibrate", "inference", "perceptron"]

MOMENTUM = 0.1  # of the running statistics, PyTorch's default
EPSILON = 1e-5  # added to variances, PyTorch's default


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last, and over all processes (Ioffe and Szegedy, arXiv:1502.03167).

    `nn.SyncBatchNorm` runs on GPUs only. As there, each process brings as many rows, and gradients cross processes.

    Attributes:
        momentum: Share of a batch in the running statistics.
        joint: Whether statistics are those of all processes, or of this one.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum, self.joint = MOMENTUM, True

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Return weight (x - mean) / sqrt(variance + epsilon) + bias."""
        rows = x.flatten(0, -2)
        if self.training and self.joint and world_size() > 1:
            return self._normalize_jointly(rows).view_as(x)
        normal = F.batch_norm(
            rows,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            EPSILON,
        )
        return normal.view_as(x)

    def _normalize_jointly(self, rows: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        var, mean = torch.var_mean(rows, 0, correction=0)
        means, variances = all_gather(torch.stack([mean, var])[None]).unbind(1)  # (W, C) each
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)  # within processes and between them
        count = len(rows) * world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / max(1, count - 1), self.momentum)
        return (rows - mean) * (self.weight / (var + EPSILON).sqrt()) + self.bias

    def affine(self) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
        """Return scale and shift of inference: y = scale x + shift."""
        scale = self.weight / (self.running_var + EPSILON).sqrt()
        return scale, self.bias - self.running_mean * scale

    def folded(self) -> Affine:
        """Return the scale and shift of inference."""
        return Affine(*(part.detach() for part in self.affine()))


class Affine(nn.Module):
    """y = scale x + shift, channel by channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Float[Tensor, " C"], shift: Float[Tensor, " C"]) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Return scale x + shift."""
        result: Tensor = x * self.scale + self.shift
        return result


def perceptron(inputs: int, hidden: int, num_layers: int, outputs: int) -> nn.Sequential:
    """Return so many hidden layers (linear, batch normalization, ReLU) and a linear one."""
    layers: list[nn.Module] = []
    for _ in range(num_layers):
        layers += [nn.Linear(inputs, hidden, bias=False), BatchNorm(hidden), nn.ReLU()]
        inputs = hidden
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Use the running statistics in a block, also in training."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Normalize in this process alone in a block, which the others need not run."""
    norms = [each for each in module.modules() if isinstance(each, BatchNorm)]
    for norm in norms:
        norm.joint = False
    try:
        yield
    finally:
        for norm in norms:
            norm.joint = True


@torch.no_grad()
def calibrate(module: nn.Module, sample: Float[Tensor, "n C"]) -> None:
    """Set the running statistics to those of a sample, in this process."""
    norms = [each for each in module.modules() if isinstance(each, BatchNorm)]
    training = module.training
    module.train()
    for norm in norms:
        norm.momentum = 1.0
    with alone(module):
        module(sample)
    for norm in norms:
        norm.momentum = MOMENTUM
    module.train(training)

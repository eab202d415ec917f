"""Parameter groups and learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from retriever import DualEncoder
from training.experiment import OptimizationConfig
from training.sharding import clip_norm

__all__ = ["clip_gradients", "forget", "learning_rate_factor", "parameter_groups"]


def parameter_groups(model: DualEncoder, config: OptimizationConfig) -> list[dict[str, object]]:
    """Return AdamW's groups: tower matrices with weight decay, tower vectors without, the head without.

    What the head moves itself has a learning rate of 0: AdamW then only sees to its gradient.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "head": [], "manual": []}
    manual = {id(parameter) for parameter in model.head.manual_parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("head."):
            groups["manual" if id(parameter) in manual else "head"].append(parameter)
        else:
            groups["matrices" if parameter.ndim > 1 else "vectors"].append(parameter)
    decay = {"matrices": config.weight_decay, "vectors": 0.0, "head": 0.0, "manual": 0.0}
    peak = {"matrices": config.lr, "vectors": config.lr, "head": config.head_lr, "manual": 0.0}
    return [
        {"params": part, "lr": peak[name], "peak_lr": peak[name], "weight_decay": decay[name]}
        for name, parameters in groups.items()
        for part in _shards_apart(parameters)
    ]


def _shards_apart(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return whole and sharded parameters, which one call of AdamW's kernel does not take together."""
    parts = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
    return [part for part in parts if part]


def learning_rate_factor(step: int, steps: int, config: OptimizationConfig) -> float:
    """Return the factor on the peak learning rates at a step: linear rise, then the configured fall."""
    rise = config.warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    share = (step - rise) / max(1.0, steps - rise)  # of the fall, 0 to 1
    falls = {
        "constant": 1.0,
        "linear": 1 - share,
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "quarter_cosine": math.cos(math.pi / 2 * share),
    }
    return falls[config.schedule]


def clip_gradients(model: DualEncoder, limit: float) -> dict[str, Tensor]:
    """Clip the gradients of towers and head, each to the norm; return the norms before."""
    norms = {}
    towers = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    for name, parameters in {"towers": towers, "head": list(model.head.parameters())}.items():
        if any(p.grad is not None for p in parameters):
            sharded = any(isinstance(p, DTensor) for p in parameters)
            clip = clip_norm if sharded else nn.utils.clip_grad_norm_
            norms[f"train/grad_norm_{name}"] = clip(parameters, limit)
    return norms


def forget(optimizer: torch.optim.Optimizer, restarted: Mapping[nn.Parameter, Tensor]) -> None:
    """Zero the moments of restarted rows, given by a mask for each parameter: they belonged to other values."""
    for parameter, mask in restarted.items():
        for value in optimizer.state[parameter].values():
            if value.shape == parameter.shape:
                value[mask] = 0

"""Parameter groups and learning rates."""

from __future__ import annotations

import math

from torch import nn

from retriever import DualEncoder
from training.experiment import OptimizationConfig

__all__ = ["learning_rate_factor", "parameter_groups"]


def parameter_groups(model: DualEncoder, config: OptimizationConfig) -> list[dict[str, object]]:
    """Return AdamW's groups: tower matrices with weight decay, tower vectors without, the head without."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "head": []}
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            groups["head"].append(parameter)
        else:
            groups["matrices" if parameter.ndim > 1 else "vectors"].append(parameter)
    decay = {"matrices": config.weight_decay, "vectors": 0.0, "head": 0.0}
    peak = {"matrices": config.lr, "vectors": config.lr, "head": config.head_lr}
    return [
        {"params": parameters, "lr": peak[name], "peak_lr": peak[name], "weight_decay": decay[name]}
        for name, parameters in groups.items()
        if parameters
    ]


def learning_rate_factor(step: int, steps: int, config: OptimizationConfig) -> float:
    """Return the factor on the peak learning rates at a step: linear rise, then the configured fall."""
    rise = config.warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    share = (step - rise) / max(1.0, steps - rise)  # of the fall, 0 to 1
    falls = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
    return falls[config.schedule]

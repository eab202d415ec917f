"""Retrieval losses: one method, one file. A new loss is one file and one line of `LOSSES`."""

from training.losses.base import LossConfig, RetrievalLoss, ScoredBatch
from training.losses.contrastive import Contrastive, ContrastiveConfig
from training.losses.mcl import MCL, MCLConfig

LOSSES: dict[str, type[LossConfig]] = {
    "contrastive": ContrastiveConfig,
    "mcl": MCLConfig,
}

__all__ = [
    "LOSSES",
    "MCL",
    "Contrastive",
    "ContrastiveConfig",
    "LossConfig",
    "MCLConfig",
    "RetrievalLoss",
    "ScoredBatch",
]

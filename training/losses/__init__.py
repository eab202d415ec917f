"""Retrieval losses: one method, one file. A new loss is one file and one line of `LOSSES`."""

from training.losses.base import DocumentPairs, LossConfig, RetrievalLoss, ScoredBatch
from training.losses.contrastive import Contrastive, ContrastiveConfig
from training.losses.distillation import Distillation, DistillationConfig
from training.losses.hinge import Hinge, HingeConfig
from training.losses.inrp import INRP, INRPConfig
from training.losses.lambda_rank import LambdaRank, LambdaRankConfig
from training.losses.mcl import MCL, MCLConfig
from training.losses.reconstruction import Reconstruction, ReconstructionConfig

LOSSES: dict[str, type[LossConfig]] = {
    "contrastive": ContrastiveConfig,
    "mcl": MCLConfig,
    "hinge": HingeConfig,
    "distillation": DistillationConfig,
    "lambda_rank": LambdaRankConfig,
    "reconstruction": ReconstructionConfig,
    "inrp": INRPConfig,
}

__all__ = [
    "INRP",
    "LOSSES",
    "MCL",
    "Contrastive",
    "ContrastiveConfig",
    "Distillation",
    "DistillationConfig",
    "DocumentPairs",
    "Hinge",
    "HingeConfig",
    "INRPConfig",
    "LambdaRank",
    "LambdaRankConfig",
    "LossConfig",
    "MCLConfig",
    "Reconstruction",
    "ReconstructionConfig",
    "RetrievalLoss",
    "ScoredBatch",
]

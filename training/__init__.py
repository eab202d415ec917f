"""Pairs -> trained DualEncoder: losses, distribution, checkpoints, evaluation, logging."""

from training.evaluate import evaluate_index, evaluate_model, measure
from training.experiment import Experiment
from training.recipe import dump_experiment, load_experiment, parse_experiment
from training.trainer import Trainer, TrainingReport

__all__ = [
    "Experiment",
    "Trainer",
    "TrainingReport",
    "dump_experiment",
    "evaluate_index",
    "evaluate_model",
    "load_experiment",
    "measure",
    "parse_experiment",
]

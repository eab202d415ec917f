"""Combinations of method options that cannot work are refused where they are written.

Nothing is loaded here: an `Experiment` checks itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from retriever import DualEncoderConfig, InputError
from retriever.heads import HeadConfig, IVFProductQuantizerConfig, NoCompressionConfig, ProductQuantizerConfig
from training import Experiment
from training.experiment import DataConfig, LiveNegativesConfig, OptimizationConfig
from training.losses import ContrastiveConfig, DistillationConfig, MCLConfig

PQ, IVFPQ = ProductQuantizerConfig(), IVFProductQuantizerConfig()
STARTED = {"dense_warmup": 0.0}


def make_experiment(**parts: Any) -> Experiment:
    """An experiment; `parts` are fields, or groups of fields as a dict."""
    groups: dict[str, Any] = {
        "model": DualEncoderConfig(encoder="model"),
        "head": PQ,
        "loss": MCLConfig(),
        "data": DataConfig(source="data"),
        "optimization": OptimizationConfig(),
    }
    for name, value in parts.items():
        groups[name] = replace(groups[name], **value) if isinstance(value, dict) else value
    return Experiment(output="run", **groups)


Fault = tuple[dict[str, Any], str]
FAULTS: dict[str, Fault] = {
    "tied towers": (
        {"optimization": {"freeze": "documents"}},
        r"freeze documents needs towers of their own.* Set model\.tie false",
    ),
    "nothing to train": (
        {
            "head": NoCompressionConfig(),
            "loss": ContrastiveConfig(),
            "optimization": {"freeze": "both", **STARTED},
        },
        r"freeze both with the head none leaves nothing to train",
    ),
    "warm-up of frozen towers": (
        {"optimization": {"freeze": "both", "dense_warmup": 0.25}},
        r"dense_warmup must be 0, got 0\.25",
    ),
    "warm-up without labels": (
        {"loss": DistillationConfig(), "optimization": {"dense_warmup": 0.25}},
        r"has nothing to teach before the head's start.* got 0\.25",
    ),
    "moving vectors": (
        {"live_negatives": LiveNegativesConfig(per_query=2, by="dense")},
        r"by dense needs a frozen document tower\. Set optimization\.freeze documents",
    ),
    "no codes": (
        {
            "head": NoCompressionConfig(),
            "loss": ContrastiveConfig(),
            "live_negatives": LiveNegativesConfig(per_query=2),
        },
        r"by compressed needs a head that compresses, got none",
    ),
    "no probabilities": (
        {"loss": MCLConfig(assignment_weight=1.0)},
        r"needs a head with selection probabilities\. Use the head pq or rq with estimator softmax",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_combination_that_cannot_work_is_refused_with_a_remedy(name: str) -> None:
    parts, fault = FAULTS[name]
    with pytest.raises(InputError, match=fault):
        make_experiment(**parts)


@pytest.mark.parametrize("head", [PQ, IVFPQ], ids=lambda head: head.name)
def test_labels_let_a_distillation_warm_up(head: HeadConfig) -> None:
    loss = DistillationConfig(label_weight=1.0)
    made = make_experiment(head=head, loss=loss, optimization={"dense_warmup": 0.3})
    assert made.optimization.dense_warmup == 0.3


@pytest.mark.parametrize(
    ("config", "options", "fault"),
    [
        (LiveNegativesConfig, {"per_query": -1}, r"live_negatives\.per_query must be 0 or more, got -1"),
        (
            LiveNegativesConfig,
            {"per_query": 5, "depth": 4},
            r"live_negatives\.depth must be per_query or more, got 4",
        ),
        (LiveNegativesConfig, {"depth": 0}, r"live_negatives\.depth must be per_query or more, got 0"),
        (LiveNegativesConfig, {"by": "bm25"}, r"live_negatives\.by must be compressed or dense, got 'bm25'"),
        (LiveNegativesConfig, {"refresh": -1}, r"live_negatives\.refresh must be 0 or more, got -1"),
        (OptimizationConfig, {"freeze": "queries"}, r"optimization\.freeze must be one of .*got 'queries'"),
        (
            OptimizationConfig,
            {"cross_device": "ncs"},
            r"optimization\.cross_device must be one of .*got 'ncs'",
        ),
        (
            OptimizationConfig,
            {"world_scale": "none"},
            r"optimization\.world_scale must be one of .*got 'none'",
        ),
    ],
)
def test_a_value_outside_its_range_is_refused_by_its_name(config: Any, options: Any, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        config(**options)


def test_labels_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(InputError, match=r"data\.labels must be judged, teacher or pseudo, got 'guessed'"):
        DataConfig(source="data", labels="guessed")


@pytest.mark.parametrize("rotation", ["givens_greedy", "cayley"])
@pytest.mark.parametrize("name", ["assignment", "list_assignment"])
def test_frozen_codes_behind_a_rotation_that_moves_are_refused(name: str, rotation: str) -> None:
    options = {"list_assignment": "frozen", name: "frozen"}
    with pytest.raises(InputError, match=rf"only behind a fixed rotation, got '{rotation}'"):
        IVFProductQuantizerConfig(rotation=rotation, distortion_weight=1.0, **options)

"""INRP: distances before and after the network, near pairs first.

Shapes: n documents, D dimensions before and E after.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever import DualEncoderConfig, InputError
from retriever.heads import CNTConfig, ProductQuantizerConfig
from training import Experiment
from training.experiment import DataConfig, OptimizationConfig
from training.losses import INRP, DistillationConfig, DocumentPairs, INRPConfig, MCLConfig, ScoredBatch
from training.losses.inrp import WEIGHTS

VARIANTS = list(WEIGHTS)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch(x: Tensor, y: Tensor) -> ScoredBatch:
    """A batch of documents all of which are scored, with the queries' scores at 0."""
    n = len(x)
    same = torch.eye(n, dtype=torch.bool)
    return ScoredBatch(
        dense=torch.zeros(2, n),
        compressed=torch.zeros(2, n),
        labels=torch.arange(2),
        ignore=torch.zeros(2, n, dtype=torch.bool),
        repeated=torch.zeros(2, n, dtype=torch.bool),
        documents=x,
        reconstruction=y,
        positives=torch.arange(2),
        pairs=DocumentPairs(documents=x, mapped=y, other_documents=x, other_mapped=y, same=same),
    )


def make_loss(*, mu: float = 1.0, sigma: float = 0.1, **options: Any) -> INRP:
    loss = INRPConfig(**options).build()
    loss.mu.fill_(mu)
    loss.sigma.fill_(sigma)
    return loss


def weight(variant: str, distance: float, mu: float, sigma: float) -> float:
    values = (torch.tensor(value, dtype=torch.float64) for value in (distance, mu, sigma))
    return WEIGHTS[variant](*values).item()


# --- weights ---


@pytest.mark.parametrize("mu", [0.7, 14.5, 41.5257])
def test_published_weight_is_2_up_to_its_first_knee_and_a_hundredth_from_its_second(mu: float) -> None:
    for ratio in (0.0, 0.05, 0.135):
        assert weight("log1", ratio * mu, mu, 1.0) == pytest.approx(2.0, abs=3e-3)
    for ratio in (0.991, 1.0, 3.0):
        assert weight("log1", ratio * mu, mu, 1.0) == pytest.approx(0.01)
    assert weight("log1", 0.5 * mu, mu, 1.0) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("variant", "distance", "expected"),
    [
        ("log2", 1.0, 2.0),
        ("log2", 5.0, math.log(2)),
        ("log2", 11.0, 0.0),
        ("step", 10.0, 0.9),
        ("step", 10.1, 0.1),
        ("li1", 0.0, 1.0),
        ("li1", 2.0, 0.5),  # mu - 3 sigma is 4
        ("li1", 4.1, 0.0),
        ("li2", 2.5, 0.75),
        ("li2", 12.0, 0.0),
        ("li3", 2.5, 0.75),
        ("none", 99.0, 1.0),
    ],
)
def test_weight_of_a_variant_is_its_formula(variant: str, distance: float, expected: float) -> None:
    assert weight(variant, distance, 10.0, 2.0) == pytest.approx(expected)


# --- value and gradient ---


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "li3"])
def test_loss_is_0_where_distances_are_kept(variant: str) -> None:
    x = rand(30, 16, seed=0)
    assert make_loss(weight=variant, mu=5.0, sigma=0.5)(make_batch(x, x))["inrp"].item() == 0


def test_scaled_targets_are_smaller_by_the_root_of_the_compression() -> None:
    x = rand(30, 16, seed=0)
    y = torch.cat([x, torch.zeros(30, 0)], 1)[:, :4]
    plain, scaled = (
        make_loss(weight="none", scale_sqrt_c=scale, mu=5.0)(make_batch(x, y))["inrp"].item()
        for scale in (False, True)
    )
    before, after = torch.cdist(x.double(), x.double()), torch.cdist(y.double(), y.double())
    assert plain == pytest.approx((before - after).abs().mean().item(), rel=1e-5)
    assert scaled == pytest.approx((before / 2 - after).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_is_the_mean_over_all_pairs_of_a_plain_loop(variant: str) -> None:
    x, y, mu, sigma = rand(12, 8, seed=0), rand(12, 4, seed=1), 4.0, 0.5
    total = 0.0
    for i in range(12):
        for j in range(12):
            before = math.dist(x[i].tolist(), x[j].tolist())
            after = math.dist(y[i].tolist(), y[j].tolist())
            target = before / math.sqrt(8 / 4) if variant == "li3" else before
            total += weight(variant, before, mu, sigma) * abs(target - after)
    found = make_loss(weight=variant, mu=mu, sigma=sigma, inrp_weight=0.5)(make_batch(x, y))["inrp"]
    assert found.item() == pytest.approx(0.5 * total / 144, rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_finite_where_rows_are_equal(variant: str) -> None:
    x = rand(10, 8, seed=0)[[0, 0, 0, 1, 2, 3, 4, 5, 5, 6]]
    y = (x @ rand(8, 4, seed=1)).requires_grad_()
    make_loss(weight=variant, mu=4.0, sigma=0.5)(make_batch(x, y))["inrp"].backward()
    assert bool(y.grad.isfinite().all())
    assert y.grad.abs().sum() > 0


def test_gradient_does_not_reach_the_targets() -> None:
    x, y = rand(10, 8, seed=0).requires_grad_(), rand(10, 4, seed=1).requires_grad_()
    make_loss()(make_batch(x, y))["inrp"].backward()
    assert x.grad is None


# --- mu and sigma ---


def test_mean_and_deviation_of_distances_are_measured_from_the_sample() -> None:
    x = 3 * rand(300, 8, seed=0)
    loss = INRPConfig().build()
    loss.start(x, 0)
    pairs = torch.pdist(x.double())
    assert loss.mu.item() == pytest.approx(pairs.mean().item(), rel=5e-3)
    assert loss.sigma.item() == pytest.approx(pairs.std().item(), rel=1e-2)


def test_measured_distances_are_part_of_the_state() -> None:
    assert set(INRPConfig().build().state_dict()) == {"mu", "sigma"}


def test_equal_vectors_are_refused() -> None:
    with pytest.raises(InputError, match="no distance to keep"):
        INRPConfig().build().start(torch.ones(50, 8), 0)


def test_a_weight_that_would_be_0_everywhere_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"li1 needs distances whose mean is above 3 deviations.*Set weight li2"
    ):
        INRPConfig(weight="li1").build().start(rand(300, 1, seed=0), 0)


# --- training ---


def test_training_by_inrp_lowers_the_error_of_near_distances() -> None:
    x = rand(600, 6, seed=0) @ rand(6, 16, seed=1) + 0.3 * rand(600, 16, seed=2)
    torch.manual_seed(0)
    head = CNTConfig(expansion=2, tokens=8, start="sparse").build(16)
    head.warm_start(x, None, 0)
    loss = INRPConfig().build()
    loss.start(x, 0)

    def error() -> float:
        y = head.map_queries(x[500:])
        before, after = torch.pdist(x[500:]), torch.pdist(y)
        near = before < before.quantile(0.1)
        return (before - after)[near].abs().mean().item()

    start = error()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for step in range(40):
        rows = torch.randint(500, (128,), generator=torch.Generator().manual_seed(step))
        output = head.train()(x[rows])
        optimizer.zero_grad()
        loss(make_batch(x[rows], output.mapped))["inrp"].backward()
        optimizer.step()
    assert error() < 0.5 * start


# --- beside a task ---


def test_a_task_keeps_its_parts() -> None:
    batch = make_batch(rand(10, 8, seed=0), rand(10, 8, seed=1))
    parts = INRPConfig(task=MCLConfig()).build()(batch)
    assert {name: value.item() for name, value in MCLConfig().build()(batch).items()} == {
        name: value.item() for name, value in parts.items() if name != "inrp"
    }
    assert parts["inrp"] > 0


def test_before_the_heads_start_only_the_task_counts() -> None:
    batch = replace(make_batch(rand(10, 8, seed=0), rand(10, 8, seed=1)), pairs=None)
    assert set(INRPConfig(task=MCLConfig()).build()(batch)) == set(MCLConfig().build()(batch))


def test_a_task_starts_with_the_loss() -> None:
    assert INRPConfig(task=DistillationConfig()).needs_teacher
    assert not INRPConfig(task=MCLConfig()).needs_head


def make_experiment(loss: INRPConfig, head: Any, dense_warmup: float) -> Experiment:
    return Experiment(
        output="run",
        model=DualEncoderConfig(encoder="model"),
        head=head,
        loss=loss,
        data=DataConfig(source="data"),
        optimization=OptimizationConfig(dense_warmup=dense_warmup),
    )


@pytest.mark.parametrize(
    ("loss", "head", "dense_warmup", "fault"),
    [
        (INRPConfig(), ProductQuantizerConfig(), 0.0, r"which the head 'pq' has not\. Use the head cnt"),
        (INRPConfig(), CNTConfig(), 0.3, r"nothing to teach before the head's start.* got 0\.3"),
        (
            INRPConfig(task=MCLConfig(assignment_weight=1.0)),
            CNTConfig(),
            0.3,
            r"needs a head with selection probabilities",
        ),
    ],
)
def test_a_run_that_cannot_work_is_refused(
    loss: INRPConfig, head: Any, dense_warmup: float, fault: str
) -> None:
    with pytest.raises(InputError, match=fault):
        make_experiment(loss, head, dense_warmup)


def test_selection_probabilities_of_an_inner_head_are_those_of_the_head() -> None:
    soft = CNTConfig(inner=ProductQuantizerConfig(estimator="softmax"))
    make_experiment(INRPConfig(task=MCLConfig(assignment_weight=1.0)), soft, 0.3)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"weight": "log3"}, r"weight must be one of log1, .*got 'log3'"),
        ({"inrp_weight": 0.0}, r"inrp_weight must be positive, got 0"),
        ({"inrp_weight": np.inf}, r"inrp_weight must be positive, got inf"),
        ({"task": INRPConfig()}, r"task must be another loss than inrp"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        INRPConfig(**options)

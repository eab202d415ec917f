"""Retrieval losses against formulas written from the papers, in float64."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever import DualEncoderConfig, InputError
from retriever.heads import HeadConfig, NoCompressionConfig, ProductQuantizerConfig
from training import Experiment
from training.experiment import DataConfig
from training.losses import (
    LOSSES,
    ContrastiveConfig,
    MCLConfig,
    ReconstructionConfig,
    RetrievalLoss,
    ScoredBatch,
)

B, H, D = 5, 1, 6  # queries, negatives a query, dimensions
N = B * (1 + H)
SCORES = ("dense", "compressed", "coarse", "teacher")
MASKS = {
    name: "repeated" if name == "distillation" else "ignore" for name in LOSSES
}  # a teacher ranks positives
SCORING = [name for name in LOSSES if name not in ("reconstruction", "inrp")]  # those that look at scores


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh random numbers; pytest shows the seed of a test that fails."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator


@pytest.fixture
def batch(generator: torch.Generator) -> ScoredBatch:
    """Random vectors and their scores; about a fifth of the documents ignored, half of those as repeated."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    queries, documents = random(B, D), random(N, D)
    reconstruction = documents + 0.3 * random(N, D)
    labels = torch.arange(B) * (1 + H)
    ignore = torch.rand(B, N, generator=generator) < 0.2
    ignore[0, N - 1] = True  # at least one
    ignore[torch.arange(B), labels] = False
    repeated = ignore & (torch.rand(B, N, generator=generator) < 0.5)
    repeated[0, N - 1] = True
    return ScoredBatch(
        dense=queries @ documents.T,
        compressed=queries @ reconstruction.T,
        labels=labels,
        ignore=ignore,
        repeated=repeated,
        documents=documents,
        reconstruction=reconstruction,
        positives=labels,
        log_assignment=-random(N).abs(),
        coarse=queries @ (documents + random(N, D)).T,
        teacher=queries @ (documents + 0.1 * random(N, D)).T,
    )


def softmax_cross_entropy(batch: ScoredBatch, scores: Tensor, temperature: float) -> float:
    """Mean over queries of -log(exp(s+ / t) / sum of exp(s / t) over what is not ignored), as plain sums."""
    values = []
    for i in range(len(batch.labels)):
        terms = [
            np.exp(scores[i, j].item() / temperature)
            for j in range(scores.shape[1])
            if not bool(batch.ignore[i, j])
        ]
        positive = np.exp(scores[i, int(batch.labels[i])].item() / temperature)
        values.append(-np.log(positive / np.sum(terms)))
    return float(np.mean(values))


def total(loss: RetrievalLoss, batch: ScoredBatch) -> float:
    return sum(part.item() for part in loss(batch).values())


def experiment(loss: MCLConfig, head: HeadConfig) -> Experiment:
    return Experiment(
        output="run",
        model=DualEncoderConfig(encoder="model"),
        head=head,
        loss=loss,
        data=DataConfig(source="data"),
    )


def copy_with_gradient(batch: ScoredBatch) -> ScoredBatch:
    """Return a batch whose floating point tensors are leaves of the graph."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    for name, value in values.items():
        if value is not None and value.is_floating_point():
            values[name] = value.clone().requires_grad_()
    return ScoredBatch(**values)


def with_small_scores(batch: ScoredBatch) -> ScoredBatch:
    """Return the batch with scores that no temperature in use drives to a probability of exactly 0 or 1."""
    return replace(batch, **{kind: 0.05 * getattr(batch, kind) for kind in SCORES})


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0])
def test_contrastive_is_minus_log_softmax_of_the_positive(batch: ScoredBatch, temperature: float) -> None:
    value = total(ContrastiveConfig(temperature=temperature).build(), batch)
    assert value == pytest.approx(softmax_cross_entropy(batch, batch.dense, temperature), rel=1e-10)


def test_contrastive_gradient_is_softmax_minus_one_hot_over_temperature(batch: ScoredBatch) -> None:
    temperature, batch = 0.5, copy_with_gradient(batch)
    sum(ContrastiveConfig(temperature=temperature).build()(batch).values()).backward()
    scores = np.where(batch.ignore, -np.inf, batch.dense.detach().numpy() / temperature)
    softmax = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = (softmax - np.eye(N)[batch.labels]) / (B * temperature)
    np.testing.assert_allclose(batch.dense.grad.numpy(), expected, atol=1e-12)


def test_contrastive_does_not_depend_on_compressed_scores(batch: ScoredBatch) -> None:
    loss = ContrastiveConfig().build()
    assert total(loss, replace(batch, compressed=batch.compressed + 1)) == total(loss, batch)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_documents_do_not_change_the_loss(name: str, batch: ScoredBatch) -> None:
    loss = LOSSES[name]().build()
    ignored = getattr(batch, MASKS[name])
    changed = {kind: getattr(batch, kind) + 7.0 * ignored for kind in SCORES}
    assert total(loss, replace(batch, **changed)) == total(loss, batch)


@pytest.mark.parametrize("name", SCORING)
def test_documents_that_are_not_ignored_change_the_loss(name: str, batch: ScoredBatch) -> None:
    batch, nothing = with_small_scores(batch), torch.zeros_like(batch.ignore)
    values = [total(LOSSES[name]().build(), b) for b in (batch, replace(batch, **{MASKS[name]: nothing}))]
    assert values[0] != pytest.approx(values[1], rel=1e-9)


@pytest.mark.parametrize("name", ["contrastive", "mcl"])
def test_more_negatives_raise_a_softmax_loss(name: str, batch: ScoredBatch) -> None:
    loss, batch = LOSSES[name]().build(), with_small_scores(batch)
    assert total(loss, replace(batch, ignore=torch.zeros_like(batch.ignore))) > total(loss, batch)


def test_mcl_default_is_the_released_form(batch: ScoredBatch) -> None:
    expected = (
        softmax_cross_entropy(batch, batch.dense, 1.0)
        + softmax_cross_entropy(batch, batch.compressed, 1.0)
        + 1e-8 * ((batch.documents - batch.reconstruction) ** 2).mean().item()
    )
    assert total(MCLConfig(temperature=1.0).build(), batch) == pytest.approx(expected, abs=1e-12)


def test_mcl_reconstruction_part_is_the_weighted_mean_squared_error(batch: ScoredBatch) -> None:
    parts = MCLConfig(reconstruction_weight=0.3).build()(batch)
    error = np.mean((batch.documents.numpy() - batch.reconstruction.numpy()) ** 2)
    assert parts["reconstruction"].item() == pytest.approx(0.3 * error, rel=1e-12)


def test_mcl_paper_form_adds_minus_log_probability_of_the_positives_codes(batch: ScoredBatch) -> None:
    config = MCLConfig(temperature=0.5, dense_weight=0, assignment_weight=1, reconstruction_weight=0)
    log_p = batch.log_assignment.numpy()[batch.positives.numpy()].mean()
    expected = softmax_cross_entropy(batch, batch.compressed, 0.5) - log_p
    assert total(config.build(), batch) == pytest.approx(expected, rel=1e-12)


def test_assignment_part_is_the_product_of_the_heads_selection_probabilities(
    batch: ScoredBatch, generator: torch.Generator
) -> None:
    temperature = 0.7
    head = ProductQuantizerConfig(
        num_codebooks=3,
        codebook_bits=2,
        rotation="none",
        estimator="softmax",
        selection_temperature=temperature,
    ).build(D)
    output = head(batch.documents.float())
    config = MCLConfig(dense_weight=0, assignment_weight=1, reconstruction_weight=0)
    parts = config.build()(replace(batch, log_assignment=output.log_assignment))
    logs = []
    codebooks = head.codebooks.detach().double().numpy()  # (M, K, S)
    for row in batch.positives.tolist():
        subvectors = batch.documents[row].numpy().reshape(3, -1)
        distances = ((codebooks - subvectors[:, None, :]) ** 2).sum(-1)  # (M, K)
        p = np.exp(-distances / temperature)
        p /= p.sum(1, keepdims=True)
        logs.append(np.log(p.max(1)).sum())  # the nearest codeword is the most probable
    assert parts["assignment"].item() == pytest.approx(-np.mean(logs), rel=1e-4)


def test_mcl_has_no_assignment_part_before_the_warm_start(batch: ScoredBatch) -> None:
    parts = MCLConfig(assignment_weight=1).build()(replace(batch, log_assignment=None))
    assert "assignment" not in parts


def test_mcl_leaves_out_parts_of_weight_zero(batch: ScoredBatch) -> None:
    config = MCLConfig(dense_weight=0, assignment_weight=0, reconstruction_weight=0)
    assert list(config.build()(batch)) == ["compressed"]


def test_mcl_dense_weight_multiplies_the_dense_part(batch: ScoredBatch) -> None:
    parts = MCLConfig(temperature=1.0, dense_weight=2.5).build()(batch)
    expected = 2.5 * softmax_cross_entropy(batch, batch.dense, 1.0)
    assert parts["dense"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("config", [ContrastiveConfig, MCLConfig])
@pytest.mark.parametrize("temperature", [0.0, -0.05, float("inf"), float("nan")])
def test_temperature_must_be_positive_and_finite(config: Any, temperature: float) -> None:
    with pytest.raises(InputError, match=r"temperature must be positive, got"):
        config(temperature=temperature)


@pytest.mark.parametrize("field", ["dense_weight", "assignment_weight", "reconstruction_weight"])
@pytest.mark.parametrize("weight", [-1e-9, float("inf"), float("nan")])
def test_mcl_refuses_a_weight_that_is_negative_or_not_finite(field: str, weight: float) -> None:
    with pytest.raises(InputError, match=f"{field} must be zero or more, got"):
        MCLConfig(**{field: weight})


@pytest.mark.parametrize(
    "head",
    [
        NoCompressionConfig(),
        ProductQuantizerConfig(estimator="codeword"),
        ProductQuantizerConfig(estimator="identity"),
    ],
    ids=["none", "codeword", "identity"],
)
def test_experiment_refuses_assignment_weight_without_selection_probabilities(head: HeadConfig) -> None:
    with pytest.raises(
        InputError, match=r"assignment_weight=0\.5 .* Use the head pq or rq with estimator softmax"
    ):
        experiment(MCLConfig(assignment_weight=0.5), head)


def test_experiment_accepts_assignment_weight_with_the_softmax_estimator() -> None:
    made = experiment(MCLConfig(assignment_weight=0.5), ProductQuantizerConfig(estimator="softmax"))
    assert made.loss.assignment_weight == 0.5


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_finite_on_large_scores(name: str, batch: ScoredBatch) -> None:
    large = replace(batch, **{kind: 1e4 * getattr(batch, kind) for kind in SCORES})
    assert np.isfinite(total(LOSSES[name]().build(), large))


@pytest.mark.parametrize("name", SCORING)
def test_every_loss_sends_a_gradient_to_the_scores_of_every_query(name: str, batch: ScoredBatch) -> None:
    small = with_small_scores(with_small_scores(batch))  # within the hinge's margin of 0.1
    batch = copy_with_gradient(small)
    sum(LOSSES[name]().build()(batch).values()).backward()
    reached = sum(s.grad.abs() for s in (batch.dense, batch.compressed) if s.grad is not None)
    assert bool((reached.sum(1) > 0).all())


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_a_mean_over_queries(name: str, batch: ScoredBatch) -> None:
    """So that the mean over devices of equal shares is the loss of the whole batch."""
    loss = LOSSES[name]().build()
    whole = total(loss, batch)  # sets what a first batch sets
    shares = []
    for i in range(B):
        own = slice(i * (1 + H), (i + 1) * (1 + H))
        share = ScoredBatch(
            dense=batch.dense[i : i + 1],
            compressed=batch.compressed[i : i + 1],
            labels=batch.labels[i : i + 1],
            ignore=batch.ignore[i : i + 1],
            repeated=batch.repeated[i : i + 1],
            documents=batch.documents[own],
            reconstruction=batch.reconstruction[own],
            positives=torch.tensor([0]),
            log_assignment=batch.log_assignment[own],
            coarse=batch.coarse[i : i + 1],
            teacher=batch.teacher[i : i + 1],
        )
        shares.append(total(loss, share))
    assert np.mean(shares) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_every_part_of_a_loss_is_a_scalar_of_the_graph(name: str, batch: ScoredBatch) -> None:
    parts = LOSSES[name]().build()(copy_with_gradient(batch))
    assert all(part.ndim == 0 and part.requires_grad for part in parts.values())


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_holds_trainable_state(name: str) -> None:
    assert list(LOSSES[name]().build().parameters()) == []


def test_only_what_a_loss_measures_is_to_be_checkpointed() -> None:
    """Distillation's weight of lists, from the first batch; INRP's mean and deviation of distances."""
    states = {name: list(config().build().state_dict()) for name, config in LOSSES.items()}
    assert {name: state for name, state in states.items() if state} == {
        "distillation": ["list_weight"],
        "inrp": ["mu", "sigma"],
    }


def test_reconstruction_is_the_mean_squared_error_of_a_vector(batch: ScoredBatch) -> None:
    errors = [
        sum((x - y) ** 2 for x, y in zip(*pair, strict=True))
        for pair in zip(batch.documents.tolist(), batch.reconstruction.tolist(), strict=True)
    ]
    loss = ReconstructionConfig(weight=0.5).build()
    assert total(loss, batch) == pytest.approx(0.5 * np.mean(errors), rel=1e-12)


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_of_the_reconstruction_that_is_no_weight_is_refused(weight: float) -> None:
    with pytest.raises(InputError, match="weight must be zero or more, got"):
        ReconstructionConfig(weight=weight)

"""Distillation objectives against loops in float64 written from Distill-VQ, and the weights of its terms.

Shapes: B queries, N documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever import InputError
from training.losses import Distillation, DistillationConfig, ScoredBatch
from training.losses.distillation import OBJECTIVES

B, N = 4, 9
SEEDS = (0, 1, 2)
TEMPERATURE = 0.7
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def make_batch(seed: int, share_repeated: float = 0.3) -> ScoredBatch:
    generator = torch.Generator().manual_seed(seed)

    def random() -> Tensor:
        return torch.randn(B, N, generator=generator, dtype=torch.float64)

    labels = torch.randint(N, (B,), generator=generator)
    repeated = (torch.rand(B, N, generator=generator) < share_repeated).scatter(1, labels[:, None], False)
    relevant = (torch.rand(B, N, generator=generator) < 0.3).scatter(1, labels[:, None], False)
    vectors = torch.zeros(N, 2, dtype=torch.float64)
    return ScoredBatch(
        dense=random(),
        compressed=random(),
        coarse=random(),
        teacher=random(),
        labels=labels,
        ignore=repeated | relevant,
        repeated=repeated,
        documents=vectors,
        reconstruction=vectors,
        positives=labels,
    )


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def listnet(t: np.ndarray, s: np.ndarray, positive: int) -> float:
    return -float(sum(softmax(t) * np.log(softmax(s))))


def kl(t: np.ndarray, s: np.ndarray, positive: int) -> float:
    return float(sum(softmax(t) * np.log(softmax(t) / softmax(s))))


def mse(t: np.ndarray, s: np.ndarray, positive: int) -> float:
    return float(np.mean((s - t) ** 2))


def margin_mse(t: np.ndarray, s: np.ndarray, positive: int) -> float:
    others = [j for j in range(len(t)) if j != positive]
    return float(np.mean([((s[positive] - s[j]) - (t[positive] - t[j])) ** 2 for j in others]))


def ranknet(t: np.ndarray, s: np.ndarray, positive: int) -> float:
    pairs = [(i, j) for i in range(len(t)) for j in range(len(t)) if t[i] > t[j]]
    return float(np.mean([np.log1p(np.exp(s[j] - s[i])) for i, j in pairs]))


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "listnet": listnet,
    "kl": kl,
    "margin_mse": margin_mse,
    "ranknet": ranknet,
    "mse": mse,
}


def expected(name: str, batch: ScoredBatch, teacher: Tensor, student: Tensor, temperature: float) -> float:
    """Mean over queries of an objective on the candidates that are not repeated."""
    values = []
    for b in range(B):
        kept = [j for j in range(N) if not batch.repeated[b, j]]
        t, s = (scores[b, kept].numpy() / temperature for scores in (teacher, student))
        values.append(FORMULAS[name](t, s, kept.index(int(batch.labels[b]))))
    return float(np.mean(values))


def build(**options: object) -> Distillation:
    return DistillationConfig(**({"temperature": TEMPERATURE} | options)).build()


def student_gradient(name: str, batch: ScoredBatch, scores: Tensor) -> Tensor:
    scores = scores.clone().requires_grad_()
    build(objective=name, list_weight=0.0)(replace(batch, compressed=scores))["compressed"].backward()
    return scores.grad


# --- objectives ---


def test_every_objective_has_a_formula_here() -> None:
    assert list(FORMULAS) == list(OBJECTIVES)


@every_objective
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_objective_is_its_formula_on_the_compressed_scores(
    name: str, seed: int, temperature: float
) -> None:
    batch = make_batch(seed)
    parts = build(objective=name, temperature=temperature)(batch)
    formula = expected(name, batch, batch.teacher, batch.compressed, temperature)
    assert parts["compressed"].item() == pytest.approx(formula, rel=1e-9)


@every_objective
@pytest.mark.parametrize("seed", SEEDS)
def test_repeated_documents_do_not_change_an_objective(name: str, seed: int) -> None:
    batch = make_batch(seed)
    changed = {side: getattr(batch, side) + 9.0 * batch.repeated for side in ("teacher", "compressed")}
    values = [build(objective=name)(b)["compressed"].item() for b in (batch, replace(batch, **changed))]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@every_objective
@pytest.mark.parametrize("seed", SEEDS)
def test_other_relevant_documents_are_candidates(name: str, seed: int) -> None:
    """The teacher ranks them: labels only say which documents must not be pushed down."""
    batch = make_batch(seed)
    blank = replace(batch, ignore=batch.repeated)
    assert build(objective=name)(batch)["compressed"] == build(objective=name)(blank)["compressed"]


@every_objective
@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_of_an_objective_is_its_finite_difference(name: str, seed: int) -> None:
    batch, step = make_batch(seed), 1e-6
    found = student_gradient(name, batch, batch.compressed)
    for cell in np.ndindex(B, N):
        shift = torch.zeros(B, N, dtype=torch.float64)
        shift[cell] = step
        values = [
            expected(name, batch, batch.teacher, batch.compressed + sign * shift, TEMPERATURE)
            for sign in (1, -1)
        ]
        assert found[cell].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)


@every_objective
def test_the_teacher_gets_no_gradient(name: str) -> None:
    batch = make_batch(0)
    teacher = batch.teacher.clone().requires_grad_()
    compressed = batch.compressed.clone().requires_grad_()
    build(objective=name)(replace(batch, teacher=teacher, compressed=compressed))["compressed"].backward()
    assert teacher.grad is None
    assert compressed.grad.any()


@pytest.mark.parametrize("name", ["listnet", "kl", "mse", "margin_mse"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_student_that_is_its_teacher_gets_no_gradient(name: str, seed: int) -> None:
    batch = make_batch(seed)
    assert student_gradient(name, batch, batch.teacher).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["listnet", "kl", "margin_mse"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_shift_of_all_scores_of_a_query_does_not_matter(name: str, seed: int) -> None:
    batch = make_batch(seed)
    shifted = replace(batch, compressed=batch.compressed + torch.arange(B)[:, None])
    values = [build(objective=name)(b)["compressed"].item() for b in (batch, shifted)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_is_listnet_less_the_entropy_of_the_teacher(seed: int) -> None:
    batch = make_batch(seed)
    values = {name: build(objective=name)(batch)["compressed"].item() for name in ("listnet", "kl")}
    entropy = expected("listnet", batch, batch.teacher, batch.teacher, TEMPERATURE)
    assert values["kl"] == pytest.approx(values["listnet"] - entropy, rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_and_listnet_have_one_gradient(seed: int) -> None:
    batch = make_batch(seed)
    gradients = [student_gradient(name, batch, batch.compressed) for name in ("kl", "listnet")]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
def test_ranknet_compares_only_the_teachers_best(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.losses.distillation.RANKNET_DEPTH", 4)
    batch = make_batch(seed)
    worst = batch.teacher.masked_fill(batch.repeated, float("-inf")).argsort(1, descending=True)[:, 4:]
    found = student_gradient("ranknet", batch, batch.compressed)
    assert not found.gather(1, worst).any()
    assert found.any()


# --- which scores are compared ---


def test_a_live_teacher_is_the_students_dense_score() -> None:
    batch = make_batch(0)
    parts = build(teacher="live")(replace(batch, teacher=None))
    formula = expected("listnet", batch, batch.dense, batch.compressed, TEMPERATURE)
    assert parts["compressed"].item() == pytest.approx(formula, rel=1e-9)


def test_a_live_teacher_gets_no_gradient() -> None:
    batch = make_batch(0)
    dense, compressed = (scores.clone().requires_grad_() for scores in (batch.dense, batch.compressed))
    sum(build(teacher="live")(replace(batch, dense=dense, compressed=compressed)).values()).backward()
    assert dense.grad is None


@pytest.mark.parametrize(("teacher", "needed"), [("frozen", True), ("live", False)])
def test_only_a_frozen_teacher_needs_a_copy_of_the_towers(teacher: str, needed: bool) -> None:
    assert DistillationConfig(teacher=teacher).needs_teacher == needed


@every_objective
def test_weights_multiply_their_parts(name: str) -> None:
    weights = {"compressed_weight": 0.5, "list_weight": 0.25, "dense_weight": 3.0, "label_weight": 2.0}
    batch = make_batch(0)
    parts = build(objective=name, **weights)(batch)
    assert list(parts) == ["compressed", "lists", "dense", "labels"]
    for part, side, weight in (
        ("compressed", "compressed", 0.5),
        ("lists", "coarse", 0.25),
        ("dense", "dense", 3.0),
    ):
        formula = weight * expected(name, batch, batch.teacher, getattr(batch, side), TEMPERATURE)
        assert parts[part].item() == pytest.approx(formula, rel=1e-6), part


def test_label_part_is_the_cross_entropy_of_the_compressed_scores() -> None:
    batch = make_batch(0)
    part = build(label_weight=2.0)(batch)["labels"].item()
    values = []
    for b in range(B):
        kept = [j for j in range(N) if not batch.ignore[b, j]]
        p = softmax(batch.compressed[b, kept].numpy() / TEMPERATURE)
        values.append(-np.log(p[kept.index(int(batch.labels[b]))]))
    assert part == pytest.approx(2 * np.mean(values), rel=1e-9)


def test_parts_of_weight_zero_are_left_out() -> None:
    assert list(build(list_weight=0.0)(make_batch(0))) == ["compressed"]
    assert list(build(compressed_weight=0.0, list_weight=1.0)(make_batch(0))) == ["lists"]


def test_a_head_without_lists_has_no_part_for_them() -> None:
    assert "lists" not in build()(replace(make_batch(0), coarse=None))


# --- the weight of the lists ---


@every_objective
@pytest.mark.parametrize("seed", SEEDS)
def test_list_weight_is_the_ratio_of_both_terms_in_the_first_batch(name: str, seed: int) -> None:
    batch, loss = make_batch(seed), build(objective=name)
    loss(batch)
    terms = [
        expected(name, batch, batch.teacher, side, TEMPERATURE) for side in (batch.compressed, batch.coarse)
    ]
    assert loss.list_weight.item() == pytest.approx(terms[0] / terms[1], rel=1e-6)


def test_both_terms_are_equal_in_the_first_batch() -> None:
    parts = build()(make_batch(0))
    assert parts["lists"].item() == pytest.approx(parts["compressed"].item(), rel=1e-6)


def test_list_weight_stays_after_the_first_batch() -> None:
    loss = build()
    loss(make_batch(0))
    first = loss.list_weight.item()
    loss(make_batch(1))
    assert loss.list_weight.item() == first


def test_list_weight_waits_for_the_heads_start() -> None:
    """Before it there are no lists."""
    loss = build()
    loss(replace(make_batch(0), coarse=None))
    assert bool(loss.list_weight.isnan())


def test_list_weight_is_a_number_without_gradient() -> None:
    loss, batch = build(), make_batch(0)
    coarse = batch.coarse.clone().requires_grad_()
    parts = loss(replace(batch, coarse=coarse))
    parts["lists"].backward()
    fixed = build(list_weight=loss.list_weight.item())
    other = batch.coarse.clone().requires_grad_()
    fixed(replace(batch, coarse=other))["lists"].backward()
    torch.testing.assert_close(coarse.grad, other.grad, rtol=1e-6, atol=0)


def test_list_weight_survives_saving() -> None:
    loss, restored = build(), build()
    loss(make_batch(0))
    restored.load_state_dict(loss.state_dict())
    restored(make_batch(1))
    assert torch.equal(restored.list_weight, loss.list_weight)


def test_a_given_list_weight_is_not_replaced() -> None:
    loss = build(list_weight=0.3)
    loss(make_batch(0))
    assert loss.list_weight.item() == pytest.approx(0.3)


# --- configuration ---


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"objective": "hinge"}, r"objective must be one of listnet, .*mse, got 'hinge'"),
        ({"teacher": "human"}, r"teacher must be frozen, live or given, got 'human'"),
        ({"temperature": 0.0}, r"temperature must be positive, got 0\.0"),
        ({"list_weight": -1.0}, r"list_weight must be zero or more, got -1\.0"),
        ({"compressed_weight": float("inf")}, r"compressed_weight must be zero or more, got inf"),
        ({"dense_weight": float("nan")}, r"dense_weight must be zero or more, got nan"),
        ({"label_weight": -0.5}, r"label_weight must be zero or more, got -0\.5"),
        ({"dense_weight": 1.0, "teacher": "live"}, r"dense_weight needs a frozen teacher"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name(options: dict[str, object], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        DistillationConfig(**options)

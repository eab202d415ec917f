"""Learned rotations stay rotations, turn the planes they should, and descend.

Oracles: finite differences in float64, all matchings by brute force, QR.

Shapes: n vectors, D dimensions, P = D // 2 disjoint pairs of coordinates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever import InputError
from retriever.heads import ProductQuantizerConfig
from retriever.transforms import ROTATIONS, Rotation
from retriever.transforms.rotations import greedy_pairs, random_pairs, steepest_pairs

D = 16
SEEDS = (0, 1, 2)
GIVENS = ("givens_random", "givens_greedy", "givens_steepest")
PAIRS = {"random": random_pairs, "greedy": greedy_pairs, "steepest": steepest_pairs}
LEARNED = tuple(name for name, cls in ROTATIONS.items() if cls.learned)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(dim: int, seed: int) -> Tensor:
    return torch.linalg.qr(rand(dim, dim, seed=seed)).Q


def deviation(matrix: Tensor) -> float:
    """Largest entry of A A^T - I, in float64."""
    matrix = matrix.detach().double()
    return (matrix @ matrix.T - torch.eye(len(matrix)).double()).abs().max().item()


def make_derivative(dim: int, seed: int) -> Tensor:
    """Return a random skew-symmetric matrix with no two equal entries."""
    values = rand(dim, dim, seed=seed)
    return values - values.T


def gain(derivative: Tensor, pairs: Tensor) -> float:
    """Sum of squared derivatives of the turned planes."""
    return sum(derivative[i, j].item() ** 2 for i, j in pairs.tolist())


def matchings(left: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Yield all partitions of an even number of coordinates into pairs."""
    if not left:
        yield []
        return
    for partner in left[1:]:
        rest = [i for i in left[1:] if i != partner]
        yield from ([(left[0], partner), *others] for others in matchings(rest))


def distortion(matrix: Tensor, x: Tensor, codewords: Tensor) -> Tensor:
    return (codewords - x @ matrix.T).square().sum(1).mean()


# --- every rotation ---


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_starts_as_the_identity(name: str) -> None:
    torch.testing.assert_close(ROTATIONS[name](D).matrix.detach(), torch.eye(D), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ROTATIONS)
def test_a_started_rotation_is_the_given_one(name: str, seed: int) -> None:
    rotation, start = ROTATIONS[name](D), orthonormal(D, seed)
    rotation.start(start)
    torch.testing.assert_close(rotation.matrix.detach(), start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_that_was_moved_starts_anew_at_the_given_one(name: str) -> None:
    rotation, start = ROTATIONS[name](D), orthonormal(D, 1)
    with torch.no_grad():
        for value in (*rotation.parameters(), *rotation.buffers()):
            if value.is_floating_point():
                value.add_(0.1 * rand(*value.shape, seed=2))
    rotation.start(start)
    torch.testing.assert_close(rotation.matrix.detach(), start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROTATIONS)
def test_only_learned_rotations_have_parameters(name: str) -> None:
    assert bool(list(ROTATIONS[name](D).parameters())) == ROTATIONS[name].learned


@pytest.mark.parametrize("name", LEARNED)
def test_a_gradient_on_the_matrix_reaches_the_parameters_of_a_learned_rotation(name: str) -> None:
    rotation = ROTATIONS[name](D)
    (rotation.matrix * rand(D, D, seed=0)).sum().backward()
    assert all(bool(p.grad.any()) for p in rotation.parameters())


@pytest.mark.parametrize("name", ROTATIONS)
def test_only_givens_rotations_are_moved_by_descend(name: str) -> None:
    manual = ROTATIONS[name](D).manual_parameters()
    assert [tuple(p.shape) for p in manual] == ([(D, D)] if name in GIVENS else [])


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_saved_rotation_is_loaded_with_the_same_matrix(name: str) -> None:
    rotation, loaded = ROTATIONS[name](D), ROTATIONS[name](D)
    rotation.start(orthonormal(D, 0))
    loaded.load_state_dict(rotation.state_dict())
    assert torch.equal(loaded.matrix, rotation.matrix)


# --- which planes are turned ---


@pytest.mark.parametrize("dim", [2, 6, 7, 16, 33])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_disjoint_and_leave_at_most_one_coordinate_alone(name: str, seed: int, dim: int) -> None:
    pairs = PAIRS[name](make_derivative(dim, seed), torch.Generator().manual_seed(seed))
    coordinates = pairs.flatten().tolist()
    assert pairs.shape == (dim // 2, 2)
    assert len(set(coordinates)) == len(coordinates)
    assert set(coordinates) <= set(range(dim))


@pytest.mark.parametrize("dim", [6, 7, 16])
@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_pairs_are_those_of_a_sorted_list(seed: int, dim: int) -> None:
    derivative = make_derivative(dim, seed)
    planes = sorted(itertools.combinations(range(dim), 2), key=lambda ij: -abs(derivative[ij].item()))
    expected: list[tuple[int, int]] = []
    for i, j in planes:
        if all(i not in pair and j not in pair for pair in expected):
            expected.append((i, j))
    found = greedy_pairs(derivative, torch.Generator())
    assert {frozenset(pair) for pair in found.tolist()} == {frozenset(pair) for pair in expected}


@pytest.mark.parametrize("seed", range(10))
def test_steepest_pairs_are_the_best_of_all_matchings(seed: int) -> None:
    derivative = make_derivative(6, seed)
    best = max(gain(derivative, torch.tensor(pairs)) for pairs in matchings(list(range(6))))
    assert gain(derivative, steepest_pairs(derivative, torch.Generator())) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_steepest_descends_at_least_as_much_as_greedy(seed: int) -> None:
    derivative, generator = make_derivative(D, seed), torch.Generator()
    steepest, greedy = (
        gain(derivative, pairs(derivative, generator)) for pairs in (steepest_pairs, greedy_pairs)
    )
    assert steepest >= greedy * (1 - 1e-6)


def test_steepest_is_better_than_greedy_where_the_greedy_choice_is_a_trap() -> None:
    """Planes (0, 1) and (2, 3) are worth 10^2 + 0; (0, 2) and (1, 3) 9^2 + 9^2."""
    derivative = torch.zeros(4, 4)
    for i, j, value in ((0, 1, 10.0), (0, 2, 9.0), (1, 3, -9.0)):
        derivative[i, j], derivative[j, i] = value, -value
    found = {frozenset(pair) for pair in steepest_pairs(derivative, torch.Generator()).tolist()}
    assert found == {frozenset((0, 2)), frozenset((1, 3))}


@pytest.mark.parametrize("seed", range(5))
def test_greedy_descends_more_than_a_random_choice_does_on_average(seed: int) -> None:
    derivative, generator = make_derivative(D, seed), torch.Generator().manual_seed(seed)
    random = [gain(derivative, random_pairs(derivative, generator)) for _ in range(50)]
    assert gain(derivative, greedy_pairs(derivative, generator)) > np.mean(random)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_one_seed_are_equal(name: str) -> None:
    derivative = make_derivative(D, 0)
    first, second = (PAIRS[name](derivative, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)


def test_random_pairs_of_another_seed_differ() -> None:
    derivative = make_derivative(D, 0)
    first, second = (random_pairs(derivative, torch.Generator().manual_seed(seed)) for seed in (5, 6))
    assert not torch.equal(first, second)


# --- Givens steps ---


def plane_rotation(dim: int, i: int, j: int, angle: float) -> Tensor:
    turn = torch.eye(dim, dtype=torch.float64)
    turn[i, i] = turn[j, j] = np.cos(angle)
    turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
    return turn


@pytest.mark.parametrize("seed", SEEDS)
def test_the_angle_of_a_plane_is_minus_step_times_its_finite_difference(seed: int) -> None:
    """A small step turns every plane (i, j) of A' A^T by -step dL/d(angle of that plane)."""
    step, small = 1e-3, 1e-5
    rotation = ROTATIONS["givens_greedy"](D).double()
    rotation.start(torch.linalg.qr(rand(D, D, seed=seed).double()).Q)
    before = rotation.matrix.detach().clone()
    x, codewords = rand(20, D, seed=seed + 10).double(), rand(20, D, seed=seed + 20).double()
    distortion(rotation.matrix, x, codewords).backward()
    rotation.descend(step, torch.Generator())
    turn = rotation.matrix.detach() @ before.T
    turned = [(i, j) for i, j in itertools.combinations(range(D), 2) if abs(turn[i, j]) > 1e-12]
    assert len(turned) == D // 2
    for i, j in turned:
        values = [
            distortion(plane_rotation(D, i, j, sign * small) @ before, x, codewords).item()
            for sign in (1, -1)
        ]
        derivative = (values[0] - values[1]) / (2 * small)
        angle = torch.atan2(turn[j, i], turn[i, i]).item()
        assert angle == pytest.approx(-step * derivative, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("name", GIVENS)
def test_no_plane_turns_more_than_a_quarter_turn(name: str) -> None:
    rotation = ROTATIONS[name](D)
    (rotation.matrix * rand(D, D, seed=0)).sum().backward()
    rotation.descend(1e6, torch.Generator().manual_seed(0))
    assert set(rotation.matrix.detach().round(decimals=5).abs().unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", GIVENS)
def test_a_givens_rotation_is_orthonormal_after_10000_updates(name: str, seed: int) -> None:
    dim = 6 if name == "givens_steepest" else D  # its matching is slow in Python
    rotation, generator = ROTATIONS[name](dim), torch.Generator().manual_seed(seed)
    gradients = torch.randn(50, dim, dim, generator=generator)
    for number in range(10_000 if seed == 0 or name == "givens_random" else 1_500):
        rotation.values.grad = gradients[number % 50]
        rotation.descend(0.5, generator)
    assert deviation(rotation.matrix) < 1e-4


@pytest.mark.parametrize("name", GIVENS)
def test_reorthonormalizing_hardly_changes_a_rotation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """QR fixes a matrix up to the signs of its columns; a wrong sign would be a jump of 2."""
    matrices = []
    for every in (1, 10_000):
        monkeypatch.setattr("retriever.transforms.rotations.REORTHONORMALIZE_EVERY", every)
        rotation, generator = ROTATIONS[name](D), torch.Generator().manual_seed(3)
        rotation.start(orthonormal(D, 3))
        for _ in range(20):
            rotation.values.grad = torch.randn(D, D, generator=generator)
            rotation.descend(0.1, generator)
        matrices.append(rotation.matrix.detach())
    torch.testing.assert_close(*matrices, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GIVENS)
def test_a_givens_rotation_keeps_the_determinant_of_its_start(name: str) -> None:
    rotation, generator = ROTATIONS[name](6), torch.Generator().manual_seed(1)
    for _ in range(1001):  # past a re-orthonormalization
        rotation.values.grad = torch.randn(6, 6, generator=generator)
        rotation.descend(0.3, generator)
    assert torch.linalg.det(rotation.matrix.detach().double()).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", GIVENS)
def test_distortion_never_rises_under_a_backtracking_step(name: str, seed: int) -> None:
    rotation = ROTATIONS[name](D).double()
    x = rand(100, D, seed=seed).double() @ torch.diag(torch.linspace(2, 0.1, D).double())
    codebooks = rand(4, 8, D // 4, seed=seed + 1).double()

    def quantize(matrix: Tensor) -> Tensor:
        z = (x @ matrix.T).view(100, 4, 1, -1)
        codes = (z - codebooks).square().sum(-1).argmin(-1)
        return codebooks[torch.arange(4), codes].flatten(1)

    values = []
    for _ in range(15):
        codewords, step = quantize(rotation.matrix.detach()), 0.1
        rotation.values.grad = None
        loss = distortion(rotation.matrix, x, codewords)
        loss.backward()
        values.append(loss.item())
        before = rotation.matrix.detach().clone()
        while True:
            planes = torch.Generator().manual_seed(seed)
            rotation.descend(step, planes)
            if distortion(rotation.matrix, x, codewords) <= loss or step < 1e-9:
                break
            rotation.start(before)
            step /= 2
        assert step >= 1e-9, "a descent direction has a step that descends"
    assert (np.diff(values) <= 1e-12).all()
    assert values[-1] < values[0]


@pytest.mark.parametrize("gradient", [None, float("nan"), float("inf")])
def test_a_givens_rotation_without_a_finite_gradient_stays(gradient: float | None) -> None:
    rotation, start = ROTATIONS["givens_greedy"](D), orthonormal(D, 0)
    rotation.start(start)
    rotation.values.grad = None if gradient is None else torch.full((D, D), gradient)
    rotation.descend(0.1, torch.Generator())
    assert torch.equal(rotation.matrix, start)


# --- Cayley and free ---


def train(rotation: Rotation, seed: int, lr: float = 0.05) -> None:
    optimizer = torch.optim.Adam(rotation.parameters(), lr=lr)
    x, codewords = rand(40, D, seed=seed), rand(40, D, seed=seed + 1)
    for _ in range(300):
        optimizer.zero_grad()
        distortion(rotation.matrix, x, codewords).backward()
        optimizer.step()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cayley_rotation_stays_orthonormal_under_adam(seed: int) -> None:
    rotation = ROTATIONS["cayley"](D)
    rotation.start(orthonormal(D, seed))
    train(rotation, seed)
    assert deviation(rotation.matrix) < 1e-4


def test_a_cayley_rotation_descends_under_adam() -> None:
    rotation = ROTATIONS["cayley"](D)
    x, codewords = rand(40, D, seed=0), rand(40, D, seed=1)
    before = distortion(rotation.matrix, x, codewords).item()
    train(rotation, 0)
    assert distortion(rotation.matrix, x, codewords).item() < before - 0.1


def test_a_free_rotation_leaves_the_orthogonal_group_under_adam() -> None:
    rotation = ROTATIONS["free"](D)
    train(rotation, 0)
    assert deviation(rotation.matrix) > 0.1


@pytest.mark.parametrize("name", ROTATIONS)
def test_what_a_class_says_of_orthonormality_is_what_training_does(name: str) -> None:
    """Whoever says `orthonormal` stays so under the optimizer that moves it."""
    rotation = ROTATIONS[name](D)
    rotation.start(orthonormal(D, 4))
    if name in GIVENS:
        rotation.values.grad = rand(D, D, seed=5)
        rotation.descend(0.2, torch.Generator().manual_seed(0))
    elif list(rotation.parameters()):
        train(rotation, 4)
    assert (deviation(rotation.matrix) < 1e-4) == rotation.orthonormal


def test_a_rotation_that_keeps_no_distances_is_refused_with_the_l2_metric() -> None:
    fault = r"rotation 'free' keeps no distances, so it needs metric inner_product, got 'l2'\. Set metric"
    with pytest.raises(InputError, match=fault):
        ProductQuantizerConfig(rotation="free", metric="l2")


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_rotation_that_nothing_teaches_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"rotation '{name}' learns nothing .* Set distortion_weight 1"):
        ProductQuantizerConfig(rotation=name, metric="inner_product", estimator="identity")

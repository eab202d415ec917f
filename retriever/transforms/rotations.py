"""Rotations in front of a quantizer: z = A x, with A fixed or learned on the orthogonal group.

Which sub-space of the rotated vector a codebook sees decides how much a product quantizer loses: choosing A is the
"space decomposition" of OPQ (Ge et al., 2013) and Poeem (arXiv:2105.03933).

Shapes: D dimensions, P = D // 2 disjoint pairs of coordinates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["ROTATIONS", "Rotation", "RotationName", "greedy_pairs", "random_pairs", "steepest_pairs"]

RotationName = Literal["none", "opq", "givens_random", "givens_greedy", "givens_steepest", "cayley", "free"]
REORTHONORMALIZE_EVERY = 1000  # updates; float32 drifts by about 1e-6 in as many


class Rotation(nn.Module, ABC):
    """A matrix A of z = A x, (D, D). It is the identity until `start`.

    Attributes:
        orthonormal: Whether A always is; if not, only inner products survive it.
        learned: Whether training moves A after `start`.
    """

    orthonormal: ClassVar[bool] = True
    learned: ClassVar[bool] = True

    @property
    @abstractmethod
    def matrix(self) -> Float[Tensor, "D D"]:
        """A, with a gradient path to what is learned."""

    @abstractmethod
    def start(self, matrix: Float[Tensor, "D D"]) -> None:
        """Set A to an orthonormal matrix."""

    def manual_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that `descend` moves instead of the optimizer."""
        return []

    def descend(self, step: float, generator: torch.Generator) -> None:
        """Move the manual parameters down their gradients; `step` is in radians per unit of gradient."""


class StoredRotation(Rotation, ABC):
    """A rotation whose entries are stored as they are, in `values`."""

    values: Tensor

    @property
    def matrix(self) -> Float[Tensor, "D D"]:
        """A."""
        return self.values

    @torch.no_grad()
    def start(self, matrix: Float[Tensor, "D D"]) -> None:
        """Set A."""
        self.values.copy_(matrix)


class FixedRotation(StoredRotation):
    """A rotation that training leaves as it starts: none, or OPQ's."""

    learned = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.eye(dim))


class FreeRotation(StoredRotation):
    """An unconstrained matrix that starts as a rotation, as Poeem was released. It drifts off the orthogonal group."""

    orthonormal = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.eye(dim))


class CayleyRotation(Rotation):
    """A = A0 (I - W)^-1 (I + W) with W skew-symmetric, by torch's parametrization."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = orthogonal(nn.Linear(dim, dim, bias=False), orthogonal_map="cayley")
        self.start(torch.eye(dim))

    @property
    def matrix(self) -> Float[Tensor, "D D"]:
        """A; costs a linear solve of D^3."""
        weight = self.linear.weight
        assert isinstance(weight, Tensor), "a parametrized weight is a tensor"
        return weight

    @torch.no_grad()
    def start(self, matrix: Float[Tensor, "D D"]) -> None:
        """Set A0, with W = 0."""
        self.linear.weight = matrix.to(self.matrix)


class GivensRotation(StoredRotation, ABC):
    """Givens coordinate descent on SO(D) (Jiang et al., ICLR 2022, arXiv:2203.05082).

    A step turns D // 2 disjoint coordinate planes at once, each by its own derivative: the turns commute, and the
    product of rotations is a rotation. With G the gradient of the loss by A and S = G A^T, the derivative by the
    angle of plane (i, j) is S_ji - S_ij.
    """

    updates: Tensor

    @staticmethod
    @abstractmethod
    def pairs(derivative: Float[Tensor, "D D"], generator: torch.Generator) -> Int[Tensor, "P 2"]:
        """Return disjoint planes to turn, given the derivative by the angle of each plane."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.eye(dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def manual_parameters(self) -> list[nn.Parameter]:
        """Return A."""
        assert isinstance(self.values, nn.Parameter), "made so"
        return [self.values]

    @torch.no_grad()
    def descend(self, step: float, generator: torch.Generator) -> None:
        """Turn disjoint planes by -step times the derivative, at most a quarter turn; nothing without a gradient."""
        gradient = self.values.grad
        if gradient is None or not bool(gradient.isfinite().all()):
            return
        product = gradient @ self.values.T
        derivative = product.T - product  # [i, j]: of the angle of plane (i, j)
        i, j = self.pairs(derivative, generator).to(gradient.device).unbind(1)
        angle = (-step * derivative[i, j]).clamp(-torch.pi / 2, torch.pi / 2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        rows_i, rows_j = self.values[i], self.values[j]
        self.values[i] = cos * rows_i - sin * rows_j
        self.values[j] = sin * rows_i + cos * rows_j
        self.updates += 1
        if int(self.updates) % REORTHONORMALIZE_EVERY == 0:
            q, r = torch.linalg.qr(self.values)
            self.values.copy_(q * r.diagonal().sign())


def random_pairs(derivative: Float[Tensor, "D D"], generator: torch.Generator) -> Int[Tensor, "P 2"]:
    """Pair the coordinates at random."""
    dim = len(derivative)
    return torch.randperm(dim, generator=generator)[: dim // 2 * 2].view(-1, 2)


def greedy_pairs(derivative: Float[Tensor, "D D"], generator: torch.Generator) -> Int[Tensor, "P 2"]:
    """Take the planes in falling order of |derivative|, as long as they share no coordinate with those taken."""
    dim = len(derivative)
    upper = torch.triu_indices(dim, dim, 1)
    order = derivative.abs().cpu()[upper[0], upper[1]].argsort(descending=True, stable=True)
    free, taken = [True] * dim, []
    for i, j in upper[:, order].T.tolist():
        if free[i] and free[j]:
            free[i] = free[j] = False
            taken.append((i, j))
            if len(taken) == dim // 2:
                break
    return torch.tensor(taken).view(-1, 2)


def steepest_pairs(derivative: Float[Tensor, "D D"], generator: torch.Generator) -> Int[Tensor, "P 2"]:
    """Return the disjoint planes with the largest sum of squared derivatives: a maximum-weight matching.

    Exact by networkx's blossom algorithm, which costs O(D^3) in Python: for D of about 100 at most.
    """
    import networkx

    weights = derivative.square().cpu()
    graph = networkx.from_numpy_array(weights.numpy())
    matching = networkx.max_weight_matching(graph, maxcardinality=True)
    return torch.tensor(sorted(matching)).view(-1, 2)


class GivensRandom(GivensRotation):
    """Planes at random: the cheapest step."""

    @staticmethod
    def pairs(derivative: Float[Tensor, "D D"], generator: torch.Generator) -> Int[Tensor, "P 2"]:
        """Return the planes of `random_pairs`."""
        return random_pairs(derivative, generator)


class GivensGreedy(GivensRotation):
    """Planes of the largest derivatives first: close to the steepest at a small part of its cost."""

    @staticmethod
    def pairs(derivative: Float[Tensor, "D D"], generator: torch.Generator) -> Int[Tensor, "P 2"]:
        """Return the planes of `greedy_pairs`."""
        return greedy_pairs(derivative, generator)


class GivensSteepest(GivensRotation):
    """Planes of the steepest descent among all sets of disjoint planes."""

    @staticmethod
    def pairs(derivative: Float[Tensor, "D D"], generator: torch.Generator) -> Int[Tensor, "P 2"]:
        """Return the planes of `steepest_pairs`."""
        return steepest_pairs(derivative, generator)


ROTATIONS: dict[str, type[Rotation]] = {
    "none": FixedRotation,
    "opq": FixedRotation,
    "givens_random": GivensRandom,
    "givens_greedy": GivensGreedy,
    "givens_steepest": GivensSteepest,
    "cayley": CayleyRotation,
    "free": FreeRotation,
}
assert tuple(ROTATIONS) == get_args(RotationName), "the type names what the registry holds"

"""Selection functions: how well a codeword fits a sub-vector (MoPQ, arXiv:2104.07858, section 3 and release).

The codeword with the highest score is chosen. Only `l2` chooses what FAISS's own encoder would; since Endex hands
over codes, and not vectors to be encoded again, every one of them can be exported.

Shapes: N vectors, M codebooks, K codewords, S sub-dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["SELECTIONS", "Selection", "SelectionName"]

SelectionName = Literal["l2", "inner_product", "cosine", "bilinear", "mlp", "sub_mlp", "mix", "dpq"]


class Selection(nn.Module, ABC):
    """Scores of all codewords for sub-vectors.

    Attributes:
        by_codewords: Whether the scores look at the codewords, and not only at parameters of their own.

    Args:
        num_codebooks: M.
        codewords: K.
        width: S.
    """

    by_codewords: ClassVar[bool] = True

    def __init__(self, num_codebooks: int, codewords: int, width: int) -> None:
        super().__init__()
        self.shape = (num_codebooks, codewords, width)

    @abstractmethod
    def forward(self, z: Float[Tensor, "N M S"], codebooks: Float[Tensor, "M K S"]) -> Float[Tensor, "N M K"]:
        """Return the scores; higher fits better."""

    @torch.no_grad()
    def choose(self, z: Float[Tensor, "N M S"], codebooks: Float[Tensor, "M K S"]) -> Int[Tensor, "N M"]:
        """Return the codes of the highest scores."""
        return self(z, codebooks).argmax(-1)  # type: ignore[no-any-return]

    def start(self, codebooks: Float[Tensor, "M K S"]) -> None:
        """Set starting values from fitted codebooks."""


class L2Selection(Selection):
    """-||z - c||^2, the default of MoPQ and what k-means minimizes."""

    def forward(self, z: Float[Tensor, "N M S"], codebooks: Float[Tensor, "M K S"]) -> Float[Tensor, "N M K"]:
        """Return negative squared distances."""
        products = torch.einsum("nms,mks->nmk", z, codebooks)
        return 2 * products - z.square().sum(-1, keepdim=True) - codebooks.square().sum(-1)

    @torch.no_grad()
    def choose(self, z: Float[Tensor, "N M S"], codebooks: Float[Tensor, "M K S"]) -> Int[Tensor, "N M"]:
        """Return the nearest codewords: the score without ||z||^2, in one pass over the (M, N, K) table."""
        squares = codebooks.square().sum(-1)[:, None]
        scores = torch.baddbmm(-squares, z.transpose(0, 1), codebooks.transpose(1, 2), alpha=2)
        return scores.argmax(-1).T


class InnerProductSelection(Selection):
    """z . c."""

    def forward(self, z: Float[Tensor, "N M S"], codebooks: Float[Tensor, "M K S"]) -> Float[Tensor, "N M K"]:
        """Return inner products."""
        return torch.einsum("nms,mks->nmk", z, codebooks)


class CosineSelection(Selection):
    """z . c / (||z|| ||c||)."""

    def forward(self, z: Float[Tensor, "N M S"], codebooks: Float[Tensor, "M K S"]) -> Float[Tensor, "N M K"]:
        """Return cosines."""
        return torch.einsum("nms,mks->nmk", F.normalize(z, dim=-1), F.normalize(codebooks, dim=-1))


class BilinearSelection(Selection):
    """z W c with one (S, S) matrix a codebook, from the identity."""

    def __init__(self, num_codebooks: int, codewords: int, width: int) -> None:
        super().__init__(num_codebooks, codewords, width)
        self.weight = nn.Parameter(torch.eye(width).repeat(num_codebooks, 1, 1))

    def forward(self, z: Float[Tensor, "N M S"], codebooks: Float[Tensor, "M K S"]) -> Float[Tensor, "N M K"]:
        """Return bilinear products."""
        return torch.einsum("nms,mst,mkt->nmk", z, self.weight, codebooks)


class MLPSelection(Selection):
    """relu(W z + b) of the whole vector: logits that do not look at the codewords."""

    by_codewords = False

    def __init__(self, num_codebooks: int, codewords: int, width: int) -> None:
        super().__init__(num_codebooks, codewords, width)
        self.linear = nn.Linear(num_codebooks * width, num_codebooks * codewords)

    def forward(self, z: Float[Tensor, "N M S"], codebooks: Float[Tensor, "M K S"]) -> Float[Tensor, "N M K"]:
        """Return the logits."""
        return F.relu(self.linear(z.flatten(1))).view(len(z), *self.shape[:2])


class SubMLPSelection(Selection):
    """relu(W_m z_m + b_m), one layer a codebook; starts as the affine part of the L2 score."""

    by_codewords = False

    def __init__(self, num_codebooks: int, codewords: int, width: int) -> None:
        super().__init__(num_codebooks, codewords, width)
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(self.shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(self.shape[:2]))

    def forward(self, z: Float[Tensor, "N M S"], codebooks: Float[Tensor, "M K S"]) -> Float[Tensor, "N M K"]:
        """Return the logits."""
        return F.relu(torch.einsum("nms,mks->nmk", z, self.weight) + self.bias)

    @torch.no_grad()
    def start(self, codebooks: Float[Tensor, "M K S"]) -> None:
        """Set W = 2 C and b = max ||c||^2 - ||c||^2: the order of the L2 score wherever the logit is positive."""
        squares = codebooks.square().sum(-1)
        self.weight.copy_(2 * codebooks)
        self.bias.copy_(squares.amax(1, keepdim=True) - squares)


class MixSelection(Selection):
    """One linear map of [z * c ; (z - c)^2] a codebook; starts as the L2 score."""

    def __init__(self, num_codebooks: int, codewords: int, width: int) -> None:
        super().__init__(num_codebooks, codewords, width)
        self.product = nn.Parameter(torch.zeros(num_codebooks, width))
        self.distance = nn.Parameter(-torch.ones(num_codebooks, width))

    def forward(self, z: Float[Tensor, "N M S"], codebooks: Float[Tensor, "M K S"]) -> Float[Tensor, "N M K"]:
        """Return product . (z * c) + distance . (z - c)^2."""
        mixed = self.product - 2 * self.distance  # both terms in one product of z and c
        cross = torch.einsum("nms,mks->nmk", z * mixed, codebooks)
        squares = (self.distance[:, None] * codebooks.square()).sum(-1)
        return cross + squares + (self.distance * z.square()).sum(-1, keepdim=True)


class DPQSelection(Selection):
    """z . key with a table of keys beside the codewords (DPQ-SX, Chen et al., ICML 2020); keys start as codewords."""

    by_codewords = False

    def __init__(self, num_codebooks: int, codewords: int, width: int) -> None:
        super().__init__(num_codebooks, codewords, width)
        self.keys = nn.Parameter(torch.empty(self.shape).uniform_(-1, 1))

    def forward(self, z: Float[Tensor, "N M S"], codebooks: Float[Tensor, "M K S"]) -> Float[Tensor, "N M K"]:
        """Return inner products with the keys."""
        return torch.einsum("nms,mks->nmk", z, self.keys)

    @torch.no_grad()
    def start(self, codebooks: Float[Tensor, "M K S"]) -> None:
        """Set the keys to the codewords."""
        self.keys.copy_(codebooks)


SELECTIONS: dict[str, type[Selection]] = {
    "l2": L2Selection,
    "inner_product": InnerProductSelection,
    "cosine": CosineSelection,
    "bilinear": BilinearSelection,
    "mlp": MLPSelection,
    "sub_mlp": SubMLPSelection,
    "mix": MixSelection,
    "dpq": DPQSelection,
}
assert tuple(SELECTIONS) == get_args(SelectionName), "the type names what the registry holds"

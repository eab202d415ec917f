"""CNT: the compression network of CCST (Zhang et al., ECCV 2022, arXiv:2107.14415), from D to t dimensions.

A vector becomes T tokens, a wide random projection of it, and one more, the compression token. Two stages of attention
and perceptron collect the tokens in that last one, which a linear skip of the vector is added to, three times in all.

Shapes: B vectors, D dimensions, T tokens, t = e D / T dimensions of a token and of the output, N = T + 1, C channels.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retriever.transforms.batch_norm import BatchNorm

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["CompressionNetwork", "sparse_projection"]

HEADS = 4  # of the attention
STAGES = 2


class CompressionNetwork(nn.Module):
    """The network. In training mode batch normalization uses the statistics of the batch, of all processes.

    Args:
        dim: D.
        expansion: e.
        tokens: T; divides e D, and t is a multiple of 4.
        mlp_ratio: Width of the perceptrons as a multiple of t.
    """

    def __init__(self, dim: int, *, expansion: int, tokens: int, mlp_ratio: int = 1) -> None:
        super().__init__()
        self.tokens, self.width = tokens, dim * expansion // tokens
        self.embed = LinearNorm(dim, dim * expansion, bias=True)
        self.compress = nn.Linear(dim, self.width, bias=False)
        self.compress_norm = BatchNorm(self.width)
        self.skip = nn.Linear(dim, self.width, bias=False)
        self.stages = nn.ModuleList(Stage(self.width, tokens + 1, mlp_ratio) for _ in range(STAGES))
        self.out = nn.Linear(self.width, self.width, bias=False)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B t"]:
        """Return the compressed vectors."""
        tokens = self.embed(x).view(len(x), self.tokens, self.width)
        last = self.compress_norm(F.hardswish(self.compress(x)))
        skip = self.skip(x)
        z = torch.cat([tokens, last[:, None]], 1)  # (B, N, t)
        for stage in self.stages:
            z = stage(z)
            z = torch.cat([z[:, :-1], (z[:, -1] + skip)[:, None]], 1)
        return cast(Tensor, self.out(z[:, -1] + skip))

    @torch.no_grad()
    def start_sparse(self, generator: torch.Generator) -> None:
        """Start the expansion as a very sparse random projection, as published."""
        weight = self.embed.linear.weight
        weight.copy_(sparse_projection(weight.shape[0], weight.shape[1], self.width, generator))

    @torch.no_grad()
    def start_principal(self, sample: Float[Tensor, "n D"]) -> None:
        """Start as PCA, which every branch then improves on: our addition.

        The skip holds the t principal directions of the sample, every branch begins with 0.
        """
        centred = (sample - sample.mean(0)).double()
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        directions = vectors[:, -self.width :].flip(1).T  # (t, D), largest variance first
        self.skip.weight.copy_(directions / (STAGES + 1))  # the skip enters so often
        nn.init.eye_(self.out.weight)
        for norm in (self.compress_norm, *(cast(Stage, stage).mlp.norm for stage in self.stages)):
            nn.init.zeros_(norm.weight)

    def folded(self) -> CompressionNetwork:
        """Return a copy for inference, without batch normalization; it does not train.

        Norms behind a linear layer become part of it. Those behind an activation feed a residual sum, not a linear
        layer, so they become a product and a sum of their own.
        """
        network = copy.deepcopy(self)
        parents = list(network.modules())
        for parent in parents:
            for name, child in parent.named_children():
                if isinstance(child, LinearNorm | BatchNorm):
                    setattr(parent, name, child.folded())
        return network.requires_grad_(False).eval()


class Stage(nn.Module):
    """z <- z + attention(z); z <- z + perceptron(z)."""

    def __init__(self, width: int, tokens: int, mlp_ratio: int) -> None:
        super().__init__()
        self.attention = Attention(width, tokens)
        self.mlp = Perceptron(width, mlp_ratio * width)

    def forward(self, z: Float[Tensor, "B N t"]) -> Float[Tensor, "B N t"]:
        """Return the tokens after both branches."""
        z = z + self.attention(z)
        return cast(Tensor, z + self.mlp(z))


class Attention(nn.Module):
    """Attention of every token to every token with a learned bias; values are as wide as the token in each head.

    It begins as 0, because the weight of its last norm does.
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.width, self.key_width = width, width // HEADS
        self.qkv = LinearNorm(width, HEADS * (2 * self.key_width + width))
        self.position_bias = nn.Parameter(torch.randn(HEADS, tokens, tokens))  # P, N(0, 1)
        self.project = LinearNorm(HEADS * width, width)
        nn.init.zeros_(self.project.norm.weight)

    def forward(self, z: Float[Tensor, "B N t"]) -> Float[Tensor, "B N t"]:
        """Return softmax(q k^T / sqrt(t / 4) + P) v, all heads joined and projected."""
        parts = self.qkv(z).unflatten(2, (HEADS, -1)).transpose(1, 2)  # (B, heads, N, 2 t / 4 + t)
        q, k, v = parts.split([self.key_width, self.key_width, self.width], dim=-1)
        weights = (q @ k.transpose(-1, -2) / self.key_width**0.5 + self.position_bias).softmax(-1)
        joined = (weights @ v).transpose(1, 2).flatten(2)  # (B, N, heads t)
        return cast(Tensor, self.project(F.hardtanh(joined)))


class Perceptron(nn.Module):
    """Two linear layers; the activation stands behind the second only."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = LinearNorm(width, hidden)
        self.second = nn.Linear(hidden, width)
        self.norm = BatchNorm(width)

    def forward(self, z: Float[Tensor, "B N t"]) -> Float[Tensor, "B N t"]:
        """Return BN(hardswish(second(BN(first(z)))))."""
        return cast(Tensor, self.norm(F.hardswish(self.second(self.first(z)))))


class LinearNorm(nn.Module):
    """A linear layer with batch normalization behind it."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """Return BN(W x + b)."""
        return cast(Tensor, self.norm(self.linear(x)))

    def folded(self) -> nn.Linear:
        """Return the linear layer that gives the same in inference."""
        scale, shift = self.norm.affine()
        layer = nn.Linear(self.linear.in_features, self.linear.out_features).to(scale)
        with torch.no_grad():
            layer.weight.copy_(self.linear.weight * scale[:, None])
            layer.bias.copy_(shift if self.linear.bias is None else shift + scale * self.linear.bias)
        return layer


def sparse_projection(
    rows: int, dim: int, width: int, generator: torch.Generator
) -> Float[Tensor, "rows dim"]:
    """Return a very sparse random projection (Li et al., KDD 2006) to tokens of `width` dimensions.

    With s = sqrt(dim), an entry is +sqrt(s / width) or -sqrt(s / width), each with probability 1 / (2 s), else 0.
    """
    s = math.sqrt(dim)
    draw = torch.rand(rows, dim, generator=generator)
    signs = (draw < 1 / (2 * s)).float() - (draw > 1 - 1 / (2 * s)).float()
    return signs * math.sqrt(s / width)

"""The network that moves a codeword by what is reconstructed already: one step of QINCo and QINCo2.

    u = P_in c;  u <- u + W [u ; context] + b;  L times u <- u + V relu(U u);  f(c, context) = u, or c + P_out u

The concatenation is linear, so W [u ; context] = W_u u + W_x context: the first half depends on the codeword alone,
the second on the vector alone. So does, by linearity, what the first U sees. `StepTable` holds the codewords' halves.

Shapes: N rows, D dimensions, E width of the network, H hidden units, K codewords, L residual blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["NetworkStart", "ResidualBlock", "StepNetwork", "StepTable"]

NetworkStart = Literal["zero", "random"]
"""Starting values: "zero" makes f(c, context) = c, the residual quantizer; "random" is PyTorch's."""


class ResidualBlock(nn.Module):
    """u + V relu(U u), without biases.

    Args:
        width: E.
        hidden: H.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)  # U
        self.down = nn.Linear(hidden, width, bias=False)  # V

    def forward(self, u: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
        """Return the sum."""
        return u + self.down(F.relu(self.up(u)))  # type: ignore[no-any-return]


class LowRankLinear(nn.Module):
    """A linear map without bias whose weight is a product of two (QINCo-LR).

    Args:
        inputs: Inputs.
        outputs: Outputs.
        rank: Of the weight.
    """

    bias: None = None

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, rank, bias=False)
        self.leave = nn.Linear(rank, outputs, bias=False)

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """The product."""
        return self.leave.weight @ self.enter.weight

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """Return the image, by way of `rank` numbers."""
        return self.leave(self.enter(x))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class StepTable:
    """The codewords' halves of a step.

    Attributes:
        base: P_in c + W_u P_in c + b, (K, E).
        hidden: U base of the first residual block, (K, H).
    """

    base: Float[Tensor, "K E"]
    hidden: Float[Tensor, "K H"]


class StepNetwork(nn.Module):
    """f(c, context).

    Args:
        dim: D.
        num_blocks: L, at least 1.
        hidden: H.
        width: E; projections to and from it where it is not D (QINCo2).
        concat_rank: Rank of W, which then is a product of two matrices without bias (QINCo-LR); None is a full W.
        start: Starting values.
        zero_output: Let P_out start from 0 although `start` is "random".
    """

    def __init__(
        self,
        dim: int,
        *,
        num_blocks: int,
        hidden: int,
        width: int | None = None,
        concat_rank: int | None = None,
        start: NetworkStart = "zero",
        zero_output: bool = True,
    ) -> None:
        super().__init__()
        width = width or dim
        self.project_in = nn.Linear(dim, width, bias=False) if width != dim else None
        self.concat: nn.Linear | LowRankLinear = (
            nn.Linear(width + dim, width)
            if concat_rank is None
            else LowRankLinear(width + dim, width, concat_rank)
        )
        self.blocks = nn.ModuleList(ResidualBlock(width, hidden) for _ in range(num_blocks))
        self.project_out = nn.Linear(width, dim, bias=False) if width != dim else None
        self._start(start, zero_output)

    @torch.no_grad()
    def _start(self, start: NetworkStart, zero_output: bool) -> None:
        if self.project_in is not None:
            nn.init.kaiming_uniform_(self.project_in.weight, nonlinearity="linear")
        if self.project_out is not None and zero_output:
            nn.init.zeros_(self.project_out.weight)
        if start == "zero":
            last = self.concat.leave if isinstance(self.concat, LowRankLinear) else self.concat
            for parameter in last.parameters():
                parameter.zero_()
            for block in self.residual_blocks:
                block.down.weight.zero_()

    @property
    def residual_blocks(self) -> list[ResidualBlock]:
        """The L blocks in their order."""
        return [block for block in self.blocks if isinstance(block, ResidualBlock)]

    def forward(self, codewords: Float[Tensor, "N D"], context: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Return f(c, context), row by row."""
        u = codewords if self.project_in is None else self.project_in(codewords)
        u = u + self.concat(torch.cat([u, context], -1))
        for block in self.residual_blocks:
            u = block(u)
        return self.leave(codewords, u)

    def leave(self, codewords: Float[Tensor, "... D"], u: Float[Tensor, "... E"]) -> Float[Tensor, "... D"]:
        """Return what the step adds to a reconstruction, from what the last block returned."""
        # without projections c is in u already; adding it once more would start from 2 c
        return u if self.project_out is None else codewords + self.project_out(u)

    def table(self, codewords: Float[Tensor, "K D"]) -> StepTable:
        """Return the halves that depend on codewords alone."""
        u = codewords if self.project_in is None else self.project_in(codewords)
        base = u + F.linear(u, self.concat.weight[:, : u.shape[1]], self.concat.bias)
        return StepTable(base, self.residual_blocks[0].up(base))

    def context_half(self, context: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """Return W_x context, the half that depends on the vector alone."""
        return F.linear(context, self.concat.weight[:, -context.shape[-1] :])

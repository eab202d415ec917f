"""QINCo: a residual quantizer whose codewords depend on the reconstruction so far (Huijben et al., arXiv:2401.14732).

    f_m(c, x^(m-1)):  u = c + W [c ; x^(m-1)] + b;  L times u <- u + V relu(U u)

Written from the paper's equations.

Shapes: N vectors, D dimensions, M codebooks, K = 2**bits codewords.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from retriever.errors import InputError
from retriever.heads.checks import check_choices
from retriever.heads.greedy_search import GreedyStep, Memory, greedy_codes
from retriever.heads.neural import NeuralQuantizer, NeuralQuantizerConfig
from retriever.heads.step_network import NetworkStart, StepNetwork

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["QINCo", "QINCoConfig"]


@dataclass(frozen=True, kw_only=True)
class QINCoConfig(NeuralQuantizerConfig):
    """Size and training of a `QINCo`.

    Attributes:
        num_blocks: L, residual blocks of a step; the paper has 2 to 16.
        hidden: Hidden units of a block.
        concat_rank: Rank of W, without b (QINCo-LR; its paper takes `hidden`); None for a full W.
        network_start: "zero" starts as the residual quantizer that the codebooks come from; "random" is the paper's.
    """

    name: ClassVar[str] = "qinco"

    num_blocks: int = 2
    hidden: int = 256
    concat_rank: int | None = None
    network_start: NetworkStart = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"network_start": NetworkStart})
        for name in ("num_blocks", "hidden", "concat_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")

    def build(self, dim: int) -> QINCo:
        """Return the head for vectors of `dim` dimensions."""
        return QINCo(self, dim)

    def build_network(self, dim: int) -> StepNetwork:
        """Return the network of a step."""
        return StepNetwork(
            dim,
            num_blocks=self.num_blocks,
            hidden=self.hidden,
            concat_rank=self.concat_rank,
            start=self.network_start,
        )


class QINCo(NeuralQuantizer):
    """Greedy: every step takes the best of all its codewords.

    Parameters: M K D + (M - 1) (2 D^2 + D + 2 L D H) without lists. FAISS holds it as `IndexQINCo`, in memory.
    """

    _config: QINCoConfig

    def __init__(self, config: QINCoConfig, dim: int) -> None:
        super().__init__(config, dim)

    @property
    def config(self) -> QINCoConfig:
        """The configuration that built this head."""
        return self._config

    def _choose(
        self, z: Float[Tensor, "N D"], starts: Float[Tensor, "J D"], lists: Int[Tensor, " N"]
    ) -> Int[Tensor, "N M"]:
        """Return the best of all codewords of every step."""
        memory = Memory()
        steps = [GreedyStep(words, self.network(place), memory) for place, words in enumerate(self.codebooks)]
        return greedy_codes(z, starts, lists, steps)

    def _standardization(self, sample: Float[Tensor, "n D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, ""]]:
        """Return no offset, and the largest absolute component."""
        return sample.new_zeros(self.dim), sample.abs().max()

"""CNT head: a compression network in front of an index or of another head (CCST, arXiv:2107.14415).

Queries and documents pass through one network to fewer dimensions, where they are compared by L2. What comes out is
stored as it is, or compressed by an inner head, all trained as one model.

Shapes: N documents, B queries, D dimensions, E = D expansion / tokens dimensions of the network's output, M codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from retriever.errors import InputError
from retriever.heads.base import HeadOutput, QuantizerFit
from retriever.heads.mapping import MappingHead, MappingHeadConfig
from retriever.heads.pieces import at_once
from retriever.transforms.batch_norm import calibrate
from retriever.transforms.cnt import CompressionNetwork

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["CNT", "CNTConfig"]

StartName = Literal["sparse", "pca"]
ROWS_AT_ONCE = 1024  # vectors mapped at once in inference: bounds the (rows, tokens + 1, 6 E) activations
CALIBRATION = 4096  # vectors of the warm start whose statistics batch normalization begins with


@dataclass(frozen=True, kw_only=True)
class CNTConfig(MappingHeadConfig):
    """Size of a `CNT`, and the head behind it.

    Attributes:
        expansion: Width of the first projection as a multiple of D. Published: 4 with 8 tokens halves the dimension,
            3 with 12 tokens makes it a quarter.
        tokens: Parts of that projection; the output has D expansion / tokens dimensions, a multiple of 4.
        mlp_ratio: Width of the perceptrons' hidden layer as a multiple of the output dimension.
        start: "sparse" is the published start, a very sparse random projection; "pca" begins as the principal
            components of live vectors, from which the network goes on (ours).
    """

    name: ClassVar[str] = "cnt"

    expansion: int = 4
    tokens: int = 8
    mlp_ratio: int = 1
    start: StartName = "pca"

    def __post_init__(self) -> None:
        for name in ("expansion", "tokens", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.expansion > self.tokens:
            raise InputError(
                f"expansion must not be larger than tokens, or the output has more dimensions than the input, got "
                f"{self.expansion} and {self.tokens}."
            )
        if self.start not in get_args(StartName):
            raise InputError(f"start must be one of {', '.join(get_args(StartName))}, got {self.start!r}.")
        super().__post_init__()

    def out_dim(self, dim: int) -> int:
        """Return E for vectors of `dim` dimensions."""
        return dim * self.expansion // self.tokens

    def check(self, dim: int) -> None:
        """Raise InputError unless the output has a multiple of 4 dimensions, which the inner head can compress."""
        if dim * self.expansion % (4 * self.tokens):
            fitting = [t for t in range(self.expansion, 4 * dim) if dim * self.expansion % (4 * t) == 0]
            remedy = (
                f"Try tokens={min(fitting, key=lambda t: abs(t - self.tokens))}."
                if fitting
                else "Choose another dimension."
            )
            raise InputError(
                f"dimension x expansion must be a multiple of 4 x tokens, got dim={dim}, expansion={self.expansion} "
                f"and tokens={self.tokens}. {remedy}"
            )
        super().check(dim)

    def build(self, dim: int) -> CNT:
        """Return the head for vectors of `dim` dimensions."""
        return CNT(self, dim)


class CNT(MappingHead):
    """y = network((x - mean) / deviation) deviation, then the inner head.

    Mean and deviation are one number each, of all components of the warm start's vectors; multiplying by the deviation
    again leaves distances, and so scores, in the units of the towers. Exports what the inner head exports, of E
    dimensions; the index folder's `head/` holds the network for queries.

    In evaluation mode the batch norms are folded into the linear layers, and the network's weights get no gradient.

    Args:
        config: Size of the network, its start, the inner head.
        dim: Dimension D of the vectors.

    Raises:
        InputError: If D does not fit `config`, or the inner head's metric is not l2.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: CNTConfig, dim: int) -> None:
        super().__init__(config, dim)
        self._config = config
        self.network = CompressionNetwork(
            dim, expansion=config.expansion, tokens=config.tokens, mlp_ratio=config.mlp_ratio
        )
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))
        self._folded: list[CompressionNetwork] = []  # at most one; a list, so that it is no part of the state
        self.register_load_state_dict_post_hook(lambda module, _: module._folded.clear())  # type: ignore[no-untyped-call]

    @property
    def config(self) -> CNTConfig:
        """The configuration that built this head."""
        return self._config

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what was folded for inference is then no longer valid."""
        self._folded.clear()
        return super().train(mode)

    def compress_batch(
        self, documents: Float[Tensor, "N D"], queries: Float[Tensor, "B D"]
    ) -> tuple[HeadOutput, Float[Tensor, "B E"]]:
        """Map documents and queries as one batch, so that both are normalized by the same statistics.

        Where each document is its own query, as in training on vectors alone, it is mapped once.
        """
        if documents.shape == queries.shape and torch.equal(documents, queries):
            y = self._map(documents)
            return self._compress(y), y
        y = self._map(torch.cat([documents.float(), queries.float()]))
        return self._compress(y[: len(documents)]), y[len(documents) :]

    def map_queries(self, queries: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        """Return queries as the network in evaluation mode maps them."""
        return self._infer(queries)

    @torch.no_grad()
    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Measure mean and deviation, start the network, and start the inner head from its output."""
        self._config.check_sample(len(sample))
        sample = sample.to(self.mean)
        self.mean.copy_(sample.mean())
        self.deviation.copy_(sample.std())
        self.network.start_sparse(torch.Generator().manual_seed(seed))
        standard = (sample - self.mean) / self.deviation
        if self._config.start == "pca":
            self.network.start_principal(standard)
        calibrate(self.network, standard[:CALIBRATION])
        self._folded.clear()
        self.inner.warm_start(self._infer(sample), fit, seed)

    def _map(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """Return the network's output: of the batch's statistics in training, else as `_infer`."""
        if not self.training:
            return self._infer(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._scaled(self.network, x.float())

    def _infer(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """Return the network's output by its running statistics, whatever the mode, some rows at a time."""
        network = self._folded_network()
        with torch.autocast(x.device.type, enabled=False):
            parts = [self._scaled(network, rows) for rows in x.float().split(at_once(ROWS_AT_ONCE, x.device))]
        return torch.cat(parts) if parts else x.new_empty(0, self.out_dim)

    def _scaled(self, network: CompressionNetwork, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        output: Tensor = network((x - self.mean) / self.deviation) * self.deviation
        return output

    def _folded_network(self) -> CompressionNetwork:
        """Return the network for inference; kept only in evaluation mode, as training changes it."""
        if self._folded:
            return self._folded[0].to(self.mean.device)
        network = self.network.folded()
        if not self.training:
            self._folded[:] = [network]
        return network

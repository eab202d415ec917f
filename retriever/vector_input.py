"""VectorInput: the backbone of a tower whose input is a vector already.

Shapes: B vectors, n training vectors, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retriever.data import Query, Tokens
from retriever.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["VectorInput"]

WEIGHTS = "model.safetensors"


class VectorInput(nn.Module):
    """y = (x - mean) / scale: one number divides all dimensions, so that L2 distances keep their order.

    Nothing in it trains.

    Args:
        mean: Subtracted from every vector.
        scale: Divides it, ().
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Float[Tensor, " D"], scale: Float[Tensor, ""]) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def identity(cls, dim: int) -> VectorInput:
        """Return the tower that leaves vectors of `dim` dimensions as they are."""
        return cls(torch.zeros(dim), torch.ones(()))

    @classmethod
    def standardizing(cls, sample: Float[Tensor, "n D"]) -> VectorInput:
        """Return the tower after which training vectors have the mean 0 and the mean squared length 1.

        Losses, learning rates and temperatures are then those of unit vectors, as text towers give.

        Raises:
            InputError: If all vectors of the sample are equal.
        """
        mean = sample.double().mean(0)
        scale = (sample.double() - mean).square().sum(1).mean().sqrt()
        if not scale > 0:
            raise InputError("all training vectors are equal. Give vectors that differ.")
        return cls(mean.float(), scale.float())

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        return len(self.mean)

    def forward(self, vectors: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return the vectors, centred and scaled."""
        return (vectors - self.mean) / self.scale

    def gather(self, items: Sequence[Query]) -> Tokens:
        """Return the batch of vectors as the tower takes it.

        Raises:
            InputError: If there is a text among them, or a vector of another dimension.
        """
        dim = self.dim
        for item in items:
            if isinstance(item, str):
                raise InputError(
                    f"this model takes vectors of {dim} dimensions, got the text {item[:40]!r}. "
                    "Give a vector file."
                )
            if item.shape != (dim,):
                raise InputError(
                    f"this model takes vectors of {dim} dimensions, got one of shape {item.shape}. "
                    "Give vectors of the kind it was trained on."
                )
        return {"vectors": torch.from_numpy(np.stack([item for item in items if not isinstance(item, str)]))}

    def save(self, folder: Path) -> None:
        """Write mean and scale."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> VectorInput:
        """Read what `save` wrote.

        Raises:
            InputError: If the file is missing or damaged.
        """
        try:
            stored = load_file(folder / WEIGHTS)
            return cls(stored["mean"], stored["scale"])
        except (OSError, KeyError, SafetensorError) as error:
            raise InputError(f"{folder / WEIGHTS} holds no mean and scale: {error}. Restore it.") from None

"""How the layers of a transformer are computed: again for their gradients, or compiled."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from retriever.encoder import Encoder
from retriever.errors import InputError

__all__ = ["compile_layers", "recompute_layers"]


def compile_layers(tower: Encoder) -> None:
    """Compile every layer of a transformer by torch.compile, in place: the names of the weights stay as they are.

    One by one, as equal layers share what is compiled, and so that layers can be sharded.

    Raises:
        InputError: If the tower has no layers.
    """
    for layer in _layers(tower, "compile"):
        layer.compile(dynamic=True)


def recompute_layers(tower: Encoder) -> None:
    """Make every layer of a transformer keep its inputs only, and compute itself again for its gradient.

    The layers of transformers do so on demand, but only in training mode, which `optimization.dropout false` is not.

    Raises:
        InputError: If the tower has no such layers.
    """
    for layer in _layers(tower, "checkpoint_activations"):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _layers(tower: Encoder, option: str) -> list[nn.Module]:
    layers = tower.layers()
    if not layers:
        raise InputError(
            f"model.{option} needs a transformer with layers, got {type(tower.backbone).__name__}. Leave it out."
        )
    return layers

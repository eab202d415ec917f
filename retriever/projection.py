"""A linear layer behind the pooling: towers of different dimensions meet in one.

Saved as the module `Dense` of sentence-transformers, with the identity as its activation.

Shapes: E dimensions of a tower's model, D dimensions of its vectors.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from retriever.errors import InputError
from retriever.folder import read_json, write_json

__all__ = ["load_dense", "new_dense", "save_dense"]

IDENTITY = "torch.nn.modules.linear.Identity"


def new_dense(width: int, dim: int) -> nn.Linear:
    """Return a layer from E = `width` to D = `dim` dimensions with orthonormal rows or columns and no bias.

    Of all such layers those keep angles best before anything is learned.
    """
    layer = nn.Linear(width, dim, bias=False)
    nn.init.orthogonal_(layer.weight)
    return layer


def save_dense(layer: nn.Linear, folder: Path) -> None:
    """Write a layer as sentence-transformers does."""
    folder.mkdir()
    config = {"in_features": layer.in_features, "out_features": layer.out_features}
    write_json(
        folder / "config.json",
        {**config, "bias": layer.bias is not None, "activation_function": IDENTITY},
    )
    state = {f"linear.{name}": value.contiguous() for name, value in layer.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def load_dense(config: Path, weights: Path) -> nn.Linear:
    """Read a layer.

    Raises:
        InputError: If it is more than linear.
    """
    stored = read_json(config)
    activation = stored.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation != IDENTITY or stored.get("use_residual"):
        raise InputError(
            f"{config} has the activation {activation} {'and a residual ' if stored.get('use_residual') else ''}"
            "behind its linear layer, which Endex does not carry. Use a model whose Dense module is linear."
        )
    layer = nn.Linear(stored["in_features"], stored["out_features"], bias=stored.get("bias", True))
    state = load_file(weights)
    layer.load_state_dict({name.removeprefix("linear."): value.float() for name, value in state.items()})
    return layer

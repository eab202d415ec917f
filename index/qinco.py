"""A QINCo head as `faiss.IndexQINCo`: FAISS's own encoder and decoder of the same codes.

It lives in memory alone: FAISS can neither write nor copy it, has no lists for it, and its search decodes every vector
for every query, so it is a check and a hand-over, no index of a corpus.

Shapes: N vectors, D dimensions, M codebooks, K codewords.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from index._faiss import load_faiss
from index.builders.base import FaissIndex, set_vector
from retriever.errors import InputError
from retriever.heads import QINCo

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["qinco_index"]


@torch.no_grad()
def qinco_index(head: QINCo, codes: UInt8[NDArray[np.uint8], "N size"] | None = None) -> FaissIndex:
    """Return a `faiss.IndexQINCo` that encodes and decodes as the head does, in the space of its vectors.

    The head's scale goes into codebooks and biases: all else in a step is homogeneous, f(s c, s x) = s f(c, x) where b
    is scaled too. A concatenation of limited rank is multiplied out.

    Args:
        head: A trained QINCo without lists.
        codes: Packed codes that it made, added as they are.

    Raises:
        InputError: If the head has lists, or an offset, which FAISS's network has no place for.
    """
    config = head.config
    if head.centroids is not None:
        raise InputError(
            f"faiss.IndexQINCo has no inverted lists, and the head has {config.num_lists}. Train with num_lists 0, or "
            "export the head, which puts its codes into lists behind an additive decoder."
        )
    faiss = load_faiss()
    sizes = (head.dim, config.num_codebooks, config.codebook_bits, config.num_blocks, config.hidden)
    metric = faiss.METRIC_INNER_PRODUCT if head.metric == "inner_product" else faiss.METRIC_L2
    built = faiss.IndexQINCo(*sizes, metric)
    scale = head.scale.cpu()
    words = head.codebooks.cpu() * scale
    _set_codebook(built.qinco.codebook0, words[0])
    for place in range(config.num_codebooks - 1):
        step, network = built.qinco.get_step(place), head.network(place + 1)
        assert network is not None, "only the first step of a head without lists has none"
        _set_codebook(step.codebook, words[place + 1])
        _set_linear(step.MLPconcat, network.concat.weight)
        bias = torch.zeros(head.dim) if network.concat.bias is None else network.concat.bias.cpu() * scale
        set_vector(step.MLPconcat.bias, bias.numpy(), head.dim)
        for number, block in enumerate(network.residual_blocks):
            target = step.get_residual_block(number)
            _set_linear(target.linear1, block.up.weight)
            _set_linear(target.linear2, block.down.weight)
    built.is_trained = True
    if codes is not None and len(codes):
        built.add_sa_codes(codes)
    return built


def _set_codebook(embedding: Any, words: Tensor) -> None:
    """Copy codewords into a `faiss.Embedding`."""
    set_vector(embedding.weight, words.numpy(), words.numel())


def _set_linear(linear: Any, weight: Tensor) -> None:
    """Copy a weight, rows of outputs, into a `faiss.Linear`."""
    set_vector(linear.weight, weight.cpu().numpy(), weight.numel())

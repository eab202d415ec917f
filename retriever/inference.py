"""Texts -> vectors without gradients, in batches of similar length.

Shapes: n texts, D dimensions, E dimensions in the head's space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch
from torch import Tensor

from retriever.data import Document, Query, Tokens
from retriever.dual_encoder import DualEncoder
from retriever.errors import InputError
from retriever.heads import CompressionHead

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Precision", "embed_documents", "embed_queries", "map_queries", "precision_context"]

Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")


def precision_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of a precision on a device.

    Raises:
        InputError: If the precision is unknown.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}.")
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def embed_queries(
    model: DualEncoder, texts: Sequence[Query], *, batch_size: int = 64, precision: Precision = "fp32"
) -> Float[Tensor, "n D"]:
    """Return the vectors of queries on the CPU, float32, in the order given."""
    return _embed(texts, len, model.tokenize_queries, model.encode_queries, model, batch_size, precision)


def embed_documents(
    model: DualEncoder, documents: Sequence[Document], *, batch_size: int = 64, precision: Precision = "fp32"
) -> Float[Tensor, "n D"]:
    """Return the uncompressed vectors of documents on the CPU, float32, in the order given."""
    return _embed(
        documents,
        lambda document: len(document.title) + len(document.text),
        model.tokenize_documents,
        model.encode_documents,
        model,
        batch_size,
        precision,
    )


@torch.no_grad()
def map_queries(head: CompressionHead, queries: Float[Tensor, "n D"]) -> Float[Tensor, "n E"]:
    """Return query vectors on the CPU as the head's index compares them, wherever the head is."""
    device = next(iter(head.state_dict().values()), queries).device
    return head.map_queries(queries.to(device)).float().cpu()


@torch.no_grad()  # not inference_mode: sharded weights keep what their first forward pass allocates
def _embed(
    items: Sequence[T],
    length: Callable[[T], int],
    tokenize: Callable[[Sequence[T]], Tokens],
    encode: Callable[[Tokens], Tensor],
    model: DualEncoder,
    batch_size: int,
    precision: Precision,
) -> Tensor:
    device = model.device
    order = sorted(range(len(items)), key=lambda row: -length(items[row]))  # longest first: little padding
    vectors = torch.empty(len(items), model.dim)
    training = model.training
    model.eval()
    try:
        with precision_context(precision, device):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                tokens = {
                    name: value.to(device) for name, value in tokenize([items[row] for row in rows]).items()
                }
                vectors[rows] = encode(tokens).float().cpu()
    finally:
        model.train(training)
    return vectors

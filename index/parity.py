"""Proof before publication: the index's scores are the model's own scores of the codes.

Shapes: q queries, n documents, D dimensions, k results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from index.builders import FaissIndex, search_index
from retriever.heads import CompressionHead
from retriever.scores import score_matrix

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from numpy.typing import NDArray

__all__ = ["ParityError", "assert_parity"]

TOLERANCE = 1e-5  # absolute difference of scores relative to the largest score; FAISS sums in float32


class ParityError(RuntimeError):
    """The index scores differ from the model's; nothing is published. This is a defect of Endex: report it."""


@torch.no_grad()
def assert_parity(
    built: FaissIndex,
    head: CompressionHead,
    codes: UInt8[NDArray[np.uint8], "n size"],
    queries: Float[Tensor, "q D"],
    *,
    k: int = 10,
    sample: int = 10_000,
) -> float:
    """Compare FAISS's scores with the model's scores of q and decode(codes) in float64.

    Checks that every returned score is the model's score of that document, that the scores are in order, and
    that no document of a sample has a higher score than the last returned one without being returned.

    Args:
        built: Filled index; it must look at every document, so lists are all to be probed.
        head: Head that made the codes.
        codes: Packed codes of all documents in index order.
        queries: Vectors to search with.
        k: Results a query.
        sample: Documents checked for having been missed.

    Returns:
        Largest absolute difference of a score.

    Raises:
        ParityError: If any check fails.
    """
    if built.ntotal != len(codes):
        raise ParityError(f"the index holds {built.ntotal} documents instead of {len(codes)}")
    k = min(k, len(codes))
    scores, rows = search_index(built, queries.numpy(), k)
    exact = queries.double()
    decoded = _decode(head, codes[rows.ravel()]).view(*rows.shape, -1)  # (q, k, D)
    expected = torch.stack(
        [
            score_matrix(q[None], documents, head.metric)[0]
            for q, documents in zip(exact, decoded, strict=True)
        ]
    )
    tolerance = TOLERANCE * max(1.0, expected.abs().max().item())
    difference = (torch.from_numpy(scores).double() - expected).abs().max().item()
    if not difference <= tolerance:
        raise ParityError(
            f"FAISS scores differ from the model's by {difference:.2e}, allowed is {tolerance:.1e}"
        )
    if (np.diff(scores, axis=1) > 0).any():
        raise ParityError("FAISS returned scores out of order")
    some = np.unique(np.linspace(0, len(codes) - 1, min(sample, len(codes))).astype(np.int64))
    candidates = score_matrix(exact, _decode(head, codes[some]), head.metric)  # (q, s)
    better = (candidates > expected[:, -1:] + 2 * tolerance).nonzero().tolist()
    missed = [(query, int(some[column])) for query, column in better if some[column] not in rows[query]]
    if missed:
        raise ParityError(
            f"the index missed a better document: row {missed[0][1]} for sample query {missed[0][0]}"
        )
    return float(difference)


def _decode(head: CompressionHead, packed: UInt8[NDArray[np.uint8], "n size"]) -> Float[Tensor, "n D"]:
    device = next(iter(head.state_dict().values()), torch.empty(0)).device
    codes = head.unpack(packed).to(device)
    return head.decode(codes).double().cpu()

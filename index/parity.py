"""Proof before publication: the index's scores are the model's own scores of the codes.

An exact form has to return the model's scores in their order. An inexact one (FastScan, scalar quantizers, graphs) has
to return nearly the model's best documents, each family nearly as it says.

Shapes: q queries, n documents, D dimensions, E dimensions in the head's space, k results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from index.builders import FaissIndex, IndexBuilder, search_index
from retriever import map_queries
from retriever.heads import CompressionHead
from retriever.scores import score_matrix

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = ["Parity", "ParityError", "Search", "assert_parity", "prove_parity"]

Search = Callable[[Any, int], tuple[Any, Any]]
"""Query vectors (B, D) and k -> scores (B, k), falling, and rows (B, k), NumPy arrays."""

TOLERANCE = 1e-5  # absolute difference of scores relative to the largest score; FAISS sums in float32
PIECE = 16_384  # documents decoded at once


class ParityError(RuntimeError):
    """The index's results differ from the model's; nothing is published. This is a defect of Endex: report it.

    Where the overlap of an inexact form is a little below the least one, the data may be too hard for that form.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How near an index comes to the model's own search of the codes.

    Attributes:
        difference: Largest absolute difference between a returned score and the model's score of that document.
        overlap: Share of the model's best 20 documents that the index returns, mean over queries; 1 for exact forms.
    """

    difference: float
    overlap: float


@dataclass(frozen=True, slots=True)
class _Results:
    """FAISS's results of q queries beside the model's scores of the same documents, in float64."""

    rows: Int[NDArray[np.int64], "q k"]
    scores: Float[NDArray[np.float32], "q k"]
    expected: Float[Tensor, "q k"]  # -inf where there is no row

    @property
    def difference(self) -> float:
        found = torch.from_numpy(self.rows >= 0)
        differences = (torch.from_numpy(self.scores).double() - self.expected)[found]
        return float(differences.abs().max()) if len(differences) else 0.0

    @property
    def tolerance(self) -> float:
        known = self.expected[torch.from_numpy(self.rows >= 0)]
        return TOLERANCE * max(1.0, known.abs().max().item() if len(known) else 0.0)

    def check_scores(self) -> None:
        """Raise ParityError unless each score is the model's."""
        if not self.difference <= self.tolerance:
            raise ParityError(
                f"FAISS scores differ from the model's by {self.difference:.2e}, allowed is {self.tolerance:.1e}"
            )

    def check_order(self) -> None:
        """Raise ParityError unless the scores fall."""
        if (self.scores[:, 1:] > self.scores[:, :-1]).any():
            raise ParityError("FAISS returned scores out of order")


def prove_parity(
    builder: IndexBuilder,
    built: FaissIndex,
    head: CompressionHead,
    codes: UInt8[NDArray[np.uint8], "n size"],
    queries: Float[Tensor, "q D"],
    search: Search | None = None,
) -> Parity:
    """Check an index as its family promises: `assert_parity` of an exact form, the overlap@20 of an inexact one.

    Args:
        builder: What built the index.
        built: Filled index; its lists are all to be probed.
        head: Head that made the codes.
        codes: Packed codes of all documents in index order.
        queries: Vectors to search with, not yet mapped; an inexact form, for which all documents are decoded, takes
            the first 100.
        search: Returns scores and rows of queries and k; by default the search of `built` alone.

    Raises:
        ParityError: If the index is not as near to the model as its family promises.
    """
    if builder.exact:
        return Parity(difference=assert_parity(built, head, codes, queries), overlap=1.0)
    queries = map_queries(head, queries[:100])
    results = _search(built, head, codes, queries, 20, search)
    results.check_order()
    if builder.exact_scores:
        results.check_scores()
    overlap = _overlap(results, head, codes, queries)
    if not overlap >= builder.least_overlap:
        raise ParityError(
            f"overlap@20 of an index of kind {builder.kind!r} with the model's own results is {overlap:.3f}, at least "
            f"{builder.least_overlap} is needed. {builder.approximation} {builder.improvement}"
        )
    return Parity(difference=results.difference, overlap=overlap)


def assert_parity(
    built: FaissIndex,
    head: CompressionHead,
    codes: UInt8[NDArray[np.uint8], "n size"],
    queries: Float[Tensor, "q D"],
    *,
    k: int = 10,
    sample: int = 10_000,
) -> float:
    """Compare the scores of an exact form with the model's scores of q and decode(codes) in float64.

    Checks that every returned score is the model's score of that document, that the scores are in order, and
    that no document of a sample has a higher score than the last returned one without being returned.

    Args:
        built: Filled index; it must look at every document, so lists are all to be probed.
        head: Head that made the codes.
        codes: Packed codes of all documents in index order.
        queries: Vectors to search with, not yet mapped.
        k: Results a query.
        sample: Documents checked for having been missed.

    Returns:
        Largest absolute difference of a score.

    Raises:
        ParityError: If any check fails.
    """
    queries = map_queries(head, queries)
    results = _search(built, head, codes, queries, k)
    if (results.rows < 0).any():
        raise ParityError("the index returned fewer documents than it holds")
    results.check_scores()
    results.check_order()
    some = np.unique(np.linspace(0, len(codes) - 1, min(sample, len(codes))).astype(np.int64))
    candidates = score_matrix(queries.double(), _decode(head, codes[some]), head.metric)  # (q, s)
    better = (candidates > results.expected[:, -1:] + 2 * results.tolerance).nonzero().tolist()
    missed = [
        (query, int(some[column])) for query, column in better if some[column] not in results.rows[query]
    ]
    if missed:
        raise ParityError(
            f"the index missed a better document: row {missed[0][1]} for sample query {missed[0][0]}"
        )
    return results.difference


@torch.no_grad()
def _search(
    built: FaissIndex,
    head: CompressionHead,
    codes: UInt8[NDArray[np.uint8], "n size"],
    queries: Float[Tensor, "q E"],
    k: int,
    search: Search | None = None,
) -> _Results:
    """Search, and score the returned documents as the model does."""
    if built.ntotal != len(codes):
        raise ParityError(f"the index holds {built.ntotal} documents instead of {len(codes)}")
    scores, rows = (search or partial(search_index, built))(queries.numpy(), min(k, len(codes)))
    decoded = _decode(head, codes[np.maximum(rows, 0).ravel()]).view(*rows.shape, -1)  # (q, k, E)
    expected = torch.stack(
        [
            score_matrix(query[None], documents, head.metric)[0]
            for query, documents in zip(queries.double(), decoded, strict=True)
        ]
    )
    return _Results(rows, scores, expected.masked_fill(torch.from_numpy(rows < 0), float("-inf")))


@torch.no_grad()
def _overlap(
    results: _Results,
    head: CompressionHead,
    codes: UInt8[NDArray[np.uint8], "n size"],
    queries: Float[Tensor, "q E"],
) -> float:
    """Return the share of returned documents whose model score is among the best k of all; ties count as found."""
    exact, k = queries.double(), results.rows.shape[1]
    best = torch.full((len(queries), 0), 0.0, dtype=torch.float64)
    for start in range(0, len(codes), PIECE):
        scores = score_matrix(exact, _decode(head, codes[start : start + PIECE]), head.metric)
        best = torch.cat([best, scores], 1)
        best = best.topk(min(k, best.shape[1]), 1).values
    return (results.expected >= best[:, -1:] - results.tolerance).double().mean().item()


@torch.no_grad()
def _decode(head: CompressionHead, packed: UInt8[NDArray[np.uint8], "n size"]) -> Float[Tensor, "n E"]:
    device = next(iter(head.state_dict().values()), torch.empty(0)).device
    codes = head.unpack(packed).to(device)
    return head.decode(codes).double().cpu()

"""Text pairs, documents and the batches made of them.

Shapes: B queries, H negatives a query, N = B (1 + H) documents, L tokens, R known relevant documents.
The positive of query i is document i (1 + H); its negatives follow it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy.typing import NDArray

__all__ = ["Collator", "Document", "Query", "TextPair", "TokenBatch", "Tokens", "document_key", "join_tokens"]

Tokens = dict[str, Tensor]
"""What a tower takes: a tokenizer's `input_ids` and `attention_mask`, both (B, L) int64; or `vectors`, (B, D)."""
Query: TypeAlias = "str | np.ndarray[Any, np.dtype[np.float32]]"
"""A text, or a vector (D,)."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document: identifier, optional title, text; or a vector in their place."""

    id: str
    title: str
    text: str
    vector: Float[NDArray[np.float32], " D"] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPair:
    """A query with a relevant document and, optionally, documents that are not relevant.

    Attributes:
        query: The query's text, or vector.
        positive: A relevant document.
        negatives: H documents to be ranked below it.
        relevant_ids: Identifiers of all documents known to be relevant; they never count as negatives.
        teacher_scores: Optional scores of (positive, *negatives) from a teacher.
    """

    query: Query
    positive: Document
    negatives: tuple[Document, ...] = ()
    relevant_ids: tuple[str, ...] = ()
    teacher_scores: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Token ids of B queries and their N = B (1 + H) documents.

    Attributes:
        queries: Token ids and mask, (B, L).
        documents: Token ids and mask, (N, L).
        document_keys: A 64-bit key of each document's identifier, (N,).
        relevant_keys: Keys of the documents known to be relevant to each query, zero-padded, (B, R).
        positives: Row of each query's positive document, (B,).
        teacher_scores: A teacher's scores of each query's positive and the H negatives after it, nan where it gave
            none, (B, 1 + H); or None.
    """

    queries: Tokens
    documents: Tokens
    document_keys: Int[Tensor, " N"]
    relevant_keys: Int[Tensor, "B R"]
    positives: Int[Tensor, " B"]
    teacher_scores: Float[Tensor, "B candidates"] | None = None

    def with_documents(self, documents: Tokens, keys: Int[Tensor, " n"]) -> TokenBatch:
        """Return the batch with further documents, positives of none; `documents` is empty where none are tokenized."""
        return replace(
            self,
            documents=join_tokens(self.documents, documents) if documents else self.documents,
            document_keys=torch.cat([self.document_keys, keys]),
        )

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch on another device."""
        return TokenBatch(
            queries={name: value.to(device) for name, value in self.queries.items()},
            documents={name: value.to(device) for name, value in self.documents.items()},
            document_keys=self.document_keys.to(device),
            relevant_keys=self.relevant_keys.to(device),
            positives=self.positives.to(device),
            teacher_scores=None if self.teacher_scores is None else self.teacher_scores.to(device),
        )


def join_tokens(first: Tokens, second: Tokens) -> Tokens:
    """Join the rows of two tokenized batches, padded with zeros to the longer one's length.

    Zero is the value of every tokenizer's mask on padding, and masked token ids are never looked at.
    """
    joined = {}
    for name in first:
        length = max(first[name].shape[1], second[name].shape[1])
        parts = [F.pad(tokens[name], (0, length - tokens[name].shape[1])) for tokens in (first, second)]
        joined[name] = torch.cat(parts)
    return joined


def identifier_hash(identifier: str) -> int:
    """Return a 64-bit hash of an identifier, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little")


def document_key(identifier: str) -> int:
    """Return a non-zero 63-bit key of an identifier, equal on every machine."""
    return (identifier_hash(identifier) >> 1) | 1


def other_relevant(
    document_keys: Int[Tensor, " N"], relevant_keys: Int[Tensor, "B R"], labels: Int[Tensor, " B"]
) -> Bool[Tensor, "B N"]:
    """Mark the documents that are relevant to a query beside its own positive.

    They must not be ranked down, so losses leave them out of the softmax.
    """
    mask = torch.isin(document_keys, relevant_keys)  # (N,) cheap filter before the (B, N, R) comparison
    columns = mask.nonzero().squeeze(1)
    hit = (document_keys[columns][None, :, None] == relevant_keys[:, None, :]).any(-1)  # (B, n)
    result = torch.zeros(len(labels), len(document_keys), dtype=torch.bool, device=document_keys.device)
    result[:, columns] = hit
    result[torch.arange(len(labels), device=labels.device), labels] = False
    return result


class Collator:
    """Turns text pairs into a `TokenBatch`.

    Args:
        tokenize_queries: Texts -> tokens of the query tower.
        tokenize_documents: Documents -> tokens of the document tower.
    """

    def __init__(
        self,
        tokenize_queries: Callable[[Sequence[Query]], Tokens],
        tokenize_documents: Callable[[Sequence[Document]], Tokens],
    ) -> None:
        self.tokenize_queries = tokenize_queries
        self.tokenize_documents = tokenize_documents

    def __call__(self, pairs: Sequence[TextPair]) -> TokenBatch:
        """Return the batch of B pairs.

        Raises:
            ValueError: If the pairs differ in their number of negatives.
        """
        counts = {len(pair.negatives) for pair in pairs}
        if len(counts) > 1:
            raise ValueError(
                f"every pair of a batch must have the same number of negatives, got {sorted(counts)}."
            )
        documents = [document for pair in pairs for document in (pair.positive, *pair.negatives)]
        relevant = [[document_key(i) for i in (pair.relevant_ids or (pair.positive.id,))] for pair in pairs]
        width = max(map(len, relevant))
        scores = [pair.teacher_scores for pair in pairs if pair.teacher_scores is not None]
        return TokenBatch(
            queries=self.tokenize_queries([pair.query for pair in pairs]),
            documents=self.tokenize_documents(documents),
            document_keys=torch.tensor([document_key(document.id) for document in documents]),
            relevant_keys=torch.tensor([keys + [0] * (width - len(keys)) for keys in relevant]),
            positives=torch.arange(len(pairs)) * (len(documents) // len(pairs)),
            teacher_scores=torch.tensor(scores) if len(scores) == len(pairs) else None,
        )

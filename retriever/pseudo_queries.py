"""Queries for a corpus that has none: titles and first sentences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from retriever.beir import RetrievalData
from retriever.data import Document
from retriever.errors import InputError

__all__ = ["pseudo_queries"]

END = re.compile(r"(?<=[.!?])\s+|\n")  # of a sentence, or of a line
WORDS = 32  # of a query at most


def pseudo_queries(documents: Mapping[str, Document]) -> RetrievalData:
    """Return the documents with a query each, for which it is the only relevant document.

    The query is the title where no other document has it, else the text's first sentence, or what a line holds of it.
    A document with neither, or whose query another document has had, gets none.

    Raises:
        InputError: If no document gives a query.
    """
    titles = Counter(document.title for document in documents.values())
    owners: dict[str, str] = {}
    for name, document in documents.items():
        titled = document.title.strip() and titles[document.title] == 1
        query = document.title if titled else _first_sentence(document.text)
        if query := " ".join(query.split()[:WORDS]):
            owners.setdefault(query, name)
    if not owners:
        raise InputError(f"none of {len(documents):,} documents has a title or text to make a query of.")
    queries = {f"pseudo-{number}": query for number, query in enumerate(owners)}
    qrels = {query: {document: 1} for query, document in zip(queries, owners.values(), strict=True)}
    return RetrievalData(documents, queries, qrels)


def _first_sentence(text: str) -> str:
    return next(filter(None, map(str.strip, END.split(text))), "")

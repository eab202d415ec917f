"""Queries for a corpus that has none or few: titles and first sentences, and crops."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from retriever.beir import RetrievalData
from retriever.data import Document
from retriever.errors import InputError

__all__ = ["crop", "pseudo_queries"]

END = re.compile(r"(?<=[.!?])\s+|\n")  # of a sentence, or of a line
WORDS = 32  # of a query at most
CROP = (4, 12)  # words of a crop
CROPS, CROPS_OF_A_TEXT = 65_536, 8


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


def crop(documents: Sequence[Document], seed: int) -> list[str]:
    """Return queries of texts: 4 to 12 words that follow each other, at a random place (Izacard et al., 2022).

    They are 8 of each text, or so many fewer that there are at most 65,536. A text of fewer than 4 words is taken
    whole; one that has no spaces is cut between characters. Documents without text are left out.
    """
    each = min(CROPS_OF_A_TEXT, max(1, CROPS // max(1, len(documents))))
    generator, crops = random.Random(seed), []
    for document in documents[:CROPS]:
        words, space = document.text.split(), " "
        if len(words) == 1:
            words, space = list(words[0]), ""
        for _ in range(each if words else 0):
            length = generator.randint(*CROP)
            start = generator.randint(0, max(0, len(words) - length))
            crops.append(space.join(words[start : start + length]))
    return crops


def _first_sentence(text: str) -> str:
    return next(filter(None, map(str.strip, END.split(text))), "")

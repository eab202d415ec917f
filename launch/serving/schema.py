"""What requests and answers of the HTTP API look like."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from launch.serving.config import ServeConfig
from launch.serving.service import SearchJob
from retriever import InputError

__all__ = [
    "Failure",
    "Health",
    "Hit",
    "QueryResult",
    "SearchRequest",
    "SearchResponse",
    "SwapRequest",
    "SwapResponse",
]


class SearchRequest(BaseModel):
    """One of query, queries and vectors; how many documents; optionally among which."""

    model_config = ConfigDict(extra="forbid")

    query: str | None = Field(None, description="A text.", examples=["how do I read a file line by line"])
    queries: list[str] | None = Field(None, description="Several texts.", examples=[None])
    vectors: list[list[float]] | None = Field(
        None, description="Query vectors instead of texts.", examples=[None]
    )
    k: Annotated[StrictInt, Field(ge=1, description="Documents a query.")] = 10
    ids: list[str] | None = Field(None, description="Search only these documents.", examples=[None])
    nprobe: StrictInt | None = Field(None, description="Inverted lists to probe.", examples=[None])
    texts: bool = Field(True, description="Return titles and texts, where the index stores them.")

    def job(self, config: ServeConfig) -> SearchJob:
        """Return what is asked for, within the limits.

        Raises:
            InputError: If a limit is exceeded, or not exactly one of query, queries and vectors is given.
        """
        given = [name for name in ("query", "queries", "vectors") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"give exactly one of query, queries and vectors, got {' and '.join(given) or 'none'}."
            )
        _at_most(self.k, config.max_k, "k")
        if self.ids is not None:
            _at_most(len(self.ids), config.max_ids, "the number of ids")
            if not self.ids:
                raise InputError("ids must name at least one document. Leave it out to search all.")
        ids = None if self.ids is None else tuple(self.ids)
        if self.vectors is not None:
            return SearchJob(vectors=_array(self.vectors, config), k=self.k, nprobe=self.nprobe, ids=ids)
        texts = [self.query] if self.query is not None else self.queries or []
        _count(texts, config)
        for text in texts:
            _at_most(len(text), config.max_query_length, "the length of a query in characters")
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # JSON may hold half of a pair
                raise InputError("a query must be Unicode text, got a lone surrogate.")
        return SearchJob(texts=tuple(texts), k=self.k, nprobe=self.nprobe, ids=ids)


class Hit(BaseModel):
    """A document that was found; title and text are null if they are not stored or not wanted."""

    id: str
    score: float
    title: str | None = None
    text: str | None = None


class QueryResult(BaseModel):
    """The hits of a query, best first; fewer than k where there are no more."""

    hits: list[Hit]


class SearchResponse(BaseModel):
    """A result for each query, in the order asked, all from one generation of the index."""

    generation: int
    results: list[QueryResult]


class Health(BaseModel):
    """Whether the server can answer, and with which index."""

    status: str  # "ready" or "loading"
    index: str  # name of the folder
    generation: int = 0
    ntotal: int = 0
    dim: int = 0
    compare: str | None = None  # name of the second folder


class SwapRequest(BaseModel):
    """The index folder to answer with from now on, relative to the swap root or absolute below it."""

    model_config = ConfigDict(extra="forbid")

    index: str


class SwapResponse(BaseModel):
    """The index that answers now."""

    generation: int
    ntotal: int


class Failure(BaseModel):
    """What was wrong, and what to do."""

    detail: str


def _array(
    vectors: list[list[float]], config: ServeConfig
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    _count(vectors, config)
    if len({len(vector) for vector in vectors}) != 1:
        raise InputError("vectors must all have the same length.")
    array = np.array(vectors, dtype=np.float64)
    if not (np.abs(array) <= np.finfo(np.float32).max).all():  # false for NaN too
        raise InputError("vectors must hold finite float32 numbers only.")
    return array.astype(np.float32)


def _count(queries: list[str] | list[list[float]], config: ServeConfig) -> None:
    _at_most(len(queries), config.max_queries, "the number of queries")
    if not queries:
        raise InputError("there is no query to search for. Give at least one.")


def _at_most(value: int, limit: int, what: str) -> None:
    if value > limit:
        raise InputError(f"{what} must be at most {limit}, got {value}.")

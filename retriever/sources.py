"""Where documents, queries and judgements come from: BEIR folders, Hub data sets, MS MARCO, vector files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from retriever import beir, vectors
from retriever.beir import Qrels, RetrievalData
from retriever.data import Document, Query
from retriever.disk import open_documents
from retriever.errors import InputError
from retriever.msmarco import is_text_triples, keep_negative, text_triples
from retriever.scores import Metric
from retriever.vectors import is_vectors

__all__ = ["count_documents", "read_corpus", "read_data", "read_qrels", "read_queries"]


def read_corpus(source: str | Path, start: int = 0, stop: int | None = None) -> Iterator[Document]:
    """Yield documents of a corpus, texts (`retriever.beir.read_corpus`) or vectors, one at a time.

    Args:
        source: BEIR folder, `.jsonl[.gz]` file or Hub data set; vector file or folder of them.
        start: Documents passed over at the beginning.
        stop: Number of the document to stop before; None for all.

    Raises:
        InputError: If the corpus is not there, is empty, or holds what is no document.
    """
    read = vectors.read_vector_documents if is_vectors(source) else beir.read_corpus
    return read(source, start, stop)


def count_documents(source: str | Path) -> int:
    """Return the number of documents of a corpus.

    Raises:
        InputError: If the source is not there, cannot be read, or is empty.
    """
    return (vectors.count_vectors if is_vectors(source) else beir.count_documents)(source)


def read_queries(source: str | Path) -> Mapping[str, Query]:
    """Return queries by id, texts (`retriever.beir.read_queries`) or vectors, whose ids are their rows.

    Raises:
        InputError: If there are none, or what is there is no query.
    """
    return vectors.read_vector_queries(source) if is_vectors(source) else beir.read_queries(source)


def read_qrels(
    source: str | Path,
    split: str,
    *,
    queries: Iterable[str] | None = None,
    metric: Metric = "l2",
    normalize: bool = False,
) -> Qrels:
    """Return the judgements of a split; of vectors the true nearest neighbour of every query, whatever the split.

    Args:
        source: BEIR folder, Hub data set, or folder of vector files.
        split: Split of the judgements.
        queries: Known query ids; an unknown one in the judgements is an error.
        metric: By which neighbours of vectors are found where they are not given.
        normalize: Compare unit vectors, where neighbours are not given.

    Raises:
        InputError: If a judgement is faulty or there is none.
    """
    if is_vectors(source):
        return vectors.read_vector_qrels(source, metric=metric, normalize=normalize)
    return beir.read_qrels(source, split, queries=queries)


def read_data(
    source: str | Path, split: str, *, metric: Metric = "l2", normalize: bool = False, on_disk: bool = False
) -> RetrievalData:
    """Return what training or evaluation on one split needs: texts in memory, or vectors that stay in their files.

    Arguments as those of `read_qrels`; see `retriever.vectors.read_vector_data`. With `on_disk` the texts of the
    documents stay in their file, too (`retriever.disk`).
    """
    if is_vectors(source):
        return vectors.read_vector_data(source, split, metric=metric, normalize=normalize)
    if is_text_triples(source):
        return _read_text_triples(Path(source))
    return beir.read_data(source, split, documents=open_documents(source) if on_disk else None)


def _read_text_triples(path: Path) -> RetrievalData:
    """Return the pairs and negatives of a file of triples of texts, all in memory, whatever the split."""
    documents: dict[str, Document] = {}
    queries: dict[str, Query] = {}
    qrels: Qrels = {}
    negatives: dict[str, list[str]] = {}
    for (query, text), *passages in text_triples(path):
        queries[query] = text
        for name, passage in passages:
            documents.setdefault(name, Document(name, "", passage))
        (positive, _), (other, _) = passages
        qrels.setdefault(query, {})[positive] = 1
        keep_negative(negatives, query, other)
    if not qrels:
        raise InputError(
            f"{path} holds no triples. Give a file with lines of query, passage and other passage."
        )
    return RetrievalData(documents, queries, qrels, negatives)

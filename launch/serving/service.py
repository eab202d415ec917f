"""SearchService: one live index, answered in batches.

Shapes: B queries, D dimensions, k results.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from index import Searcher
from launch.serving.batcher import Batcher
from launch.serving.config import ServeConfig
from launch.serving.live import Generation, LiveIndex
from launch.serving.metrics import Metrics
from retriever import InputError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import NDArray

__all__ = ["Answer", "SearchJob", "SearchService"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchJob:
    """What one request asks for: texts or vectors, and how to search for all of them."""

    texts: tuple[str, ...] = ()
    vectors: Float[NDArray[np.float32], "B D"] | None = None
    k: int = 10
    nprobe: int | None = None
    ids: tuple[str, ...] | None = None  # only these documents

    @property
    def size(self) -> int:
        """Number of queries B."""
        return len(self.texts) if self.vectors is None else len(self.vectors)


@dataclass(frozen=True, slots=True)
class Answer:
    """Scores and index rows of a job's queries, and the index that they are of."""

    generation: Generation
    scores: Float[NDArray[np.float32], "B k"]
    rows: Int[NDArray[np.int64], "B k"]  # -1 where there are no more


class SearchService:
    """Answers search jobs from one live index.

    Args:
        name: What metrics call it.
        folder: Index folder.
        config: Batch sizes and the arithmetic of the tower.
        metrics: Where batches are noted.
    """

    def __init__(self, name: str, folder: Path, config: ServeConfig, metrics: Metrics) -> None:
        self.name = name
        self.live = LiveIndex(folder, self._load)
        self.batcher: Batcher[SearchJob, Answer] = Batcher(
            self._answer,
            max_batch=config.max_batch,
            max_wait=config.max_wait_ms / 1000,
            max_queue=config.max_queue,
        )
        self._config = config
        self._metrics = metrics

    def submit(self, job: SearchJob) -> Future[Answer]:
        """Queue a job; see `Batcher.submit`."""
        return self.batcher.submit(job, job.size)

    def _load(self, folder: Path) -> Searcher:
        config = self._config
        return Searcher(folder, nprobe=config.nprobe, widths=config.cascade, verify=config.verify).to(
            config.device
        )

    def _answer(self, jobs: list[SearchJob]) -> list[Answer | Exception]:
        start = time.perf_counter()
        generation = self.live.current
        searcher = generation.searcher
        vectors = self._vectors(searcher, jobs)
        answers: dict[int, Answer | Exception] = {}  # by place in jobs
        alike: defaultdict[tuple[int | None, tuple[str, ...] | None], list[int]] = defaultdict(list)
        for place, (job, queries) in enumerate(zip(jobs, vectors, strict=True)):
            if searcher.takes_vectors and job.vectors is None:
                answers[place] = InputError("this index is searched by vectors, got texts. Send vectors.")
            elif queries.shape[1] == searcher.dim:
                alike[job.nprobe, job.ids].append(place)
            else:
                answers[place] = InputError(
                    f"vectors must have {searcher.dim} dimensions, got {queries.shape[1]}."
                )
        for places in alike.values():
            found = self._search(
                generation, [jobs[place] for place in places], [vectors[place] for place in places]
            )
            answers.update(zip(places, found, strict=True))
        self._metrics.batch_queries.labels(self.name).observe(sum(job.size for job in jobs))
        self._metrics.batch_seconds.labels(self.name).observe(time.perf_counter() - start)
        return [answers[place] for place in range(len(jobs))]

    def _vectors(
        self, searcher: Searcher, jobs: Sequence[SearchJob]
    ) -> list[Float[NDArray[np.float32], "B D"]]:
        """Return the vectors of each job's queries; all texts are encoded together, unless vectors are wanted."""
        texts = [text for job in jobs if job.vectors is None for text in job.texts]
        texts = [] if searcher.takes_vectors else texts
        encoded = (
            searcher.embed(texts, precision=self._config.precision) if texts else np.empty((0, 0), np.float32)
        )
        parts, start = [], 0
        for job in jobs:
            if job.vectors is None:
                parts.append(encoded[start : start + job.size])
                start += job.size
            else:
                parts.append(job.vectors)
        return parts

    def _search(
        self,
        generation: Generation,
        jobs: Sequence[SearchJob],
        vectors: Sequence[Float[NDArray[np.float32], "B D"]],
    ) -> list[Answer | Exception]:
        """Search for jobs that differ in k only, once with the largest k."""
        first, k = jobs[0], max(job.k for job in jobs)
        searcher, queries = generation.searcher, np.concatenate(vectors)
        if searcher.takes_vectors:  # they are as in the file that was exported
            queries = searcher.embed(list(queries), precision=self._config.precision)
        try:
            scores, rows = searcher.search_vectors(queries, k, nprobe=first.nprobe, ids=first.ids)
        except InputError as error:  # nprobe or ids, which these jobs share
            folder = generation.searcher.folder
            message = str(error).replace(str(folder), folder.name)  # no paths for clients
            return [InputError(message) for _ in jobs]
        ends = np.cumsum([job.size for job in jobs])
        return [
            Answer(generation, scores[end - job.size : end, : job.k], rows[end - job.size : end, : job.k])
            for job, end in zip(jobs, ends, strict=True)
        ]

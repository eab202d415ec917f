"""Batcher: requests that arrive together are answered together, by one thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Generic, TypeVar

__all__ = ["Batcher", "Closed", "QueueFull"]

Job = TypeVar("Job")
Result = TypeVar("Result")


class QueueFull(Exception):  # noqa: N818 - reads as what it says
    """As many requests wait as may wait."""


class Closed(Exception):  # noqa: N818
    """The batcher takes no more requests."""


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Job, Result]):
    job: Job
    size: int
    future: Future[Result]
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[Job, Result]):
    """Queues jobs and answers them in batches, in the order they came, in one thread.

    Args:
        answer: Called with the jobs of a batch; returns a result or an exception for each. If it raises, every job
            of this batch, and no other, gets the exception.
        max_batch: Sum of the sizes of a batch's jobs; a larger job is a batch by itself.
        max_wait: Seconds that a job waits for others while the thread has nothing else to do.
        max_queue: Jobs that may wait.
    """

    def __init__(
        self,
        answer: Callable[[list[Job]], Sequence[Result | Exception]],
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
    ) -> None:
        self._answer = answer
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.max_queue = max_queue
        self._queue: deque[_Waiting[Job, Result]] = deque()
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._run, name="endex-batcher", daemon=True)

    def start(self) -> None:
        """Start answering."""
        self._thread.start()

    def close(self) -> None:
        """Take no more jobs, answer those that wait, and return when that is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def __len__(self) -> int:
        """Return the number of jobs that wait."""
        return len(self._queue)

    def submit(self, job: Job, size: int = 1) -> Future[Result]:
        """Queue a job. Cancelling the future takes it out, unless it is being answered already.

        Raises:
            QueueFull: If `max_queue` jobs wait.
            Closed: After `close`.
        """
        waiting: _Waiting[Job, Result] = _Waiting(job, size, Future())
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._queue) >= self.max_queue:
                raise QueueFull
            self._queue.append(waiting)
            self._changed.notify_all()
        return waiting.future

    def _run(self) -> None:
        while batch := self._take():
            running = [each for each in batch if each.future.set_running_or_notify_cancel()]
            if running:
                self._finish(running)

    def _finish(self, batch: list[_Waiting[Job, Result]]) -> None:
        try:
            results = self._answer([each.job for each in batch])
            assert len(results) == len(batch), "a result or an exception for each job"
        except Exception as error:
            results = [error] * len(batch)
        for each, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                each.future.set_exception(result)
            else:
                each.future.set_result(result)

    def _take(self) -> list[_Waiting[Job, Result]]:
        """Wait for a batch; an empty one says that there will be no more."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            while (
                self._queue and not self._closed and sum(each.size for each in self._queue) < self.max_batch
            ):
                rest = self._queue[0].since + self.max_wait - time.monotonic()
                if rest <= 0:
                    break
                self._changed.wait(rest)
            batch: list[_Waiting[Job, Result]] = []
            size = 0
            while self._queue and (not batch or size + self._queue[0].size <= self.max_batch):
                batch.append(self._queue.popleft())
                size += batch[-1].size
            return batch

"""The batcher of `endex serve`: bounded, in order, and a failure stays where it happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Event

import pytest

from launch.serving.batcher import Batcher, Closed, QueueFull

WAIT = 5.0  # seconds after which a test has failed


class Recorder:
    """Answers each job with itself, notes batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[object]] = []
        self.go = Event()
        self.go.set()
        self.begun = Event()

    def __call__(self, jobs: list[object]) -> list[object]:
        self.begun.set()
        assert self.go.wait(WAIT)
        self.batches.append(jobs)
        if "break" in jobs:
            raise RuntimeError("broken")
        return [ValueError("bad") if job == "bad" else job for job in jobs]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


Make = Callable[..., Batcher]


@pytest.fixture
def make(recorder: Recorder) -> Iterator[Make]:
    """Start a batcher; it is closed when the test ends."""
    made: list[Batcher] = []

    def start(max_batch: int = 4, max_wait: float = 0.0, max_queue: int = 100) -> Batcher:
        batcher = Batcher(recorder, max_batch=max_batch, max_wait=max_wait, max_queue=max_queue)
        batcher.start()
        made.append(batcher)
        return batcher

    yield start
    recorder.go.set()
    for batcher in made:
        batcher.close()


def hold(batcher: Batcher, recorder: Recorder) -> None:
    """Let the thread be busy with a first job, so that further ones wait until `recorder.go`."""
    recorder.go.clear()
    batcher.submit("first")
    assert recorder.begun.wait(WAIT)


def test_jobs_that_wait_are_answered_together_in_order(make: Make, recorder: Recorder) -> None:
    batcher = make()
    hold(batcher, recorder)
    futures = [batcher.submit(job) for job in range(6)]
    recorder.go.set()
    assert [future.result(WAIT) for future in futures] == list(range(6))
    assert recorder.batches == [["first"], [0, 1, 2, 3], [4, 5]]


def test_a_batch_is_bounded_by_the_sum_of_sizes(make: Make, recorder: Recorder) -> None:
    batcher = make()
    hold(batcher, recorder)
    futures = [batcher.submit(size, size) for size in (3, 2, 2, 9, 1)]
    recorder.go.set()
    assert [future.result(WAIT) for future in futures] == [3, 2, 2, 9, 1]
    assert recorder.batches[1:] == [[3], [2, 2], [9], [1]]


def test_jobs_within_the_waiting_time_share_a_batch(make: Make, recorder: Recorder) -> None:
    batcher = make(max_batch=3, max_wait=WAIT)
    futures = [batcher.submit(job) for job in range(3)]
    assert [future.result(WAIT / 2) for future in futures] == [0, 1, 2]  # a full batch waits no longer
    assert recorder.batches == [[0, 1, 2]]


def test_a_lone_job_is_answered_after_the_waiting_time(make: Make) -> None:
    start = time.monotonic()
    assert make(max_wait=0.02).submit("alone").result(WAIT) == "alone"
    assert time.monotonic() - start >= 0.02


def test_a_full_queue_takes_no_more(make: Make, recorder: Recorder) -> None:
    batcher = make(max_queue=2)
    hold(batcher, recorder)
    futures = [batcher.submit(job) for job in range(2)]
    with pytest.raises(QueueFull):
        batcher.submit(2)
    assert len(batcher) == 2
    recorder.go.set()
    assert [future.result(WAIT) for future in futures] == [0, 1]


def test_a_cancelled_job_is_not_answered(make: Make, recorder: Recorder) -> None:
    batcher = make()
    hold(batcher, recorder)
    gone, stays = batcher.submit("gone"), batcher.submit("stays")
    assert gone.cancel()
    recorder.go.set()
    assert stays.result(WAIT) == "stays"
    assert recorder.batches[1:] == [["stays"]]


def test_an_error_of_a_batch_reaches_its_jobs_and_no_others(make: Make, recorder: Recorder) -> None:
    batcher = make(max_batch=2)
    hold(batcher, recorder)
    futures = [batcher.submit(job) for job in ("a", "break", "b", "c")]
    recorder.go.set()
    for future in futures[:2]:
        with pytest.raises(RuntimeError, match="broken"):
            future.result(WAIT)
    assert [future.result(WAIT) for future in futures[2:]] == ["b", "c"]


def test_an_error_of_a_job_reaches_no_other_of_its_batch(make: Make, recorder: Recorder) -> None:
    batcher = make()
    hold(batcher, recorder)
    futures = [batcher.submit(job) for job in ("a", "bad", "b")]
    recorder.go.set()
    with pytest.raises(ValueError, match="bad"):
        futures[1].result(WAIT)
    assert [futures[0].result(WAIT), futures[2].result(WAIT)] == ["a", "b"]


def test_closing_answers_what_waits_at_once(make: Make, recorder: Recorder) -> None:
    batcher = make(max_batch=100, max_wait=60.0)
    futures = [batcher.submit(job) for job in range(3)]
    batcher.close()
    assert [future.result(0) for future in futures] == [0, 1, 2]


def test_a_closed_batcher_takes_no_more(make: Make) -> None:
    batcher = make()
    batcher.close()
    with pytest.raises(Closed):
        batcher.submit(1)

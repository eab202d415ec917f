"""Items made in a thread come in their order, and the thread does not outlive their use."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from training.prefetch import prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_their_order() -> None:
    assert list(prefetch(range(50))) == list(range(50))


def test_none_is_an_item() -> None:
    assert list(prefetch([None, 0, None])) == [None, 0, None]


def test_no_more_items_are_made_ahead_than_allowed() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    found = prefetch(items(), depth=3)
    assert next(found) == 0
    time.sleep(0.3)
    assert len(made) <= 1 + 3 + 1  # taken, waiting, and one that waits for a place
    found.close()  # type: ignore[attr-defined]


def test_an_error_of_the_thread_is_raised_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    found = prefetch(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="no more"):
        next(found)


def test_the_thread_ends_when_the_items_are_left_before_their_end() -> None:
    found = prefetch(iter(int, 1))  # for ever
    next(found)
    assert threads()
    found.close()  # type: ignore[attr-defined]
    assert not threads()

"""Batches made ahead in a thread, so that tokenizing does not keep the device waiting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

__all__ = ["prefetch"]

T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yield the items in their order; up to `depth` of them are made before they are asked for.

    Hugging Face's tokenizers and PyTorch let other threads run while they work. What goes wrong in the thread is raised
    here, and the thread ends with the iterator.
    """
    made: Queue[tuple[list[T], BaseException | None]] = Queue(depth)  # an item, or none and why
    stop = Event()

    def put(item: list[T], error: BaseException | None = None) -> None:
        while not stop.is_set():
            try:
                return made.put((item, error), timeout=0.1)
            except Full:
                continue

    def fill() -> None:
        try:
            for item in items:
                put([item])
                if stop.is_set():
                    return
            put([])
        except BaseException as error:
            put([], error)

    thread = Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if not item:
                return
            yield item[0]
    finally:
        stop.set()
        thread.join()

"""A set of identifiers in 8 bytes each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from retriever.data import identifier_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["IdSet"]

RECENT_IDS = 65_536  # identifiers that IdSet holds unsorted


class IdSet:
    """A set of identifiers by their 64-bit hashes, in 8 bytes each: sorted runs, merged as they grow.

    Two identifiers may share a hash (among a hundred million, once in 4,000 corpora): `add` says that one is
    perhaps known, and the caller looks.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._runs: list[NDArray[np.uint64]] = []

    def __len__(self) -> int:
        return len(self._recent) + sum(map(len, self._runs))

    def add(self, identifier: str) -> bool:
        """Add an identifier and return True; return False if it is perhaps there already."""
        key = identifier_hash(identifier)
        if key in self._recent or any(_holds(run, key) for run in self._runs):
            return False
        self._recent.add(key)
        if len(self._recent) >= RECENT_IDS:
            self._runs.append(np.sort(np.fromiter(self._recent, np.uint64, len(self._recent))))
            self._recent.clear()
            while len(self._runs) > 1 and 2 * len(self._runs[-1]) > len(self._runs[-2]):
                self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        return True


def _holds(run: NDArray[np.uint64], key: int) -> bool:
    row = int(np.searchsorted(run, np.uint64(key)))
    return row < len(run) and int(run[row]) == key

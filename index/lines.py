"""Lines: the lines of a file as a sequence, without reading it into memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Lines"]

PIECE = 1 << 26  # bytes searched for line ends at once


class Lines(Sequence[str]):
    """The lines of a UTF-8 file; the file stays on disk, 8 bytes a line are held in memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes: mmap.mmap | bytes = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
            )
        self._ends = _line_ends(self._bytes)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # negative rows, and IndexError
        start = int(self._ends[row - 1]) + 1 if row else 0
        return self._bytes[start : int(self._ends[row])].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


def _line_ends(content: mmap.mmap | bytes) -> NDArray[np.int64]:
    """Return the position of every line end; a last line without one ends with the file."""
    ends = [
        np.flatnonzero(np.frombuffer(content[start : start + PIECE], np.uint8) == ord("\n")) + start
        for start in range(0, len(content), PIECE)
    ]
    if len(content) and content[-1:] != b"\n":
        ends.append(np.array([len(content)]))
    return np.concatenate(ends) if ends else np.empty(0, np.int64)

"""Lines of text files, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from retriever.errors import InputError

__all__ = ["numbered_lines", "open_file"]


def open_file(path: Path, mode: str = "rt") -> IO[Any]:
    """Open a file, through gzip if its name ends in .gz; text is UTF-8."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode, encoding=None if "b" in mode else "utf-8")  # type: ignore[no-any-return]


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and text of every line.

    Raises:
        InputError: If the file is no UTF-8, or damaged; the line is named.
    """
    number = 0
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}:{number + 1}: unreadable ({error}). Write the file again as UTF-8."
        ) from None

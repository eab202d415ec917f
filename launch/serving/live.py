"""LiveIndex: the index that answers now, and its exchange for another while requests go on."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from index import Searcher
from retriever import Document, InputError
from retriever.folder import MANIFEST

__all__ = ["Generation", "LiveIndex", "NotReady", "manifest_digest", "path_below"]

RETRY_SECONDS = 60.0  # a refused folder is looked at again after so long, or when its manifest changes

log = logging.getLogger("endex.serve")


class NotReady(Exception):  # noqa: N818 - reads as what it says
    """No index is loaded yet."""


@dataclass(frozen=True, slots=True)
class Generation:
    """An index as it was loaded; whoever holds it can finish with it after it was exchanged."""

    number: int  # counts from 1
    digest: str  # SHA-256 of the manifest
    searcher: Searcher

    def document(self, row: int) -> Document | None:
        """Return a stored document, or None if there is none, or none any more because the folder was replaced."""
        try:
            document = self.searcher.document(row)
        except (OSError, ValueError, KeyError, TypeError):  # another file lies there now
            return None
        if document is None or document.id != self.searcher.document_ids[row]:
            return None
        return document


class LiveIndex:
    """Holds the current generation of an index.

    Args:
        folder: Index folder or a symbolic link to one.
        load: Opens an index folder, checked against its manifest.
    """

    def __init__(self, folder: Path, load: Callable[[Path], Searcher]) -> None:
        self.folder = folder
        self.swaps = {"done": 0, "refused": 0}
        self._load = load
        self._lock = Lock()  # one exchange at a time
        self._current: Generation | None = None
        self._refused: tuple[str, float] | None = None  # digest of the manifest, when

    @property
    def current(self) -> Generation:
        """The generation that answers now.

        Raises:
            NotReady: If none is loaded yet.
        """
        if self._current is None:
            raise NotReady
        return self._current

    @property
    def ready(self) -> bool:
        """Whether an index is loaded."""
        return self._current is not None

    def swap(self, folder: Path | None = None) -> Generation:
        """Load a folder, by default the same one again, and let it answer from now on.

        The old index answers until the new one has answered a first query; requests that have begun end with the
        old one.

        Raises:
            InputError: If the folder is no whole index folder. The old index stays.
        """
        with self._lock:
            target = self.folder if folder is None else folder
            try:
                generation = self._open(target)
            except Exception:
                self.swaps["refused"] += 1
                raise
            self.folder, self._current, self._refused = target, generation, None
            self.swaps["done"] += 1
            return generation

    def poll(self) -> bool:
        """Exchange the index if its folder has another manifest; return whether that was done."""
        try:
            digest = manifest_digest(self.folder)
        except OSError:
            return False  # a folder is absent for a moment while another takes its place
        if digest == self.current.digest or self._was_refused(digest):
            return False
        try:
            generation = self.swap()
        except Exception as error:
            self._refused = (digest, time.monotonic())
            log.warning("the new content of %s is refused, the old index stays: %s", self.folder, error)
            return False
        log.warning("%s is exchanged: generation %d", self.folder, generation.number)
        return True

    def _was_refused(self, digest: str) -> bool:
        if self._refused is None or self._refused[0] != digest:
            return False
        return time.monotonic() - self._refused[1] < RETRY_SECONDS

    def _open(self, folder: Path) -> Generation:
        real = folder.resolve()  # all files of one folder, wherever a link leads a moment later
        before = _digest_or_empty(real)
        try:
            searcher = self._load(real)
            query = np.zeros(searcher.dim, np.float32) if searcher.takes_vectors else ""
            searcher.search([query], 1)  # the first search is slow, and shows that it works
        except (RuntimeError, OSError) as error:  # of FAISS, torch, the disk
            raise InputError(f"{folder} cannot be loaded: {error}. Export it again, or try later.") from error
        digest = _digest_or_empty(real)
        if digest != before:
            raise InputError(f"{folder} was replaced while it was being loaded. Try again.")
        return Generation(1 if self._current is None else self._current.number + 1, digest, searcher)


def manifest_digest(folder: Path) -> str:
    """Return the SHA-256 of a folder's manifest, which holds the SHA-256 of every other file."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _digest_or_empty(folder: Path) -> str:
    return manifest_digest(folder) if (folder / MANIFEST).is_file() else ""


def path_below(root: Path, path: str) -> Path:
    """Return the real path of `path`, relative to `root` or absolute.

    Raises:
        InputError: If it leads out of `root`, also through a symbolic link.
    """
    root = root.resolve()
    try:
        real = (root / path).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links
        raise InputError(f"{path!r} is no path. Give a folder below the swap root.") from None
    if not real.is_relative_to(root):
        raise InputError(f"{path!r} leads out of the swap root. Give a folder below it.")
    return real

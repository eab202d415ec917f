"""Inverted lists in a file of their own: built a piece at a time, and read by searches from there.

FAISS maps the file into memory, so that the system keeps what searches touch and drops the rest.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from index._faiss import load_faiss
from index.builders import FaissIndex, IVFPQBuilder, inverted_file
from retriever.heads import FaissExport

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray

__all__ = ["LISTS", "build_on_disk", "read_index"]

LISTS = "index.ivfdata"
PIECE = 1 << 21  # documents held in memory at once


def build_on_disk(
    builder: IVFPQBuilder, export: FaissExport, codes: UInt8[NDArray[np.uint8], "n size"], folder: Path
) -> FaissIndex:
    """Return the index of `builder` with its lists in `folder / LISTS`; memory is that of 2 million documents.

    Args:
        builder: A family with inverted lists.
        export: The head's export.
        codes: Packed codes, which may lie on disk, (n, code_size).
        folder: Where the lists, and for a while a copy of them, are written.
    """
    from faiss.contrib.ondisk import merge_ondisk

    outer = builder.build(export, codes[:0])
    lists = inverted_file(outer)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        names = []
        for start in range(0, len(codes), PIECE):
            piece = builder.build(export, codes[start : start + PIECE])
            part = inverted_file(piece)
            _shift_rows(part, start)
            names.append(str(Path(work) / str(start)))
            load_faiss().write_index(part, names[-1])
        with _printing_to_stderr():
            merge_ondisk(lists, names, str(folder / LISTS))
    assert lists is not None, "the family has inverted lists"
    assert lists.ntotal == len(codes), f"{lists.ntotal} of {len(codes)} documents were taken"
    outer.ntotal = lists.ntotal
    lists.nprobe = builder.probes(export, len(codes))
    return outer


def _shift_rows(lists: FaissIndex, start: int) -> None:
    """Add to the rows that lists hold; FAISS's own `shift_ids` gave wrong ones (1.15.1; 80 documents, pieces of 7)."""
    faiss = load_faiss()
    for number in range(lists.nlist):
        size = lists.invlists.list_size(number)
        if size:
            faiss.rev_swig_ptr(lists.invlists.get_ids(number), size)[:] += start


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Send what C prints to stderr: FAISS says how large its file grows, in the midst of a verb's JSON."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def read_index(path: Path) -> FaissIndex:
    """Read an index; lists in a file are looked for beside it."""
    faiss = load_faiss()
    return faiss.read_index(str(path), faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR)

"""Files of vectors: memory-mapped, read as float32 a piece at a time, checked where they enter.

  .fvecs .bvecs   rows of int32 D and D float32 or uint8 (INRIA, http://corpus-texmex.irisa.fr)
  .ivecs          the same with int32: rows of true neighbours
  .npy            NumPy
  .hdf5 .h5       FILE:DATASET (extra `hdf5`)

Shapes: n vectors, D dimensions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retriever.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import NDArray

__all__ = ["HDF5", "SUFFIXES", "VectorFile", "hdf5_names", "split_dataset"]

VECS = {".fvecs": "<f4", ".bvecs": "u1", ".ivecs": "<i4"}
HDF5 = (".hdf5", ".h5")
SUFFIXES = (*VECS, ".npy", *HDF5)
NUMBERS = ("float16", "float32", "float64", "uint8", "int8")


class VectorFile:
    """A table of numbers on disk.

    Args:
        path: A file, or FILE:DATASET for HDF5.

    Raises:
        InputError: If it is not there, cannot be read, has no row, or is not a table.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        file, dataset = split_dataset(self.path)
        if not file.is_file():
            raise InputError(f"{file} is not there. Give a vector file: {', '.join(SUFFIXES)}.")
        self._widths: NDArray[np.int32] | None = None  # what each row of an INRIA file states
        self._table: Any
        if file.suffix in VECS:
            self._table, self._widths = _map_vecs(file)
        else:
            self._table = _open_hdf5(file, dataset) if file.suffix in HDF5 else _map_npy(file)
        if len(self._table.shape) != 2 or not all(self._table.shape):
            raise InputError(
                f"{self.path} must hold a table (vectors, dimensions), got shape {tuple(self._table.shape)}."
            )
        self._are_vectors = self._table.dtype.name in NUMBERS

    def __len__(self) -> int:
        return int(self._table.shape[0])

    @property
    def dim(self) -> int:
        """Dimension D."""
        return int(self._table.shape[1])

    def vectors(self, start: int, stop: int) -> Float[NDArray[np.float32], "n D"]:
        """Return rows `start` to before `stop` as float32.

        Raises:
            InputError: If they are not numbers of a kind that vectors have, or not finite.
        """
        if not self._are_vectors:
            raise InputError(f"{self.path} holds {self._table.dtype}, but vectors are {', '.join(NUMBERS)}.")
        found: NDArray[np.float32] = self._rows(start, stop).astype(np.float32)
        if not np.isfinite(found).all():
            row = start + int((~np.isfinite(found)).any(1).argmax())
            raise InputError(f"{self.path}: row {row} holds nan or inf. Remove or mend it.")
        return found

    def numbers(self) -> Int[NDArray[np.int64], "n D"]:
        """Return all rows of a table of whole numbers.

        Raises:
            InputError: If they are not whole numbers.
        """
        table = self._rows(0, len(self))
        if table.dtype.kind not in "iu":
            raise InputError(f"{self.path} must hold row numbers (int32 or int64), got {table.dtype}.")
        return table.astype(np.int64)

    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        if self._widths is not None and (self._widths[start:stop] != self.dim).any():
            row = start + int((self._widths[start:stop] != self.dim).argmax())
            raise InputError(
                f"{self.path}: row {row} says {self._widths[row]} dimensions, row 0 {self.dim}. Write the file again."
            )
        found: NDArray[Any] = self._table[start:stop]
        return found


def split_dataset(path: str) -> tuple[Path, str]:
    """Return file and data set of FILE:DATASET, or the path itself and nothing."""
    file, colon, dataset = path.rpartition(":")
    return (Path(file), dataset) if colon and Path(file).suffix in HDF5 else (Path(path), "")


def _map_vecs(file: Path) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Return the table of an INRIA file, and the dimension that each row states."""
    dtype = np.dtype(VECS[file.suffix])
    size = file.stat().st_size
    header = np.fromfile(file, "<i4", 1)
    width = int(header[0]) if len(header) else 0
    row = np.dtype([("dim", "<i4"), ("values", dtype, (max(width, 1),))])
    if width < 1 or size % row.itemsize:
        raise InputError(
            f"{file} is not {file.suffix[1:]}: {size} bytes are no whole number of rows of {width} dimensions. "
            "Restore it."
        )
    table = np.memmap(file, row, "r")
    return np.asarray(table["values"]), np.asarray(
        table["dim"]
    )  # a memmap's own slices take 10 times as long


def _map_npy(file: Path) -> NDArray[Any]:
    try:
        found: NDArray[Any] = np.asarray(np.load(file, mmap_mode="r"))  # as above
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{file} is not a NumPy table: {error}. Write it with numpy.save.") from None
    return found


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise InputError("HDF5 files need h5py. Run: pip install 'endex[hdf5]'") from None
    return h5py


def hdf5_names(file: Path) -> set[str]:
    """Return the names of an HDF5 file's data sets.

    Raises:
        InputError: If h5py is not installed or the file is not HDF5.
    """
    try:
        with _h5py().File(file, "r") as opened:
            return set(opened)
    except OSError as error:
        raise InputError(f"{file} is not HDF5: {error}. Restore it.") from None


def _open_hdf5(file: Path, dataset: str) -> Any:
    names = hdf5_names(file)
    if dataset not in names:
        raise InputError(
            f"{file} has no data set {dataset!r}. Write {file}:NAME with one of {', '.join(sorted(names))}."
        )
    return _h5py().File(file, "r")[dataset]

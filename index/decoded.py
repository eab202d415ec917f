"""The vectors that an index's codes stand for, for engines that take no codebook: .npy and parquet.

They score as the index does, in the engine's inner product or L2 (not cosine: they are not of unit length), but take
4 bytes a dimension again (2 in float16), and what the engine's own quantization or graph does to them adds error.

Shapes: n documents, D dimensions of the head's space.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from index.interchange import BLOCK, CodeSource, ConvertReport
from retriever import InputError
from retriever.folder import publish_folder

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray

__all__ = ["VectorType", "document_columns", "write_npy", "write_parquet"]

VectorType = Literal["float32", "float16"]
NOTE = "rank by {metric}, not cosine; the engine's own quantization or graph adds error that this figure does not hold"


def write_npy(
    folder: Path, out: Path, *, dtype: VectorType = "float32", overwrite: bool = False
) -> ConvertReport:
    """Write the decoded vectors of an index folder as `vectors.npy` (n, D) and `docid`, one id a line.

    Args:
        folder: Index folder.
        out: Folder to write.
        dtype: Numbers in the file.
        overwrite: Replace an existing folder.

    Raises:
        InputError: If the index is damaged, `out` exists, or float16 cannot hold a number.
    """
    source = CodeSource(folder)
    rounder = _Rounder(dtype)
    with publish_folder(out, "vectors", overwrite=overwrite, about=_about(source, dtype)) as temporary:
        with (temporary / "vectors.npy").open("wb") as file:
            header = {
                "descr": f"<f{rounder.size}",
                "fortran_order": False,
                "shape": (len(source), source.head.out_dim),
            }
            np.lib.format.write_array_header_1_0(file, header)
            file.writelines(rounder(block).tobytes() for block in source.vectors())
        shutil.copyfile(folder / "docid", temporary / "docid")
        source.copy_query_map(temporary)
    return rounder.report(source)


def write_parquet(
    folder: Path,
    out: Path,
    *,
    dtype: VectorType = "float32",
    texts: bool = True,
    overwrite: bool = False,
    rows_per_file: int = 1 << 20,
) -> ConvertReport:
    """Write the decoded vectors of an index folder as parquet files with the columns of `document_columns`.

    Args:
        folder: Index folder.
        out: Folder to write: `part-00000.parquet`, ...
        dtype: Numbers in the files.
        texts: Write title and text too, where the index stores them.
        overwrite: Replace an existing folder.
        rows_per_file: Documents a file, rounded up to blocks of 4,096.

    Raises:
        InputError: If the index is damaged, `out` exists, or float16 cannot hold a number.
    """
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetWriter

    source = CodeSource(folder)
    rounder = _Rounder(dtype)
    texts = texts and source.has_texts
    schema = document_columns(source.head.out_dim, dtype, texts=texts)
    blocks = record_batches(source, schema, (rounder(block) for block in source.vectors()), texts=texts)
    with publish_folder(out, "vectors", overwrite=overwrite, about=_about(source, dtype)) as temporary:
        per_file = -(-rows_per_file // BLOCK)
        batch: RecordBatch | None = next(blocks, None)
        number = 0
        while batch is not None:
            with ParquetWriter(temporary / f"part-{number:05}.parquet", schema) as writer:
                for _ in range(per_file):
                    if batch is not None:
                        writer.write_batch(batch)
                        batch = next(blocks, None)
            number += 1
        source.copy_query_map(temporary)
    return rounder.report(source)


def document_columns(dim: int, dtype: VectorType, *, texts: bool) -> Any:
    """Return the arrow schema of documents: `id`, `vector` (a list of D numbers), and with texts `title`, `text`."""
    import pyarrow

    numbers = pyarrow.float32() if dtype == "float32" else pyarrow.float16()
    columns = [("id", pyarrow.string()), ("vector", pyarrow.list_(numbers, dim))]
    return pyarrow.schema(columns + [(name, pyarrow.string()) for name in ("title", "text") if texts])


def record_batches(
    source: CodeSource, schema: Any, vectors: Iterator[NDArray[Any]], *, texts: bool
) -> Iterator[Any]:
    """Yield arrow batches of ids, vectors and (with `texts`) texts, block by block."""
    import pyarrow

    documents = source.documents() if texts else None
    start = 0
    for block in vectors:
        numbers = pyarrow.array(block.reshape(-1))
        columns = [
            pyarrow.array(source.ids[start : start + len(block)], pyarrow.string()),
            pyarrow.FixedSizeListArray.from_arrays(numbers, block.shape[1]),
        ]
        if documents is not None:
            rows = next(documents)
            columns += [
                pyarrow.array([row.title for row in rows], pyarrow.string()),
                pyarrow.array([row.text for row in rows], pyarrow.string()),
            ]
        yield pyarrow.record_batch(columns, schema=schema)
        start += len(block)


def _about(source: CodeSource, dtype: VectorType) -> dict[str, Any]:
    return {**source.about, "metric": source.export.metric, "dtype": dtype}


class _Rounder:
    """Turns float32 blocks into the numbers that are written, and keeps the largest difference."""

    def __init__(self, dtype: VectorType) -> None:
        self.dtype = np.dtype(dtype)
        self.rounding = 0.0

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def __call__(self, block: Float[NDArray[np.float32], "n D"]) -> NDArray[Any]:
        """Return the block as written.

        Raises:
            InputError: If a number is outside of the type's range.
        """
        largest = float(np.abs(block).max(initial=0))
        if largest > float(np.finfo(self.dtype).max):
            raise InputError(f"float16 holds numbers up to 65504, got {largest:.0f}. Add --dtype float32.")
        written = block.astype(self.dtype)
        if self.dtype != np.float32:
            self.rounding = max(
                self.rounding, float(np.abs(written.astype(np.float32) - block).max(initial=0))
            )
        return written

    def report(self, source: CodeSource) -> ConvertReport:
        """Return what was written of a source."""
        return ConvertReport(
            ntotal=len(source),
            dim=source.head.out_dim,
            metric=source.export.metric,
            bytes_before=source.head.code_size,
            bytes_after=self.size * source.head.out_dim,
            rounding=self.rounding,
            lossless=self.rounding == 0.0,
            note=NOTE.format(metric=source.export.metric.replace("_", " ")) + source.query_note,
        )

"""Learned codebooks and lists for Lance: a dataset of the decoded vectors with our codebooks as its index, untrained.

Lance (github.com/lance-format/lance) takes centroids, a codebook and the list of every row, but no codes: it encodes
the decoded vectors again, which gives our codes except where codewords tie. What was found with pylance 14:

* Its lists must come from us (`precomputed_partition_dataset`): left to itself it takes the nearest centroid of the
  decoded vector, which need not be that of the document (overlap@10 of 0.96 to 0.98 where centroids were sampled
  vectors, 1.0 where they were k-means').
* With metric dot it encodes whole vectors, not residuals: with a residual codebook for inner products overlap@10 was
  0.2 to 0.5. So that, bits other than 4 and 8, an odd number of 4-bit codebooks, additive codes and those of a
  network get IVF_FLAT over the same lists, which scores the decoded vectors themselves, at 4 bytes a dimension.

Vectors are stored behind the rotation, as the codebook is; a query is multiplied by `rotation.npy` first. Endex
streams; the memory of Lance's own index build grows with the documents.

Shapes: n documents, D dimensions of the head's space, M codes a document, K codewords, J lists.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from index.decoded import document_columns, record_batches
from index.interchange import HEAD, CodeSource, ConvertReport, decode
from retriever import InputError, map_queries
from retriever.dual_encoder import load_query_map
from retriever.folder import publish_folder, read_manifest
from retriever.heads import FlatVectors, ProductCodebooks
from retriever.scores import Metric

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray

__all__ = ["LANCE_METRIC", "search_lance", "write_lance"]

DATASET = "documents.lance"
ROTATION = "rotation.npy"
LANCE_METRIC: dict[Metric, str] = {"inner_product": "dot", "l2": "l2"}


def write_lance(folder: Path, out: Path, *, texts: bool = True, overwrite: bool = False) -> ConvertReport:
    """Write an index folder as a Lance dataset with an index of our centroids and codebooks; nothing is trained.

    The folder holds `documents.lance` (columns `id`, `vector` and, with texts, `title`, `text`), `rotation.npy` (D, D)
    where the head has one, and `head/` where queries must pass through it.

    Args:
        folder: Index folder.
        out: Folder to write.
        texts: Write title and text too, where the index stores them.
        overwrite: Replace an existing folder.

    Raises:
        InputError: If pylance is missing, the index is damaged or uncompressed, or `out` exists.
    """
    lance = _load_lance()
    source = CodeSource(folder)
    if isinstance(source.export, FlatVectors):
        raise InputError(
            f"{folder} is uncompressed: there is no codebook for Lance. Write it with --to parquet."
        )
    texts = texts and source.has_texts
    quantized = _quantizes(source)
    schema = document_columns(source.head.out_dim, "float32", texts=texts)
    about = {**source.about, "metric": source.export.metric, "lists": len(_centroids(source))}
    with publish_folder(out, "lance", overwrite=overwrite, about=about) as temporary:
        batches = record_batches(source, schema, _rotated(source), texts=texts)
        dataset = lance.write_dataset(batches, str(temporary / DATASET), schema=schema)
        lists = temporary / "lists.lance"
        _write_lists(lance, dataset, source, lists)
        _create_index(dataset, source, lists, quantized=quantized)
        shutil.rmtree(lists)
        if "rotation" in source.arrays:
            np.save(temporary / ROTATION, source.arrays["rotation"])
        source.copy_query_map(temporary)
    return _report(source, quantized=quantized)


def search_lance(
    folder: Path, queries: Float[NDArray[np.float32], "B D"], k: int, *, nprobe: int | None = None
) -> tuple[Float[NDArray[np.float32], "B k"], list[list[str]]]:
    """Return scores, as `retriever.scores` defines them, and ids of the best documents in a folder of `write_lance`.

    Args:
        folder: What `write_lance` wrote.
        queries: Vectors of the query tower.
        k: Documents a query; at most the corpus.
        nprobe: Lists to probe, by default all.
    """
    manifest = read_manifest(folder, "lance")
    dataset = _load_lance().dataset(str(folder / DATASET))
    query_map = load_query_map(folder / HEAD)
    if query_map is not None:
        queries = map_queries(query_map, torch.from_numpy(np.asarray(queries, dtype=np.float32))).numpy()
    if (folder / ROTATION).is_file():
        queries = queries @ np.load(folder / ROTATION).T
    scores, ids = [], []
    for query in np.asarray(queries, dtype=np.float32):
        nearest = {"column": "vector", "q": query, "k": k, "nprobes": nprobe or manifest["lists"]}
        found = dataset.to_table(columns=["id", "_distance"], nearest=nearest)
        distances = found["_distance"].to_numpy()
        scores.append(1 - distances / 2 if manifest["metric"] == "l2" else 1 - distances)  # dot is 1 - q . x
        ids.append(found["id"].to_pylist())
    return np.stack(scores), ids


def _load_lance() -> Any:
    try:
        import lance
    except ModuleNotFoundError:
        raise InputError("writing for Lance needs pylance. Run: pip install 'endex[lance]'") from None
    return lance


def _quantizes(source: CodeSource) -> bool:
    """Return whether Lance's IVF_PQ gives the index's scores; see the module."""
    export = source.export
    if not isinstance(export, ProductCodebooks) or ("centroids" in source.arrays and export.metric != "l2"):
        return False
    books, codewords = export.codebooks.shape[:2]
    return codewords == 256 or (codewords == 16 and books % 2 == 0)


def _centroids(source: CodeSource) -> Float[NDArray[np.float32], "J D"]:
    """Return the centroids; for a head without lists a single zero one, residuals to which are the vectors."""
    return source.arrays.get("centroids", np.zeros((1, source.head.out_dim), dtype=np.float32))


def _rotated(source: CodeSource) -> Iterator[Float[NDArray[np.float32], "n D"]]:
    """Yield decoded vectors behind the rotation."""
    arrays = source.arrays
    if "codebooks" not in arrays:  # a network decodes
        yield from source.vectors()
        return
    additive = not isinstance(source.export, ProductCodebooks)
    for lists, codes in source.split_codes():
        yield decode(arrays["codebooks"], arrays.get("centroids"), codes, lists, additive=additive)


def _write_lists(lance: Any, dataset: Any, source: CodeSource, path: Path) -> None:
    """Write the list of every row under Lance's row numbers, in one file, as it wants them."""
    import pyarrow

    schema = pyarrow.schema([("row_id", pyarrow.uint64()), ("partition", pyarrow.uint32())])

    def batches() -> Iterator[Any]:
        rows = dataset.scanner(columns=[], with_row_id=True, scan_in_order=True).to_batches()
        row_ids = (row for batch in rows for row in batch["_rowid"].to_pylist())
        for lists, codes in source.split_codes():
            numbers = np.zeros(len(codes), dtype=np.uint32) if lists is None else lists.astype(np.uint32)
            block = np.fromiter(row_ids, dtype=np.uint64, count=len(codes))
            yield pyarrow.record_batch([pyarrow.array(block), pyarrow.array(numbers)], schema=schema)

    rows_per_file = max(len(source), 1024)
    lance.write_dataset(batches(), str(path), schema=schema, max_rows_per_file=rows_per_file)


def _create_index(dataset: Any, source: CodeSource, lists: Path, *, quantized: bool) -> None:
    centroids = _centroids(source)
    options: dict[str, Any] = {}
    if quantized:
        codebooks = source.arrays["codebooks"]
        nbits = (codebooks.shape[1] - 1).bit_length()
        options = {"num_sub_vectors": len(codebooks), "num_bits": nbits, "pq_codebook": codebooks}
    dataset.create_index(
        "vector",
        "IVF_PQ" if quantized else "IVF_FLAT",
        metric=LANCE_METRIC[source.export.metric],
        num_partitions=len(centroids),
        ivf_centroids=centroids,
        precomputed_partition_dataset=str(lists),
        **options,
    )


def _report(source: CodeSource, *, quantized: bool) -> ConvertReport:
    vector = 4 * source.head.out_dim
    kind = "IVF_PQ with our codebooks" if quantized else "IVF_FLAT, since Lance has no IVF_PQ for these codes"
    return ConvertReport(
        ntotal=len(source),
        dim=source.head.out_dim,
        metric=source.export.metric,
        bytes_before=source.head.code_size,
        bytes_after=vector + (source.export.codebooks.shape[0] if quantized else vector),  # type: ignore[attr-defined]
        rounding=0.0,
        lossless=True,
        note=kind
        + source.query_note
        + (f"; multiply queries by {ROTATION}" if "rotation" in source.arrays else ""),
    )

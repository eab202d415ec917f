"""Searcher: an index folder that answers text queries.

Shapes: B queries, D dimensions, k results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from index._faiss import load_faiss
from index.builders import inverted_file, search_index
from retriever import Document, DualEncoder, Encoder, InputError, Precision, embed_queries, model_fingerprint
from retriever.folder import check_folder
from retriever.heads import NoCompressionConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import NDArray

__all__ = ["Searcher"]


class Searcher:
    """Searches an index folder.

    Args:
        folder: What `endex export` wrote. Every file is checked against its manifest.
        model: A model folder that must be the one the index was made with; its query tower is used instead of
            the copy in the index folder.
        nprobe: Inverted lists that a search probes; by default what the folder says.

    Raises:
        InputError: If the folder is damaged or unfinished, or was made with another model, or has no lists to probe.
    """

    def __init__(self, folder: Path, *, model: Path | None = None, nprobe: int | None = None) -> None:
        manifest = check_folder(folder, "index")
        if model is not None and model_fingerprint(model) != manifest["model"]:
            raise InputError(
                f"{folder} was made with another model than {model}: their scores have no common meaning. "
                f"Export the corpus with {model} again."
            )
        self.folder = folder
        self.manifest: dict[str, Any] = manifest
        self.faiss_index = load_faiss().read_index(str(folder / "index"))
        self.document_ids = (folder / "docid").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if self.faiss_index.ntotal != len(self.document_ids):
            raise InputError(
                f"{folder / 'docid'} names {len(self.document_ids)} documents, but the index holds "
                f"{self.faiss_index.ntotal}. Export the corpus again."
            )
        if nprobe is not None:
            self.probe(nprobe)
        self._model = DualEncoder.load(model) if model else self._embedded_model(folder / "encoder")
        self._offsets = self._read_offsets()

    @property
    def dim(self) -> int:
        """Dimension D of query vectors."""
        return int(self.faiss_index.d)

    def probe(self, nprobe: int) -> None:
        """Probe so many inverted lists from now on.

        Raises:
            InputError: If the index has no lists, or fewer.
        """
        lists = inverted_file(self.faiss_index)
        if (
            lists is None or not lists.quantizer.reconstruct_n(0, lists.nlist).any()
        ):  # zero centroids: all are probed
            raise InputError(
                f"{self.folder} has no inverted lists: nprobe={nprobe} has no meaning. Leave it out."
            )
        if not 1 <= nprobe <= lists.nlist:
            raise InputError(
                f"nprobe must be between 1 and {lists.nlist}, the lists of the index; got {nprobe}."
            )
        lists.nprobe = nprobe

    def search(
        self, queries: Sequence[str], k: int = 10, *, precision: Precision = "fp32"
    ) -> tuple[Float[NDArray[np.float32], "B k"], list[list[str]]]:
        """Return the k best documents of each query: scores (B, k) in falling order, and their ids.

        A query whose probed lists hold fewer than k documents has fewer ids, and scores -inf in their place.
        """
        if not queries:
            raise InputError("there is no query to search for. Give at least one.")
        vectors = embed_queries(self._model, queries, precision=precision)
        scores, rows = self.search_vectors(vectors.numpy(), k)
        return scores, [[self.document_ids[row] for row in result if row >= 0] for result in rows]

    def search_vectors(
        self, vectors: Float[NDArray[np.float32], "B D"], k: int = 10
    ) -> tuple[Float[NDArray[np.float32], "B k"], Int[NDArray[np.int64], "B k"]]:
        """Return scores (B, k) and index rows (B, k) of the k best documents; k is cut at the corpus size.

        Where the probed lists hold fewer documents, the rest are rows -1 with scores -inf.

        Raises:
            InputError: If k is not positive or the vectors are not of the index's dimension.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}.")
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(f"query vectors must have shape (B, {self.dim}), got {vectors.shape}.")
        return search_index(self.faiss_index, vectors, min(k, len(self.document_ids)))

    def document(self, row: int) -> Document | None:
        """Return a stored document by index row; None if the folder was exported without texts."""
        if self._offsets is None:
            return None
        with (self.folder / "documents.jsonl").open("rb") as file:
            file.seek(int(self._offsets[row]))
            stored = json.loads(file.readline())
        return Document(stored["_id"], stored["title"], stored["text"])

    def to(self, device: str | torch.device) -> Searcher:
        """Move the query tower to a device."""
        self._model.to(device)
        return self

    def _embedded_model(self, folder: Path) -> DualEncoder:
        encoder = Encoder.load(folder)
        return DualEncoder(encoder, encoder, NoCompressionConfig().build(encoder.dim)).eval()

    def _read_offsets(self) -> NDArray[np.uint64] | None:
        path = self.folder / "documents.offsets"
        return np.memmap(path, dtype="<u8", mode="r") if path.is_file() else None

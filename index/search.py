"""Searcher: an index folder that answers queries: texts, or vectors where it was made from vectors.

Shapes: B queries, D dimensions of their vectors, E of the index (D unless the head maps), k results.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from index._faiss import load_faiss
from index.builders import FaissIndex, inverted_file, search_index
from index.filters import search_among, search_parameters
from index.gpu import to_gpu
from index.lines import Lines
from index.on_disk import read_index
from index.stages import Cascade, Widths
from index.tables import TableScan
from retriever import (
    Document,
    DualEncoder,
    Encoder,
    InputError,
    Precision,
    Query,
    embed_queries,
    map_queries,
    model_fingerprint,
)
from retriever.dual_encoder import load_query_map
from retriever.folder import check_folder
from retriever.heads import NoCompressionConfig
from retriever.scores import Metric

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import NDArray

__all__ = ["Searcher"]


class Searcher:
    """Searches an index folder.

    Args:
        folder: What `endex export` wrote. It is checked against its manifest: the size of every file, and the
            checksum of those up to 16 MiB.
        model: A model folder that must be the one the index was made with; its query tower is used instead of
            the copy in the index folder.
        nprobe: Inverted lists that a search probes; by default what the folder says.
        widths: Documents that the stages of a cascade pass on; by default what the folder says.
        tables: Documents up to which additive codes without norms (`index.norms` none) are laid out in memory once
            more, in a form that is searched many times faster, with the same scores: M + 11 bytes a document, and some
            seconds a million. 0: never.
        verify: Compare the checksum of every file.

    Raises:
        InputError: If the folder is damaged or unfinished, or was made with another model, or has no lists to probe,
            or no stages.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: str | Path | None = None,
        nprobe: int | None = None,
        widths: Widths | None = None,
        tables: int = 1_000_000,
        verify: bool = False,
    ) -> None:
        folder = Path(folder)
        manifest = check_folder(folder, "index", full=verify)
        if model is not None and model_fingerprint(model) != manifest["model"]:
            raise InputError(
                f"{folder} was made with another model than {model}: their scores have no common meaning. "
                f"Export the corpus with {model} again."
            )
        self.folder = folder
        self.manifest: dict[str, Any] = manifest
        self.faiss_index = read_index(folder / "index")
        self.document_ids = Lines(folder / "docid")
        if self.faiss_index.ntotal != len(self.document_ids):
            raise InputError(
                f"{folder / 'docid'} names {len(self.document_ids)} documents, but the index holds "
                f"{self.faiss_index.ntotal}. Export the corpus again."
            )
        self._clone: FaissIndex | None = None
        self._cascade = self._load_cascade(widths or Widths())
        self._query_map = load_query_map(folder / "head")
        self._tables = TableScan.of(folder, self.faiss_index, self._query_map, most=tables)
        if nprobe is not None:
            self.probe(nprobe)
        self._model = DualEncoder.load(model) if model else self._embedded_model(folder / "encoder")
        self._offsets, self._texts = self._map_texts()
        self._row_of: dict[str, int] | None = None

    @property
    def dim(self) -> int:
        """Dimension D of query vectors."""
        return int(self.faiss_index.d) if self._query_map is None else self._query_map.dim

    @property
    def metric(self) -> Metric:
        """Score contract of the index."""
        if self._cascade:
            return self._cascade.export.metric
        return "l2" if self.faiss_index.metric_type == load_faiss().METRIC_L2 else "inner_product"

    @property
    def takes_vectors(self) -> bool:
        """Whether queries are vectors instead of texts."""
        return self._model.takes_vectors

    @property
    def normalizes(self) -> bool:
        """Whether queries become unit vectors."""
        return self._model.query_encoder.settings.normalize

    @property
    def milliseconds(self) -> dict[str, float]:
        """Mean milliseconds a query of each stage of a cascade, over all searches so far; empty for other forms."""
        return self._cascade.times.milliseconds() if self._cascade else {}

    def probe(self, nprobe: int) -> None:
        """Probe so many inverted lists from now on.

        Raises:
            InputError: If the index has no lists, or fewer.
        """
        self._lists(nprobe).nprobe = nprobe
        if self._tables is not None:
            self._tables.probe(nprobe)
        if self._clone is not None:
            load_faiss().GpuParameterSpace().set_index_parameter(self._clone, "nprobe", nprobe)

    def embed(
        self, queries: Sequence[Query], *, precision: Precision = "fp32"
    ) -> Float[NDArray[np.float32], "B D"]:
        """Return the vectors of query texts, or of query vectors as the model's tower makes them."""
        if not queries:
            raise InputError("there is no query to search for. Give at least one.")
        return embed_queries(self._model, queries, precision=precision).numpy()

    def search(
        self,
        queries: Sequence[Query],
        k: int = 10,
        *,
        precision: Precision = "fp32",
        nprobe: int | None = None,
        widths: Widths | None = None,
        ids: Collection[str] | None = None,
    ) -> tuple[Float[NDArray[np.float32], "B k"], list[list[str]]]:
        """Return the k best documents of each query: scores (B, k) in falling order, and their ids.

        A query with fewer than k documents, in the lists that it probes or among `ids`, has fewer ids, and scores
        -inf in their place. Arguments as in `search_vectors`.
        """
        vectors = self.embed(queries, precision=precision)
        scores, rows = self.search_vectors(vectors, k, nprobe=nprobe, widths=widths, ids=ids)
        return scores, [[self.document_ids[row] for row in result if row >= 0] for result in rows]

    def search_vectors(
        self,
        vectors: Float[NDArray[np.float32], "B D"],
        k: int = 10,
        *,
        nprobe: int | None = None,
        widths: Widths | None = None,
        ids: Collection[str] | None = None,
    ) -> tuple[Float[NDArray[np.float32], "B k"], Int[NDArray[np.int64], "B k"]]:
        """Return scores (B, k) and index rows (B, k) of the k best documents; k is cut at the corpus size.

        Where there are fewer documents, the rest are rows -1 with scores -inf. Safe to call from several threads.

        Args:
            vectors: Query vectors, as `embed` returns them.
            k: Documents a query.
            nprobe: Inverted lists probed by this search.
            widths: Documents that the stages of a cascade pass on in this search.
            ids: Documents to choose from; by default all. An index with lists takes them from the lists it probes.

        Raises:
            InputError: If k is not positive, the vectors are not of the index's dimension or not finite, an id is
                unknown, or there are no lists to probe, or no stages.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}.")
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(f"query vectors must have shape (B, {self.dim}), got {vectors.shape}.")
        if not np.isfinite(vectors).all():
            raise InputError("query vectors must be finite, got nan or inf. Check what computed them.")
        if nprobe is not None:
            self._lists(nprobe)
        if self._query_map is not None:
            rows = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
            vectors = map_queries(self._query_map, rows).numpy()
        k = min(k, len(self.document_ids))
        if self._cascade:
            among = None if ids is None else self.rows(ids)
            return self._cascade.search(vectors, k, widths=widths, nprobe=nprobe, rows=among)
        self._refuse_widths(widths or Widths())
        if ids is None and self._tables is not None:
            return self._tables.search(vectors, k, nprobe)
        if ids is None:
            built = self._clone or self.faiss_index
            parameters = None if nprobe is None else search_parameters(built, nprobe=nprobe)
            if nprobe is not None and parameters is None:
                raise InputError(
                    f"FAISS takes no nprobe with a single search of this form, got {nprobe}. Set it for all: "
                    "Searcher(folder, nprobe=...)."
                )
            return search_index(built, vectors, k, parameters)
        return search_among(self.faiss_index, vectors, k, self.rows(ids), nprobe=nprobe)

    def rows(self, ids: Collection[str]) -> Int[NDArray[np.int64], " n"]:
        """Return the index rows of documents, ascending. The first call reads all ids into memory.

        Raises:
            InputError: If an id is unknown.
        """
        if self._row_of is None:
            self._row_of = {name: row for row, name in enumerate(self.document_ids)}
        try:
            return np.unique(np.array([self._row_of[name] for name in ids], dtype=np.int64))
        except KeyError as error:
            raise InputError(
                f"there is no document {error.args[0]!r} in {self.folder}. Correct the id."
            ) from None

    def to_gpu(
        self,
        devices: Sequence[int] = (0,),
        *,
        k: int = 10,
        nprobe: int | None = None,
        mode: Literal["shards", "replicas"] = "shards",
    ) -> Searcher:
        """Search on cards from now on; searches among `ids` stay on the CPU.

        Args:
            devices: Cards as CUDA counts them.
            k: The most documents that a search will ask for.
            nprobe: The most lists that a search will probe; by default the index's own.
            mode: `shards` divides the documents among the cards, `replicas` the queries.

        Raises:
            InputError: If FAISS cannot have this index on these cards; every reason is named.
        """
        if self._cascade:
            raise InputError(
                f"{self.folder} is searched by stages, which FAISS has not on cards. Leave out the cards, or let the "
                "network decode on one: Searcher.to('cuda')."
            )
        self._clone = to_gpu(self.faiss_index, devices=devices, k=k, nprobe=nprobe, mode=mode)
        return self

    def document(self, row: int) -> Document | None:
        """Return a stored document by index row; None if the folder was exported without texts."""
        if self._offsets is None or self._texts is None:
            return None
        start = int(self._offsets[row])
        stored = json.loads(self._texts[start : self._texts.find(b"\n", start)])
        return Document(stored["_id"], stored["title"], stored["text"])

    def to(self, device: str | torch.device) -> Searcher:
        """Move the query tower to a device, and where there are, the head's query map and the network of a cascade."""
        self._model.to(device)
        if self._query_map is not None:
            self._query_map.to(device)
        if self._cascade:
            self._cascade.to(device)
        return self

    def _lists(self, nprobe: int) -> FaissIndex:
        """Return the inverted lists, so many of which can be probed."""
        lists = inverted_file(self.faiss_index)
        if lists is None or not any(  # zero centroids: all are probed
            lists.quantizer.reconstruct(row).any() for row in range(lists.nlist)
        ):
            raise InputError(
                f"{self.folder} has no inverted lists: nprobe={nprobe} has no meaning. Leave it out."
            )
        if not 1 <= nprobe <= lists.nlist:
            raise InputError(
                f"nprobe must be between 1 and {lists.nlist}, the lists of the index; got {nprobe}."
            )
        return lists

    def _load_cascade(self, widths: Widths) -> Cascade | None:
        """Return the stages of a cascade, None for other forms."""
        stored = self.manifest.get("cascade")
        if stored is None:
            self._refuse_widths(widths)
            return None
        return Cascade.load(self.folder, self.faiss_index, widths.over(Widths(**stored)))

    def _refuse_widths(self, widths: Widths) -> None:
        if widths.given:
            raise InputError(
                f"{self.folder} is no cascade: shortlist and rerank have no meaning. Leave them out."
            )

    def _embedded_model(self, folder: Path) -> DualEncoder:
        encoder = Encoder.load(folder)
        return DualEncoder(encoder, encoder, NoCompressionConfig().build(encoder.dim)).eval()

    def _map_texts(self) -> tuple[NDArray[np.uint64] | None, mmap.mmap | None]:
        """Return the offsets and the texts; both stay those of this folder when it is replaced."""
        if not (self.folder / "documents.offsets").is_file():
            return None, None
        with (self.folder / "documents.jsonl").open("rb") as file:
            texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.memmap(self.folder / "documents.offsets", dtype="<u8", mode="r"), texts

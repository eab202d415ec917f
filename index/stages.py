"""Search by stages: FAISS's short list, pair tables, the network's own decoding and exact scores.

Shapes: B queries, D dimensions, W documents of a stage, k results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from index.builders import FaissIndex, inverted_file, search_index
from index.decoders import decode_linear, decode_rows, load_decoders
from index.filters import score_decoded, search_among, search_parameters
from retriever.dual_encoder import load_head
from retriever.errors import InputError
from retriever.heads import CompressionHead, NeuralCodec
from retriever.scores import score_matrix

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = ["DECODERS", "Cascade", "StageTimes", "Widths"]

DECODERS = "decoders.safetensors"
BATCH_NUMBERS = 1 << 26  # of decoded vectors held at once, 256 MB


@dataclass(frozen=True, kw_only=True)
class Widths:
    """How many documents of a query each stage of a cascade passes on; what is left out is the index's own.

    Attributes:
        shortlist: Documents that a search takes from FAISS, at least the k it asks for.
        rerank: Documents that the network decodes, at least k. Without pair tables it decodes the whole short list.
    """

    shortlist: int | None = None
    rerank: int | None = None

    def __post_init__(self) -> None:
        for name in ("shortlist", "rerank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")

    @property
    def given(self) -> bool:
        """Whether one is not left out."""
        return self != Widths()

    def over(self, other: Widths) -> Widths:
        """Return these widths, and the other's where these are left out."""
        return Widths(
            shortlist=self.shortlist or other.shortlist,
            rerank=self.rerank or other.rerank,
        )


class StageTimes:
    """Seconds by stage, of all searches of all threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._seconds: dict[str, float] = {}
        self._queries = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a block."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def count(self, queries: int) -> None:
        """Count queries."""
        with self._lock:
            self._queries += queries

    def milliseconds(self) -> dict[str, float]:
        """Return the milliseconds a query by stage, in the order of the search."""
        with self._lock:
            return {name: 1000 * value / max(1, self._queries) for name, value in self._seconds.items()}


class Cascade:
    """Searches a neural codec's documents by stages.

    Args:
        built: FAISS index of the linear decoder.
        head: Decodes codes.
        codes: Packed codes of all documents, in index order; may lie on disk.
        export: The head's export with its linear decoders.
        widths: Of the stages, unless a search says otherwise.
    """

    def __init__(
        self,
        built: FaissIndex,
        head: CompressionHead,
        codes: UInt8[NDArray[np.uint8], "n size"],
        export: NeuralCodec,
        widths: Widths,
    ) -> None:
        self.built = built
        self.head = head
        self.codes = codes
        self.export = export
        self.widths = widths
        self.times = StageTimes()

    @classmethod
    def load(cls, folder: Path, built: FaissIndex, widths: Widths) -> Cascade:
        """Read head, codes and decoders of an index folder; the codes stay on disk."""
        head = load_head(folder / "head").eval()
        export = head.export()
        assert isinstance(export, NeuralCodec), "the folder says that it is a cascade"
        codes = np.memmap(folder / "codes.u8", dtype=np.uint8, mode="r").reshape(-1, head.code_size)
        return cls(built, head, codes, load_decoders(folder / DECODERS, export), widths)

    def search(
        self,
        queries: Float[NDArray[np.float32], "B D"],
        k: int,
        *,
        widths: Widths | None = None,
        nprobe: int | None = None,
        rows: Int[NDArray[np.int64], " n"] | None = None,
    ) -> tuple[Float[NDArray[np.float32], "B k"], Int[NDArray[np.int64], "B k"]]:
        """Return scores (B, k) of the head's decoded vectors, falling, and rows (B, k).

        Where there are fewer documents, the rest are rows -1 with scores -inf.

        Args:
            queries: Query vectors.
            k: Documents a query.
            widths: Of the stages of this search.
            nprobe: Inverted lists probed.
            rows: Documents to choose from, ascending; by default all.
        """
        chosen = widths.over(self.widths) if widths else self.widths
        shortlist, rerank = max(chosen.shortlist or 0, k), max(chosen.rerank or 0, k)
        shortlist = min(shortlist, len(self.codes))
        size = max(1, BATCH_NUMBERS // (shortlist * self.export.dim))
        parts = []
        for start in range(0, max(1, len(queries)), size):
            part = np.ascontiguousarray(queries[start : start + size], dtype=np.float32)
            with self.times.stage("shortlist"):
                found = self._shortlist(part, shortlist, nprobe, rows)
            if self.export.tables is not None and rerank < found.shape[1]:
                with self.times.stage("pairwise"):
                    _, found = self._best(part, found, rerank, self._decode_pairs)
            with self.times.stage("neural"):
                parts.append(self._best(part, found, k, self._decode))
        self.times.count(len(queries))
        scores, best = (np.concatenate(values) for values in zip(*parts, strict=True))
        return scores, best

    def to(self, device: str | torch.device) -> None:
        """Decode on a device from now on."""
        self.head.to(device)

    def _shortlist(
        self,
        queries: Float[NDArray[np.float32], "B D"],
        width: int,
        nprobe: int | None,
        rows: Int[NDArray[np.int64], " n"] | None,
    ) -> Int[NDArray[np.int64], "B W"]:
        """Return the rows that are best by the first-order decoder, -1 where there are no more."""
        if rows is None:
            parameters = search_parameters(self.built, nprobe=nprobe) if nprobe else None
            return search_index(self.built, queries, width, parameters)[1]
        if len(rows) <= width and nprobe is None:
            return np.broadcast_to(rows, (len(queries), len(rows)))
        if inverted_file(self.built) is not None:
            return search_among(self.built, queries, width, rows, nprobe=nprobe)[1]
        return score_decoded(self._decode_sums, queries, width, rows, metric=self.export.metric)[1]

    @torch.no_grad()
    def _best(
        self,
        queries: Float[NDArray[np.float32], "B D"],
        candidates: Int[NDArray[np.int64], "B W"],
        k: int,
        decode: Callable[[Int[NDArray[np.int64], " r"]], Float[Tensor, "r D"]],
    ) -> tuple[Float[NDArray[np.float32], "B k"], Int[NDArray[np.int64], "B k"]]:
        """Return scores, falling, and rows of the k best candidates of each query; each row is decoded once."""
        rows, inverse = np.unique(candidates, return_inverse=True)
        missing = int(len(rows) > 0 and rows[0] < 0)  # -1 comes first
        rows, places = rows[missing:], torch.from_numpy(inverse.reshape(candidates.shape)) - missing
        vectors = decode(rows)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        best = np.full((len(queries), k), -1, np.int64)
        for query, place in enumerate(places):
            own = place[place >= 0]
            values = score_matrix(torch.from_numpy(queries[query, None]), vectors[own], self.export.metric)[0]
            found = values.topk(min(k, len(own)))
            scores[query, : len(own)] = found.values.numpy()
            best[query, : len(own)] = rows[own[found.indices].numpy()]
        return scores, best

    def _numbers(self, rows: Int[NDArray[np.int64], " r"]) -> Int[Tensor, "r M"]:
        return self.head.unpack(np.asarray(self.codes[rows]))

    def _decode_sums(self, rows: Int[NDArray[np.int64], " r"]) -> Float[Tensor, "r D"]:
        return decode_linear(self.export, self._numbers(rows), pairwise=False)

    def _decode_pairs(self, rows: Int[NDArray[np.int64], " r"]) -> Float[Tensor, "r D"]:
        return decode_linear(self.export, self._numbers(rows), pairwise=True)

    def _decode(self, rows: Int[NDArray[np.int64], " r"]) -> Float[Tensor, "r D"]:
        pieces = list(decode_rows(self.head, self.codes, rows))
        return torch.cat(pieces) if pieces else torch.empty(0, self.export.dim)

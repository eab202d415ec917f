"""What every compression head is.

Shapes: N vectors, D dimensions, E dimensions after compression (D unless the head maps), M codes a vector,
K = 2**bits values a code, S = E // M sub-dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from retriever.heads.exports import FaissExport
from retriever.scores import Metric

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = [
    "CompressionHead",
    "HeadConfig",
    "HeadOutput",
    "QuantizerFit",
    "list_number_size",
    "pack_codes",
    "pack_list_numbers",
    "unpack_codes",
]


@dataclass(frozen=True, kw_only=True)
class HeadConfig(ABC):
    """Base of the heads' configurations; choose one by `class_path`.

    Attributes:
        maps: Whether the head compares queries and documents in a space of its own; see `CompressionHead.map_queries`.
        learns_from_queries: Whether the warm start wants queries, too; see `CompressionHead.warm_start_to_rank`.
    """

    name: ClassVar[str] = ""
    maps: ClassVar[bool] = False
    learns_from_queries: ClassVar[bool] = False

    def wants_crops(self, queries: int) -> bool:
        """Return whether the warm start wants crops of documents beside so many training queries."""
        return False

    @abstractmethod
    def build(self, dim: int) -> CompressionHead:
        """Return the head for vectors of `dim` dimensions."""

    @abstractmethod
    def check(self, dim: int) -> None:
        """Raise InputError if the head cannot compress vectors of `dim` dimensions."""

    @property
    def selects_softly(self) -> bool:
        """Whether codes have probabilities, so that `HeadOutput.log_assignment` is there."""
        return False

    def check_sample(self, documents: int) -> None:  # noqa: B027
        """Raise InputError if so many documents are too few for the head's warm start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOutput:
    """What a head returns in training.

    Attributes:
        reconstruction: decode(encode(x)) with the method's gradient estimator, (N, E).
        codes: Selected codewords, (N, M).
        losses: Weighted auxiliary losses by name (distortion, commitment ...).
        log_assignment: log-probability of each vector's codes, summed over M, (N,); None where the
            estimator has no selection probability.
        coarse: The part of the reconstruction that a document's inverted list stands for, (N, E); None where there
            are no lists.
        mapped: What the reconstruction stands for, the vectors in the head's own space, (N, E); None where that is
            the towers' space.
    """

    reconstruction: Float[Tensor, "N E"]
    codes: Int[Tensor, "N M"]
    losses: dict[str, Tensor] = field(default_factory=dict)
    log_assignment: Float[Tensor, " N"] | None = None
    coarse: Float[Tensor, "N E"] | None = None
    mapped: Float[Tensor, "N E"] | None = None


class QuantizerFit(Protocol):
    """Fits starting values of a quantizer; implemented with FAISS in `index.clustering`."""

    def product_codebooks(
        self, sample: Float[Tensor, "n D"], *, num_codebooks: int, codebook_bits: int, rotate: bool, seed: int
    ) -> tuple[Float[Tensor, "D D"] | None, Float[Tensor, "M K S"]]:
        """Return the rotation (None unless `rotate`) and the codebooks of a product quantizer."""
        ...

    def coarse_product_codebooks(
        self,
        sample: Float[Tensor, "n D"],
        *,
        num_lists: int,
        num_codebooks: int,
        codebook_bits: int,
        rotate: bool,
        on_residuals: bool,
        seed: int,
        leave_one_out: bool = False,
    ) -> tuple[Float[Tensor, "D D"] | None, Float[Tensor, "J D"], Float[Tensor, "M K S"]]:
        """Return rotation (None unless `rotate`), coarse centroids and codebooks, both in the rotated space.

        The codebooks fit the residuals to the nearest centroids, or whole vectors unless `on_residuals`. With
        `leave_one_out` no document of the sample has a part in the centroid that it is held against.
        """
        ...

    def additive_codebooks(
        self,
        sample: Float[Tensor, "n D"],
        *,
        num_codebooks: int,
        codebook_bits: int,
        beam: int,
        seed: int,
        leave_one_out: bool = False,
    ) -> Float[Tensor, "M K D"]:
        """Return the codebooks of a residual quantizer, fitted with a beam of so many sums.

        With `leave_one_out` no document of the sample has a part in the codewords that it is held against.
        """
        ...

    def coarse_additive_codebooks(
        self,
        sample: Float[Tensor, "n D"],
        *,
        num_lists: int,
        num_codebooks: int,
        codebook_bits: int,
        beam: int,
        seed: int,
        leave_one_out: bool = False,
        list_beam: int = 1,
    ) -> tuple[Float[Tensor, "J D"], Float[Tensor, "M K D"]]:
        """Return coarse centroids, and the codebooks of a residual quantizer of the residuals to the nearest ones.

        With `leave_one_out` as in `additive_codebooks`, of the residuals to the `list_beam` nearest.
        """
        ...


class CompressionHead(nn.Module, ABC):
    """Learned compression of document vectors.

    Args:
        dim: Dimension D of the vectors.
        num_codes: Codes of a vector.
        code_bits: Bits of a code; a head whose codes differ in bits overrides `code_size`, `pack` and `unpack`.
        metric: Score contract of training, evaluation and index.
        out_dim: Dimension E of the decoded vectors, with which mapped queries are compared; by default D.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_codes: int,
        code_bits: int,
        metric: Metric = "inner_product",
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.out_dim = out_dim or dim
        self.num_codes = num_codes
        self.code_bits = code_bits
        self.metric: Metric = metric

    @property
    def code_size(self) -> int:
        """Bytes of a compressed vector."""
        return (self.num_codes * self.code_bits + 7) // 8

    @property
    def rate(self) -> float:
        """Bits that tell a document from others: those of its code, and of its list's number where there are lists."""
        return self.num_codes * self.code_bits

    @property
    @abstractmethod
    def config(self) -> HeadConfig:
        """The configuration that built this head."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "N D"]) -> HeadOutput:
        """Compress with gradients."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N M"]:
        """Return the codes of vectors."""

    @abstractmethod
    def decode(self, codes: Int[Tensor, "N M"]) -> Float[Tensor, "N E"]:
        """Return the vectors that codes stand for."""

    def map_queries(self, queries: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        """Return queries in the space of the decoded vectors: those themselves unless the head has a space of its own.

        Wherever a query meets a decoded vector, it is mapped first. Documents are mapped alike, in `encode`. A map is
        that of the finished model also in training, where `compress_batch` takes its place.
        """
        return queries

    def compress_batch(
        self, documents: Float[Tensor, "N D"], queries: Float[Tensor, "B D"]
    ) -> tuple[HeadOutput, Float[Tensor, "B E"]]:
        """Return `forward` of the documents and the mapped queries of a training batch, with gradients to both."""
        return self(documents), self.map_queries(queries)

    def pack(self, codes: Int[Tensor, "N M"]) -> NDArray[np.uint8]:
        """Return the bytes that FAISS's `add_sa_codes` takes, (N, code_size)."""
        return pack_codes(codes, self.code_bits)

    def unpack(self, packed: UInt8[NDArray[np.uint8], "N size"]) -> Int[Tensor, "N M"]:
        """Invert `pack`."""
        return unpack_codes(packed, self.num_codes, self.code_bits)

    @abstractmethod
    def export(self) -> FaissExport:
        """Return what an index needs, as plain tensors."""

    @abstractmethod
    def warm_start(self, sample: Float[Tensor, "n D"], fit: QuantizerFit, seed: int) -> None:
        """Set starting values from a sample of live vectors."""

    def warm_start_to_rank(
        self,
        sample: Float[Tensor, "n D"],
        queries: Sequence[Float[Tensor, "m D"]],
        fit: QuantizerFit,
        seed: int,
    ) -> None:
        """Set starting values from samples of live vectors of documents and of queries.

        Args:
            sample: Documents.
            queries: Of one kind or several (judged, crops), each of which counts as much as another.
            fit: Fits quantizers.
            seed: Of what is drawn.
        """
        self.warm_start(sample, fit, seed)

    def manual_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that `descend` moves instead of the optimizer."""
        return []

    def descend(self, factor: float, generator: torch.Generator) -> None:
        """Move the manual parameters down their gradients.

        Args:
            factor: Place in the learning rate schedule, 0 to 1.
            generator: Random numbers, equal on every device.
        """

    @abstractmethod
    def count(self, codes: Int[Tensor, "N M"]) -> None:
        """Add codes to the usage counts of the current window."""

    @abstractmethod
    def usage_statistics(self) -> dict[str, float]:
        """Return perplexity and dead codes of the current window; empty where there is no codebook."""

    @abstractmethod
    def restart_dead_codes(
        self, x: Float[Tensor, "N E"], generator: torch.Generator
    ) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """Once the current window is full, replace codewords it left unused by vectors from `x`; start a new one.

        Args:
            x: Vectors as `HeadOutput.mapped` has them, or documents where the head does not map.
            generator: Random numbers, equal on every device.

        Returns:
            For each changed parameter the mask of its restarted rows, so that an optimizer can forget them.
        """


def pack_codes(codes: Int[Tensor, "N M"], code_bits: int) -> NDArray[np.uint8]:
    """Pack codes as FAISS does: little-endian, `code_bits` bits each, rows padded to whole bytes.

    Returns:
        Bytes, (N, ceil(M * code_bits / 8)).
    """
    values = codes.cpu().numpy()
    if code_bits == 8:
        return values.astype(np.uint8)
    if code_bits == 32:
        return values.astype("<i4").view(np.uint8).reshape(len(values), -1)
    bits = (values[:, :, None].astype(np.int64) >> np.arange(code_bits)) & 1  # (N, M, bits), lowest bit first
    return np.packbits(bits.astype(np.uint8).reshape(len(values), -1), axis=1, bitorder="little")


def list_number_size(num_lists: int) -> int:
    """Return the bytes of a list number, as `faiss.IndexIVF` counts them: those of `num_lists` - 1."""
    return ((num_lists - 1).bit_length() + 7) // 8


def pack_list_numbers(lists: Int[NDArray[np.int64], " N"], num_lists: int) -> NDArray[np.uint8]:
    """Return list numbers as `faiss.IndexIVF` writes them before a code: little-endian, bytes of `num_lists` - 1."""
    return lists.astype("<u8").view(np.uint8).reshape(len(lists), 8)[:, : list_number_size(num_lists)]


def unpack_codes(
    packed: UInt8[NDArray[np.uint8], "N size"], num_codes: int, code_bits: int
) -> Int[Tensor, "N M"]:
    """Invert `pack_codes`."""
    packed = np.ascontiguousarray(packed)
    if code_bits == 8:
        return torch.from_numpy(packed.astype(np.int64))
    if code_bits == 32:
        return torch.from_numpy(packed.view("<i4").copy())
    bits = np.unpackbits(packed, axis=1, bitorder="little", count=num_codes * code_bits)
    weights = 1 << np.arange(code_bits, dtype=np.int64)
    return torch.from_numpy(bits.reshape(len(packed), num_codes, code_bits) @ weights)

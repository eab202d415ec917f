"""What heads with learned inverted lists share: a coarse quantizer in front, and codes that begin with its choice.

Shapes: N vectors, D dimensions, J lists, M codebooks. A document's codes are its list number and M codewords.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from retriever.heads.base import CompressionHead, list_number_size
from retriever.heads.cells import Cells
from retriever.heads.codebooks import Codebooks
from retriever.heads.lists import pack_listed, unpack_listed
from retriever.scores import Metric

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = ["InvertedListHead"]


class InvertedListHead(CompressionHead):
    """Head whose documents are in lists.

    Attributes:
        coarse: Chooses the list.
        fine: Codebooks of what the list's centroid leaves.

    Args:
        dim: Dimension D.
        num_lists: J.
        num_codebooks: M.
        code_bits: Bits of a codeword's number.
        metric: Score contract.
    """

    coarse: Codebooks | Cells
    fine: Codebooks

    def __init__(
        self, *, dim: int, num_lists: int, num_codebooks: int, code_bits: int, metric: Metric
    ) -> None:
        super().__init__(dim=dim, num_codes=1 + num_codebooks, code_bits=code_bits, metric=metric)
        self.num_lists = num_lists

    @property
    def centroids(self) -> Float[Tensor, "J D"]:
        """Coarse centroids, behind the rotation if there is one."""
        return self.coarse.codewords[0]

    @property
    def list_bytes(self) -> int:
        """Bytes of a list number, as `IndexIVF` counts them."""
        return list_number_size(self.num_lists)

    @property
    def code_size(self) -> int:
        """Bytes of a packed row: list number and code. In FAISS the list number is implied by the list."""
        return self.list_bytes + ((self.num_codes - 1) * self.code_bits + 7) // 8

    @property
    def rate(self) -> float:
        """Bits of a list's number among J, and of a code."""
        return math.log2(self.num_lists) + (self.num_codes - 1) * self.code_bits

    def pack(self, codes: Int[Tensor, "N 1+M"]) -> NDArray[np.uint8]:
        """Pack as `IndexIVF.add_sa_codes` takes rows: list number (little-endian), then the code."""
        return pack_listed(codes, self.num_lists, self.code_bits)

    def unpack(self, packed: UInt8[NDArray[np.uint8], "N size"]) -> Int[Tensor, "N 1+M"]:
        """Invert `pack`."""
        return unpack_listed(packed, self.num_lists, self.num_codes - 1, self.code_bits)

    def count(self, codes: Int[Tensor, "N 1+M"]) -> None:
        """Add codes to the usage counts of the current window."""
        self.coarse.count(codes[:, :1])
        self.fine.count(codes[:, 1:])

    def usage_statistics(self) -> dict[str, float]:
        """Return perplexity and share of unused entries in the window, of codewords and (`list_...`) of lists."""
        lists = {f"list_{name}": value for name, value in self.coarse.usage_statistics().items()}
        return {**self.fine.usage_statistics(), **lists}

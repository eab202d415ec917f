"""What heads with inverted lists share: the checks of their configuration, and rows that begin with a list number.

Shapes: N documents, M codebooks; a document's codes are its list number and M codewords.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from retriever.errors import InputError
from retriever.heads.base import list_number_size, pack_codes, pack_list_numbers, unpack_codes
from retriever.heads.codebooks import AssignmentName

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8
    from numpy.typing import NDArray

__all__ = ["ListStructure", "check_list_sample", "check_lists", "pack_listed", "unpack_listed"]

ListStructure = Literal["free", "no_imi", "gno_imi"]
"""How centroids are made: each a vector of its own; or as sums S_i + T_j, or S_i + alpha_ij T_j (`heads.cells`)."""


def check_lists(num_lists: int, list_assignment: str, list_structure: str) -> None:
    """Raise InputError unless there is a list, a rule that assigns documents, and a structure that allows both."""
    if num_lists < 1:
        raise InputError(f"num_lists must be at least 1, got {num_lists}.")
    if list_assignment not in get_args(AssignmentName):
        raise InputError(
            f"list_assignment must be one of {', '.join(get_args(AssignmentName))}, got {list_assignment!r}."
        )
    if list_structure not in get_args(ListStructure):
        raise InputError(
            f"list_structure must be one of {', '.join(get_args(ListStructure))}, got {list_structure!r}."
        )
    if list_structure == "free":
        return
    if num_lists < 4 or num_lists & (num_lists - 1) or num_lists.bit_length() % 2 == 0:
        raise InputError(
            f"list_structure {list_structure!r} needs K squared lists, K a power of two from 2, got num_lists="
            f"{num_lists}. Set num_lists to 4, 16, 64, 256, 1024, 4096, 16384 or 65536."
        )
    if list_assignment != "live":
        raise InputError(
            f"list_structure {list_structure!r} goes with list_assignment live, got {list_assignment!r}. Set "
            "list_structure free to freeze lists."
        )


def check_list_sample(documents: int, num_lists: int, list_structure: ListStructure = "free") -> None:
    """Raise InputError if a warm start would have fewer documents than vectors that make the centroids."""
    least = num_lists if list_structure == "free" else isqrt(num_lists)
    if documents < least:
        raise InputError(
            f"the warm start needs at least {least} documents for num_lists={num_lists}, got {documents}. "
            "Raise warm_start_documents or lower num_lists."
        )


def pack_listed(codes: Int[Tensor, "N 1+M"], num_lists: int, code_bits: int) -> NDArray[np.uint8]:
    """Pack as `IndexIVF.add_sa_codes` takes rows: list number (little-endian), then the code."""
    lists = pack_list_numbers(codes[:, 0].cpu().numpy(), num_lists)
    return np.hstack([lists, pack_codes(codes[:, 1:], code_bits)])


def unpack_listed(
    packed: UInt8[NDArray[np.uint8], "N size"], num_lists: int, num_codebooks: int, code_bits: int
) -> Int[Tensor, "N 1+M"]:
    """Invert `pack_listed`."""
    size = list_number_size(num_lists)
    lists = np.zeros((len(packed), 8), dtype=np.uint8)
    lists[:, :size] = packed[:, :size]
    numbers = torch.from_numpy(lists.view("<i8").copy())
    return torch.cat([numbers, unpack_codes(packed[:, size:], num_codebooks, code_bits)], 1)

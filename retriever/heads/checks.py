"""Checks that the configurations of heads share; each raises InputError with the value and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from retriever.errors import InputError
from retriever.heads.base import HeadConfig

__all__ = ["check_choices", "check_not_negative", "check_sample_size", "check_size"]


def check_size(num_codebooks: int, codebook_bits: int) -> None:
    """Raise InputError unless there is a codebook, of 1 to 16 bits as FAISS takes them."""
    if num_codebooks < 1:
        raise InputError(f"num_codebooks must be at least 1, got {num_codebooks}.")
    if not 1 <= codebook_bits <= 16:
        raise InputError(f"codebook_bits must be between 1 and 16, got {codebook_bits}.")


def check_choices(config: HeadConfig, choices: Mapping[str, Any]) -> None:
    """Raise InputError unless every named field holds a value of its Literal."""
    for name, known in choices.items():
        if getattr(config, name) not in get_args(known):
            raise InputError(
                f"{name} must be one of {', '.join(get_args(known))}, got {getattr(config, name)!r}."
            )


def check_not_negative(config: HeadConfig, names: Iterable[str]) -> None:
    """Raise InputError unless every named field is a number of zero or more."""
    for name in names:
        if not 0 <= getattr(config, name) <= float("inf"):
            raise InputError(f"{name} must be zero or more, got {getattr(config, name)}.")


def check_sample_size(documents: int, codebook_bits: int) -> None:
    """Raise InputError if a warm start would have fewer documents than a codebook has codewords."""
    if documents < 2**codebook_bits:
        raise InputError(
            f"the warm start needs at least {2**codebook_bits} documents for {codebook_bits}-bit codebooks, got "
            f"{documents}. Raise warm_start_documents or lower codebook_bits."
        )

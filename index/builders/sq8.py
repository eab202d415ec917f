"""`faiss.IndexScalarQuantizer` of 8 bits a dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from index.builders.scalar import ScalarBuilder

__all__ = ["SQ8Builder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SQ8Builder(ScalarBuilder):
    """Exhaustive search over vectors of 8 bits a dimension, D bytes a document, on the CPU."""

    kind: ClassVar[str] = "sq8"
    bits: ClassVar[int] = 8

    @property
    def approximation(self) -> str:
        """Rounded documents."""
        return "Documents are rounded to 8 bits a dimension; queries are not."

    @property
    def least_overlap(self) -> float:
        """Well below what docs/forms.md measures on real and on random vectors."""
        return 0.9

"""`faiss.IndexScalarQuantizer` of 4 bits a dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from index.builders.scalar import ScalarBuilder

__all__ = ["SQ4Builder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SQ4Builder(ScalarBuilder):
    """Exhaustive search over vectors of 4 bits a dimension, D / 2 bytes a document, on the CPU."""

    kind: ClassVar[str] = "sq4"
    bits: ClassVar[int] = 4

    @property
    def approximation(self) -> str:
        """Rounded documents."""
        return "Documents are rounded to 4 bits a dimension; queries are not."

    @property
    def least_overlap(self) -> float:
        """Well below what docs/forms.md measures on real and on random vectors."""
        return 0.5

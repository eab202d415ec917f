"""IndexConfig: which FAISS index carries a head's codes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from index.builders import BUILDERS, IndexBuilder
from retriever import InputError
from retriever.heads import CoarseProductCodebooks, FaissExport, FlatVectors

__all__ = ["IndexConfig"]

Kind = Literal["auto", "flat", "pq", "ivfpq"]


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which FAISS index carries the codes.

    Attributes:
        kind: "flat" (head none), "pq" (CPU), "ivfpq" (a head with lists; or a flat quantizer in the form that a GPU
            takes), or "auto": as the head needs.
        nlist: Inverted lists over which "ivfpq" spreads the codes of a head without lists; all are probed.
        nprobe: Lists that a search of a head with lists probes unless it says otherwise; by default the square root
            of their number.
    """

    kind: Kind = "auto"
    nlist: int = 1
    nprobe: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"index.kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}.")
        if self.nlist < 1:
            raise InputError(f"index.nlist must be at least 1, got {self.nlist}.")
        if self.nlist != 1 and self.kind != "ivfpq":
            raise InputError(f"index.nlist={self.nlist} needs index.kind ivfpq, got {self.kind!r}.")

    def builder(self, export: FaissExport) -> IndexBuilder:
        """Return the builder for a head's export, checked.

        Raises:
            InputError: If the kind cannot carry it.
        """
        if self.nprobe is not None and not isinstance(export, CoarseProductCodebooks):
            raise InputError(
                f"index.nprobe needs a head with inverted lists, got {self.nprobe}. Leave it out, or train with the "
                "head `ivfpq`."
            )
        kind = self.kind
        if kind == "auto":
            kind = "flat" if isinstance(export, FlatVectors) else "pq"
            if isinstance(export, CoarseProductCodebooks):
                kind = "ivfpq"
        family = BUILDERS[kind]
        options = {field.name: getattr(self, field.name) for field in fields(family)}
        builder = family(**options)
        builder.check(export)
        return builder

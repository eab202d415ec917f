"""IndexConfig: which FAISS index carries a head's codes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from index.builders import BUILDERS, IndexBuilder
from index.builders.additive import Norms
from retriever import InputError
from retriever.heads import (
    AdditiveCodebooks,
    CoarseAdditiveCodebooks,
    CoarseFlatVectors,
    CoarseProductCodebooks,
    FaissExport,
    FlatVectors,
    NeuralCodec,
    ProductCodebooks,
)

__all__ = ["IndexConfig"]

Kind = Literal[
    "auto",
    "flat",
    "sq8",
    "sq4",
    "hnsw",
    "hnsw_sq8",
    "ivfflat",
    "pq",
    "pq_fastscan",
    "ivfpq",
    "ivfpq_fastscan",
    "rq",
    "rq_fastscan",
    "ivfrq",
    "ivfrq_fastscan",
    "cascade",
]

AUTO = {
    FlatVectors: "flat",
    CoarseFlatVectors: "ivfflat",
    ProductCodebooks: "pq",
    CoarseProductCodebooks: "ivfpq",
    AdditiveCodebooks: "rq",
    CoarseAdditiveCodebooks: "ivfrq",
    NeuralCodec: "cascade",
}


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which FAISS index carries the codes; docs/forms.md describes every kind.

    Attributes:
        kind: "auto": the exact form that the head needs. Head none, and cnt without another head inside: "flat",
            "sq8", "sq4", "hnsw", "hnsw_sq8". Head ivfflat: "ivfflat". Head
            pq: "pq", "pq_fastscan" (4 bits), or "ivfpq" (the form that a GPU takes). Head ivfpq: "ivfpq",
            "ivfpq_fastscan" (4 bits). Head rq: "rq", "rq_fastscan" (4 bits, inner product). Head ivfrq: "ivfrq",
            "ivfrq_fastscan" (4 bits, inner product). Codes that a network decodes: "cascade".
        norms: "rq" and "ivfrq" with metric l2: a document's squared norm in 4 bytes ("float32", the default of "rq"),
            in one ("uint8"), or not at all ("none", the default of "ivfrq"): FAISS then decodes what it scores, a
            `Searcher` does not.
        nlist: Inverted lists over which "ivfpq" spreads the codes of a head without lists; all are probed.
        nprobe: Lists that a search of a head with lists probes unless it says otherwise; by default those in which
            20,000 documents lie on average, at least the square root of all, at most 2,048; "ivfrq" with norms or
            inner products: the square root, for FAISS makes tables for every list.
        on_disk: "ivfpq": keep the inverted lists in a file that searches read from, built a piece at a time, so that
            neither takes the index's memory.
        refine: FastScan kinds: score the best documents again, exactly, from the codes, which are then stored twice.
        k_factor: With refine: documents scored again, as a multiple of the k that a search asks for.
        hnsw_m: "hnsw" and "hnsw_sq8": links of a document in each layer of the graph, twice as many in the lowest.
        ef_construction: "hnsw" and "hnsw_sq8": candidates kept while a document is added.
        ef_search: "hnsw" and "hnsw_sq8": candidates kept by a search; more find more, slower.
        shortlist: "cascade": documents that a search takes from FAISS, at least the k it asks for.
        rerank: "cascade" with pair tables: documents of the short list that the network decodes, at least k.
        pairs: "cascade": tables of two codes, K K D float16 each; by default 2 M where the corpus has at least as many
            documents as these tables have rows, otherwise none.
        fit_rows: "cascade": documents by which the linear decoders are fitted.
        list_codes: "cascade" of a head without lists: first codes of a document that name its inverted list.
        hnsw_lists: "cascade": find the lists to probe by a graph over their centroids.
    """

    kind: Kind = "auto"
    norms: Norms | None = None
    nlist: int = 1
    nprobe: int | None = None
    on_disk: bool = False
    refine: bool = False
    k_factor: float = 4.0
    hnsw_m: int = 32
    ef_construction: int = 200
    ef_search: int = 128
    shortlist: int = 1000
    rerank: int = 200
    pairs: int | None = None
    fit_rows: int = 262_144
    list_codes: int = 0
    hnsw_lists: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"index.kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}.")
        for option in fields(self):
            value = getattr(self, option.name)
            kinds = [kind for kind, family in BUILDERS.items() if option.name in _options(family)]
            # nprobe is judged by the head: see `builder`
            if option.name not in ("kind", "nprobe") and value != option.default and self.kind not in kinds:
                raise InputError(
                    f"index.{option.name}={value} needs index.kind {' or '.join(kinds)}, got {self.kind!r}."
                )
        if self.k_factor != type(self).k_factor and not self.refine:
            raise InputError(f"index.k_factor={self.k_factor} needs index.refine true.")
        if self.kind != "auto":
            self._make(self.kind)

    def builder(self, export: FaissExport) -> IndexBuilder:
        """Return the builder for a head's export, checked.

        Raises:
            InputError: If the kind cannot carry it.
        """
        learned = isinstance(
            export, CoarseFlatVectors | CoarseProductCodebooks | CoarseAdditiveCodebooks | NeuralCodec
        )
        if self.nprobe is not None and not learned:
            raise InputError(
                f"index.nprobe needs a head with inverted lists, got {self.nprobe}. Leave it out, or train with the "
                "head `ivfpq` or `ivfrq`."
            )
        builder = self._make(AUTO[type(export)] if self.kind == "auto" else self.kind)
        builder.check(export)
        return builder

    def _make(self, kind: str) -> IndexBuilder:
        family = BUILDERS[kind]
        return family(**{name: getattr(self, name) for name in _options(family)})


def _options(family: type[IndexBuilder]) -> list[str]:
    return [field.name for field in fields(family)]

"""Which form of index carries which head's export: every pair, as the builders themselves judge it.

`python -m index.matrix` prints the table of docs/forms.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from index.builders import BUILDERS
from retriever.errors import InputError
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
from retriever.scores import Metric

__all__ = ["Cell", "matrix", "matrix_table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What becomes of one export in one form.

    Attributes:
        kind: Name in `BUILDERS`.
        export: What is exported: the head and its bits.
        metric: Score contract of the export.
        verdict: "exact": the model's scores in their order. "lossy": see `reason`. "refused": see `reason`.
        reason: What is approximated, or the whole message of the refusal; empty for an exact form.
        other_type: Whether the refusal is that the form holds another type of export.
    """

    kind: str
    export: str
    metric: Metric
    verdict: Literal["exact", "lossy", "refused"]
    reason: str = ""
    other_type: bool = False


def _exports(metric: Metric) -> dict[str, FaissExport]:
    """Return the smallest export of every type, with 8 and with 4 bits, by name."""
    lists = torch.zeros(3, 4)
    exports: dict[str, FaissExport] = {
        "none": FlatVectors(dim=4, metric=metric),
        "ivfflat": CoarseFlatVectors(dim=4, metric=metric, centroids=lists),
    }
    words = {bits: torch.zeros(2, 2**bits, 2) for bits in (8, 4)}
    sums = {bits: torch.zeros(2, 2**bits, 4) for bits in (8, 4)}
    for bits, books in words.items():
        exports[f"pq, {bits} bits"] = ProductCodebooks(codebooks=books, metric=metric)
    for bits, books in words.items():
        exports[f"ivfpq, {bits} bits"] = CoarseProductCodebooks(
            codebooks=books, centroids=lists, metric=metric
        )
    for bits, books in sums.items():
        exports[f"rq, {bits} bits"] = AdditiveCodebooks(codebooks=books, metric=metric)
    for bits, books in sums.items():
        exports[f"ivfrq, {bits} bits"] = CoarseAdditiveCodebooks(
            codebooks=books, centroids=lists, metric=metric
        )
    codec = NeuralCodec(dim=4, num_codes=2, code_bits=8, metric=metric)
    exports["neural"] = codec
    exports["neural in lists"] = replace(codec, centroids=lists)
    return exports


def matrix() -> list[Cell]:
    """Return the verdict on every export, by each metric, in every form with its default options."""
    return [
        _judge(kind, name, export)
        for kind in BUILDERS
        for metric in get_args(Metric)
        for name, export in _exports(metric).items()
    ]


def _judge(kind: str, name: str, export: FaissExport) -> Cell:
    builder = BUILDERS[kind]()
    try:
        builder.check(export)
    except InputError as error:
        other = type(export) not in builder.carries
        return Cell(
            kind=kind,
            export=name,
            metric=export.metric,
            verdict="refused",
            reason=str(error),
            other_type=other,
        )
    verdict: Literal["exact", "lossy"] = "exact" if builder.exact else "lossy"
    return Cell(kind=kind, export=name, metric=export.metric, verdict=verdict, reason=builder.approximation)


def matrix_table() -> str:
    """Return the matrix in Markdown: a table of forms and exports, and the reasons by form.

    A dash stands for a form that holds another type of export.
    """
    cells = matrix()
    names = list(dict.fromkeys(cell.export for cell in cells))
    lines = ["| kind | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind in BUILDERS:
        row = [_words([cell for cell in cells if (cell.kind, cell.export) == (kind, name)]) for name in names]
        lines.append(f"| `{kind}` | " + " | ".join(row) + " |")
    reasons = dict.fromkeys(
        f"- `{cell.kind}`, {cell.verdict}: {cell.reason}"
        for cell in cells
        if cell.reason and not cell.other_type
    )
    return "\n".join([*lines, "", *reasons])


def _words(cells: list[Cell]) -> str:
    """Return the verdicts of one export by each metric, in a word if they agree."""
    if all(cell.other_type for cell in cells):
        return "-"
    verdicts = {cell.metric: cell.verdict for cell in cells}
    if len(set(verdicts.values())) == 1:
        return cells[0].verdict
    return ", ".join(f"{metric}: {verdict}" for metric, verdict in verdicts.items())


if __name__ == "__main__":
    print(matrix_table())

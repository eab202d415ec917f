"""Linear decoders of a neural codec's codes, in closed form: what makes a short list before the network decodes it.

The first-order decoder is a codeword for every value of every code; a vector is their sum (Amara et al., QINCo,
arXiv:2401.14732, section 4). The pairwise decoder adds a vector for every two values of chosen pairs of codes (QINCo2,
arXiv:2501.03078). Both are least squares to the *decoded* vectors, whose scores the short list is to foresee.

Shapes: n documents, D dimensions, M codes, K values of a code, J lists, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from index.clustering import code_centroids
from retriever.heads import CompressionHead, NeuralCodec

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from numpy.typing import NDArray

__all__ = [
    "decode_linear",
    "decode_rows",
    "default_pairs",
    "fit_additive",
    "fit_decoders",
    "fit_pairs",
    "load_decoders",
    "save_decoders",
]

ROWS = 4096  # documents decoded, or summed in float64, at once
RIDGE = 1e-3  # documents that pull a codeword to the mean; solves what the codes leave undetermined
CHOICE = 65_536  # documents by which the pairs are chosen
LIST_CODES = 5  # of a centroid, where there are more lists than values of a code (QINCo2)
HALF = float(torch.finfo(torch.float16).max)


def fit_decoders(
    head: CompressionHead, codes: UInt8[NDArray[np.uint8], "n size"], *, rows: int, pairs: int | None
) -> NeuralCodec:
    """Return the head's export with linear decoders of its codes.

    Args:
        head: The head that made the codes.
        codes: Packed codes of all documents.
        rows: Documents by which they are fitted, evenly spaced, so that the same codes always give the same decoders.
        pairs: Pairs of codes with a table; None: `default_pairs`.
    """
    export = head.export()
    assert isinstance(export, NeuralCodec), "checked by the builder"
    chosen = np.unique(np.linspace(0, len(codes) - 1, min(rows, len(codes))).astype(np.int64))
    numbers = head.unpack(np.asarray(codes[chosen]))
    targets = torch.cat(list(decode_rows(head, codes, chosen)))
    if export.centroids is not None:
        targets -= export.centroids[numbers[:, 0]]
    own = numbers if export.centroids is None else numbers[:, 1:]
    export = replace(export, additive=fit_additive(own, targets, 2**export.code_bits))
    count = default_pairs(export, len(codes)) if pairs is None else pairs
    if not count or numbers.shape[1] < 2:  # a single code has no pair
        return export
    if export.centroids is not None:
        export = replace(export, list_codes=_code_lists(export, numbers[:, 0]))
    targets -= _sum_codewords(export, own)
    seen = _paired_codes(export, numbers)
    # the documents themselves are searched: where all are fitted there is nothing to generalize to
    smoothing = 0.0 if len(chosen) == len(codes) else None
    found, tables = fit_pairs(seen, targets, 2**export.code_bits, pairs=count, smoothing=smoothing)
    return replace(export, pairs=found, tables=tables)


def default_pairs(export: NeuralCodec, documents: int) -> int:
    """Return 2 M pairs (QINCo2), or none where their tables would have more rows than there are documents.

    Decoded vectors kept in memory would then be smaller than the tables, and exact.
    """
    pairs = min(2 * export.num_codes, export.num_codes * (export.num_codes - 1) // 2)
    return pairs if documents >= pairs * 4**export.code_bits else 0


@torch.no_grad()
def decode_rows(
    head: CompressionHead, codes: UInt8[NDArray[np.uint8], "n size"], rows: Int[NDArray[np.int64], " r"]
) -> Iterator[Float[Tensor, "p D"]]:
    """Yield what the head decodes rows of packed codes to, on the CPU, some thousands at a time."""
    device = next(iter(head.state_dict().values()), torch.empty(0)).device
    for start in range(0, len(rows), ROWS):
        packed = np.asarray(codes[rows[start : start + ROWS]])
        yield head.decode(head.unpack(packed).to(device)).float().cpu()


def fit_additive(
    codes: Int[Tensor, "n M"], targets: Float[Tensor, "n D"], codewords: int
) -> Float[Tensor, "M K D"]:
    """Return the codebooks B that minimise sum_i ||x_i - sum_m B[m, k_im]||^2, by normal equations in float64.

    The mean of all targets is in the first codebook, so that its codewords are centroids; those of the others have
    mean 0 over the documents. A codeword that no document has is the mean there, and 0 elsewhere.

    Args:
        codes: Codes of the documents.
        targets: Their decoded vectors x, or what is left of them without a centroid.
        codewords: K.
    """
    books = codes.shape[1]
    mean = targets.double().mean(0)
    gram, right = _normal_equations(codes, targets, codewords, mean)
    counts = gram.diagonal().view(books, codewords, 1).clone()
    gram.diagonal().add_(RIDGE)
    found = torch.cholesky_solve(right, torch.linalg.cholesky(gram)).view(books, codewords, -1)
    offsets = (found * counts).sum(1, keepdim=True) / len(codes)
    found -= offsets * (counts > 0)
    found[0] += mean + offsets.sum(0) * (counts[0] > 0)
    return found.float()


def _normal_equations(
    codes: Int[Tensor, "n M"], targets: Float[Tensor, "n D"], codewords: int, mean: Float[Tensor, " D"]
) -> tuple[Float[Tensor, "MK MK"], Float[Tensor, "MK D"]]:
    """Return how often two values meet in a document, and the sums of the centred targets by value."""
    books = codes.shape[1]
    right = torch.zeros(books, codewords, targets.shape[1], dtype=torch.float64)
    for rows in torch.arange(len(codes)).split(ROWS):  # float64 of some documents only
        centred = targets[rows].double() - mean
        for book in range(books):
            right[book].index_add_(0, codes[rows, book], centred)
    gram = torch.zeros(books, codewords, books, codewords, dtype=torch.float64)
    for book in range(books):
        counts = torch.bincount(codes[:, book], minlength=codewords).double()
        gram[book, :, book].diagonal().copy_(counts)
        for other in range(book):
            met = torch.bincount(codes[:, book] * codewords + codes[:, other], minlength=codewords**2)
            gram[book, :, other] = met.view(codewords, codewords)
            gram[other, :, book] = gram[book, :, other].T
    return gram.view(books * codewords, -1), right.view(books * codewords, -1)


def fit_pairs(
    codes: Int[Tensor, "n M"],
    residuals: Float[Tensor, "n D"],
    codewords: int,
    *,
    pairs: int,
    smoothing: float | None = None,
) -> tuple[Int[Tensor, "P 2"], Float[Tensor, "P KK D"]]:
    """Return pairs of codes, chosen greedily, and the mean of what is left for every two values of each.

    A pair's table is the mean residual of the documents with these two values, which is then subtracted. The paper
    starts from the vectors; we start from what the first-order decoder leaves, and shrink a mean of c documents by
    c / (c + smoothing), because K^2 means of a sample overfit. Two values that no document has add 0.

    Args:
        codes: Codes of the documents.
        residuals: What the first-order decoder leaves of the decoded vectors; overwritten.
        codewords: K.
        pairs: Pairs to choose, P.
        smoothing: None: the variance within a pair's cells over that between them, which makes the expected error
            least (random effects).
    """
    some = torch.arange(len(codes))[:: -(-len(codes) // CHOICE)]
    waiting = {pair: float("inf") for pair in combinations(range(codes.shape[1]), 2)}
    chosen: list[tuple[int, int]] = []
    tables: list[Tensor] = []
    while waiting and len(chosen) < pairs:
        pair = _best_pair(waiting, codes[some], residuals[some], codewords, smoothing)
        cells = codes[:, pair[0]] * codewords + codes[:, pair[1]]
        sums, counts = _cell_sums(cells, residuals, codewords)
        strength = _variance_ratio(sums, counts, residuals)[0] if smoothing is None else smoothing
        divisors = (counts + strength).clamp_min(torch.finfo(torch.float32).tiny)
        table = (sums / divisors[:, None]).clamp(-HALF, HALF).half()
        residuals -= table[cells].float()
        del waiting[pair]
        chosen.append(pair)
        tables.append(table)
    return torch.tensor(chosen), torch.stack(tables)


def _best_pair(
    waiting: dict[tuple[int, int], float],
    codes: Int[Tensor, "n M"],
    residuals: Float[Tensor, "n D"],
    codewords: int,
    smoothing: float | None,
) -> tuple[int, int]:
    """Return the pair that takes most of the squared error away, by the gains known so far, which it brings up to date.

    A gain only shrinks as other pairs are subtracted, nearly: one that is computed anew and still the largest is taken.
    """
    fresh: set[tuple[int, int]] = set()
    while True:
        pair = max(waiting, key=lambda key: waiting[key])
        if pair in fresh:
            return pair
        sums, counts = _cell_sums(codes[:, pair[0]] * codewords + codes[:, pair[1]], residuals, codewords)
        strength, effect = _variance_ratio(sums, counts, residuals)
        if smoothing is None:  # expected of other documents
            waiting[pair] = effect * float((counts.square() / (counts + strength).clamp_min(1e-30)).sum())
        else:
            waiting[pair] = float(
                (
                    sums.square().sum(1)
                    * (counts + 2 * smoothing)
                    / (counts + smoothing).clamp_min(1).square()
                ).sum()
            )
        fresh.add(pair)


def _cell_sums(
    cells: Int[Tensor, " n"], residuals: Float[Tensor, "n D"], codewords: int
) -> tuple[Float[Tensor, "KK D"], Float[Tensor, " KK"]]:
    """Return sum and number of the residuals in every cell."""
    sums = torch.zeros(codewords**2, residuals.shape[1]).index_add_(0, cells, residuals)
    return sums, torch.bincount(cells, minlength=codewords**2).float()


def _variance_ratio(
    sums: Float[Tensor, "KK D"], counts: Float[Tensor, " KK"], residuals: Float[Tensor, "n D"]
) -> tuple[float, float]:
    """Return the variance within cells over that between them, and the latter, by the analysis of variance."""
    used = counts > 0
    between = float((sums[used].square().sum(1) / counts[used]).sum())
    documents, cells = len(residuals), int(used.sum())
    if documents == cells:
        return float("inf"), 0.0  # every document is alone: nothing tells a cell from noise
    within = max(0.0, float(residuals.square().sum()) - between) / (documents - cells)
    effect = max(0.0, between - cells * within) / documents
    return (within / effect if effect else float("inf")), effect


def decode_linear(export: NeuralCodec, codes: Int[Tensor, "n M"], *, pairwise: bool) -> Float[Tensor, "n D"]:
    """Return what the first-order decoder makes of codes, with list numbers where there are lists.

    Args:
        export: A fitted export.
        codes: As `CompressionHead.unpack` returns them.
        pairwise: Add the tables of the pairs.
    """
    numbers = codes if export.centroids is None else codes[:, 1:]
    found = _sum_codewords(export, numbers)
    if export.centroids is not None:
        found += export.centroids[codes[:, 0]]
    if pairwise and export.pairs is not None and export.tables is not None:
        seen = _paired_codes(export, codes)
        for (first, second), table in zip(export.pairs.tolist(), export.tables, strict=True):
            found += table[seen[:, first] * 2**export.code_bits + seen[:, second]]
    return found


def _code_lists(export: NeuralCodec, lists: Int[Tensor, " n"]) -> Int[Tensor, "J C"]:
    """Return the numbers of the lists or, where there are more than K, codes of their centroids, as QINCo2 does."""
    assert export.centroids is not None, "called for a head with lists"
    count, codewords = len(export.centroids), 2**export.code_bits
    if count <= codewords:
        return torch.arange(count)[:, None]
    documents = torch.bincount(lists, minlength=count).clamp_min(1).float()
    return code_centroids(export.centroids, documents, steps=LIST_CODES, codewords=codewords)


def _paired_codes(export: NeuralCodec, codes: Int[Tensor, "n M"]) -> Int[Tensor, "n S"]:
    """Return the codes that pairs are made of: a document's, then its list's."""
    if export.list_codes is None:
        return codes if export.centroids is None else codes[:, 1:]
    return torch.hstack([codes[:, 1:], export.list_codes[codes[:, 0]]])


def _sum_codewords(export: NeuralCodec, codes: Int[Tensor, "n M"]) -> Float[Tensor, "n D"]:
    assert export.additive is not None, "fitted before"
    words = export.additive.flatten(0, 1)
    places = codes + 2**export.code_bits * torch.arange(codes.shape[1])
    return torch.nn.functional.embedding_bag(places, words, mode="sum")


def save_decoders(path: Path, export: NeuralCodec) -> None:
    """Write the linear decoders as safetensors."""
    found = {name: getattr(export, name) for name in ("additive", "list_codes", "pairs", "tables")}
    save_file({name: value.contiguous() for name, value in found.items() if value is not None}, path)


def load_decoders(path: Path, export: NeuralCodec) -> NeuralCodec:
    """Return an export with the decoders in a file."""
    found = load_file(path)
    return replace(
        export,
        additive=found["additive"],
        list_codes=found.get("list_codes"),
        pairs=found.get("pairs"),
        tables=found.get("tables"),
    )

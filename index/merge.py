"""Shards and indexes of one model -> one index, by concatenation of their codes.

Nothing is encoded, trained or assigned again: the result is byte for byte the index of one export of the documents in
that order. Adding documents is merging an index with a shard of the new ones; taking some out, or choosing another
form of index, is merging an index by itself. Memory: the FAISS index (one piece of it with `on_disk`), one byte a
document, and 0.5 GB while ids are compared.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from index.artifact import ExportReport, describe_index, library_versions, write_index
from index.config import IndexConfig
from index.encode import BLOCK, SAMPLE, Shard
from retriever import InputError
from retriever.data import identifier_hash
from retriever.dual_encoder import load_head
from retriever.folder import check_folder, publish_folder, read_manifest

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy.typing import NDArray

__all__ = ["merge_indexes"]

SORTED_IDS = 1 << 24  # hashes sorted at once


@dataclass(slots=True)
class _Source:
    """A folder of codes and the rows that are kept of it."""

    folder: Path
    manifest: dict[str, Any]
    keep: Bool[NDArray[np.bool_], " n"]

    @property
    def shard(self) -> Shard | None:
        stored = self.manifest.get("shard")
        return Shard.parse(stored) if stored else None

    def ids(self) -> Iterator[str]:
        """Yield the ids in order, from disk."""
        with (self.folder / "docid").open("rb") as file:
            for line in file:
                yield line.rstrip(b"\n").decode()

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()


def merge_indexes(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    config: IndexConfig | None = None,
    remove: Collection[str] = (),
    update: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Join folders of one model into an index folder.

    Args:
        folders: Index and shard folders, in the order of their documents; the shards of a corpus in any order, but all.
        out: Index folder to publish.
        config: Kind of the index.
        remove: Ids of documents to leave out.
        update: Where an id occurs again, keep the last document instead of refusing.
        overwrite: Replace an existing folder once the new one is complete; it may be one of `folders`.

    Raises:
        InputError: If a folder is damaged, they are of different models, a shard is missing or comes twice, an id
            occurs twice, or one to remove does not occur.
    """
    sources = _open([Path(folder) for folder in folders])
    head_folder = next((s.folder for s in sources if s.has("head")), None)
    if head_folder is None:
        raise InputError(
            f"none of {', '.join(map(str, folders))} holds the model. Add shard 1 of N or an index of it."
        )
    head = load_head(head_folder / "head").eval()
    builder = (config or IndexConfig()).builder(head.export())
    _remove(sources, remove)
    _resolve_duplicates(sources, update)
    if not any(source.keep.any() for source in sources):
        raise InputError("no document is left. Remove fewer.")
    about: dict[str, Any] = {"model": sources[0].manifest["model"], "versions": library_versions()}
    with publish_folder(Path(out), "index", overwrite=overwrite, about=about) as folder:
        _join(sources, folder, head.code_size)
        for name in ("encoder", "head"):
            shutil.copytree(head_folder / name, folder / name)
        if (head_folder / "experiment.yaml").is_file():
            shutil.copyfile(head_folder / "experiment.yaml", folder / "experiment.yaml")
        sample = torch.cat([load_file(s.folder / "sample.safetensors")["sample"] for s in sources])[:SAMPLE]
        save_file({"sample": sample.contiguous()}, folder / "sample.safetensors")
        report = write_index(folder, head, builder, sample)
        about.update(describe_index(report, head, builder))
    return report


def _open(folders: Sequence[Path]) -> list[_Source]:
    """Return the sources, checked against each other, shards in their order."""
    if not folders:
        raise InputError("there is nothing to merge. Give at least one index or shard folder.")
    sources = []
    for folder in folders:
        kind = read_manifest(folder, "index", "shard")["kind"]
        manifest = check_folder(folder, kind)
        if not (folder / "codes.u8").is_file():
            raise InputError(f"{folder} holds no codes, so it cannot be merged. Export its corpus again.")
        sources.append(_Source(folder, manifest, np.ones(manifest["ntotal"], dtype=bool)))
    first = sources[0]
    for source in sources[1:]:
        if source.manifest["model"] != first.manifest["model"]:
            raise InputError(
                f"{source.folder} was made with another model than {first.folder}: their codes have no common "
                "meaning. Export both with one model."
            )
        if source.has("documents.jsonl") != first.has("documents.jsonl"):
            raise InputError(
                f"only one of {source.folder} and {first.folder} stores texts. Export both with the same "
                "--store_texts."
            )
    _check_shards([source for source in sources if source.shard])
    places = [position for position, source in enumerate(sources) if source.shard]
    ordered = sorted(
        (sources[place] for place in places), key=lambda source: source.shard.number if source.shard else 0
    )
    for place, source in zip(places, ordered, strict=True):
        sources[place] = source
    return sources


def _check_shards(shards: Sequence[_Source]) -> None:
    """Refuse an incomplete set of shards."""
    if not shards:
        return
    sets = {(source.shard.count, source.manifest["documents"]) for source in shards if source.shard}
    if len(sets) > 1:
        stated = " and ".join(f"1/{count} of {documents} documents" for count, documents in sorted(sets))
        raise InputError(
            f"the shards are of different sets: {stated}. Merge each set by itself, then the indexes."
        )
    count = sets.pop()[0]
    numbers = [source.shard.number for source in shards if source.shard]
    twice = next((number for number in numbers if numbers.count(number) > 1), None)
    if twice:
        raise InputError(f"shard {twice}/{count} comes twice. Give every shard once.")
    if missing := sorted(set(range(1, count + 1)) - set(numbers)):
        raise InputError(
            f"shard {missing[0]}/{count} is missing ({len(missing)} of {count} are). Encode it: endex export ... "
            f"--shard {missing[0]}/{count}."
        )


def _remove(sources: Sequence[_Source], remove: Collection[str]) -> None:
    if not remove:
        return
    wanted = set(remove)
    found: set[str] = set()
    for source in sources:
        for row, name in enumerate(source.ids()):
            if name in wanted:
                source.keep[row] = False
                found.add(name)
    if unknown := sorted(wanted - found):
        raise InputError(
            f"{len(unknown)} ids to remove are not there, for example {unknown[0]!r}. Correct the list."
        )


def _resolve_duplicates(sources: Sequence[_Source], update: bool) -> None:
    """Keep the last document of each id, or refuse.

    The 64-bit hashes of all ids lie in a file; some millions at a time, those of one range, are sorted in memory.
    """
    first_rows = np.cumsum([0, *(len(source.keep) for source in sources)])
    total = int(first_rows[-1])
    with tempfile.TemporaryFile() as file:
        for source in sources:
            hashes = map(identifier_hash, source.ids())
            while piece := list(islice(hashes, BLOCK)):
                file.write(np.array(piece, dtype="<u8").tobytes())
        file.flush()
        pairs = _equal_pairs(np.memmap(file, dtype="<u8", mode="r", shape=(total,)))
    wanted = {row for pair in pairs for row in pair}
    names = {row: name for row, name in enumerate(chain(*(s.ids() for s in sources))) if row in wanted}
    for early, late in pairs:
        (before, old), (after, new) = (_locate(sources, first_rows, row) for row in (early, late))
        if names[early] != names[late] or not (before.keep[old] and after.keep[new]):
            continue
        if not update:
            raise InputError(
                f"the document id {names[late]!r} is in {before.folder} and in {after.folder}. Remove one, or let "
                "the later one replace the earlier with --update."
            )
        before.keep[old] = False


def _equal_pairs(hashes: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Return the pairs of neighbouring rows, in order, that have one hash."""
    ranges = -(-len(hashes) // SORTED_IDS)
    pairs: list[tuple[int, int]] = []
    for number in range(ranges):
        rows = _rows_in_range(hashes, number, ranges)
        order = rows[np.argsort(hashes[rows], kind="stable")]
        equal = hashes[order[1:]] == hashes[order[:-1]]
        pairs += zip(order[:-1][equal].tolist(), order[1:][equal].tolist(), strict=True)
    return sorted(pairs)


def _rows_in_range(hashes: NDArray[np.uint64], number: int, ranges: int) -> NDArray[np.int64]:
    """Return the rows whose hash leaves the remainder `number`."""
    parts = [
        np.flatnonzero(hashes[start : start + SORTED_IDS] % np.uint64(ranges) == number) + start
        for start in range(0, len(hashes), SORTED_IDS)
    ]
    return np.concatenate(parts)


def _locate(sources: Sequence[_Source], first_rows: NDArray[np.int64], row: int) -> tuple[_Source, int]:
    number = int(np.searchsorted(first_rows, row, side="right")) - 1
    return sources[number], row - int(first_rows[number])


def _join(sources: Sequence[_Source], folder: Path, code_size: int) -> None:
    """Write codes, ids and texts of the kept rows, block by block."""
    texts = sources[0].has("documents.jsonl")
    with (
        (folder / "codes.u8").open("wb") as codes_file,
        (folder / "docid").open("wb") as ids_file,
    ):
        for source in sources:
            codes = np.memmap(source.folder / "codes.u8", dtype=np.uint8, mode="r").reshape(-1, code_size)
            for start in range(0, len(codes), BLOCK):
                rows = np.flatnonzero(source.keep[start : start + BLOCK]) + start
                codes_file.write(codes[rows].tobytes())
            kept = (name for name, keep in zip(source.ids(), source.keep, strict=True) if keep)
            ids_file.writelines(f"{name}\n".encode() for name in kept)
    if not texts:
        return
    with (
        (folder / "documents.jsonl").open("wb") as lines_file,
        (folder / "documents.offsets").open("wb") as offsets_file,
    ):
        for source in sources:
            with (source.folder / "documents.jsonl").open("rb") as lines:
                for keep, line in zip(source.keep, lines, strict=True):
                    if keep:
                        offsets_file.write(lines_file.tell().to_bytes(8, "little"))
                        lines_file.write(line)

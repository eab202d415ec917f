"""Tables of Hub data sets, as BeIR and MTEB lay them out: streamed, or mapped from disk.

The tables are `corpus` (`_id`, `title`, `text`), `queries` (`_id`, `text`) and the judgements (`query-id`, `corpus-id`,
`score`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from retriever.errors import InputError

__all__ = ["hub_rows", "load_hub_table"]


def hub_rows(
    name: str, table: str, split: str | None, start: int = 0, stop: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a table of a Hub data set, as BeIR and MTEB lay them out, from `start` to before `stop`."""
    rows, place = _hub_table(name, table, split, streaming=True)
    rows = rows.skip(start) if start else rows
    for number, row in enumerate(rows, start=start + 1):
        if stop is not None and number > stop:
            return
        yield f"{place}:{number}", dict(row)


def load_hub_table(name: str, table: str) -> Any:
    """Return a table of a Hub data set in its map-style form, a `datasets.Dataset` whose rows stay on disk.

    Raises:
        InputError: If there is no such data set or table.
    """
    return _hub_table(name, table, None, streaming=False)[0]


def _hub_table(name: str, table: str, split: str | None, *, streaming: bool) -> tuple[Any, str]:
    """Return the rows of a table and its place; `corpus` and `queries` are configurations of a data set.

    Judgements are the configuration `qrels` or `default`, or the data set NAME-qrels.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{name!r} is not a local folder, and Hub data sets need `datasets`: pip install datasets."
        ) from None
    candidates = [(name, table)]
    if table == "qrels":
        candidates += [(name, "default"), (f"{name}-qrels", "default")]
    reasons = []
    for repository, config in candidates:
        try:
            tables = datasets.load_dataset(repository, config, streaming=streaming)
            if split and split not in tables:
                raise KeyError(f"has no split {split}; choose from {', '.join(sorted(tables))}")
            rows = tables[split or (table if table in tables else next(iter(tables)))]
        except (OSError, ValueError, KeyError) as error:
            reasons.append(f"{repository}[{config}]: {' '.join(str(error).split())[:120]}")
            continue
        return rows, f"{repository}[{config}]"
    raise InputError(
        f"{name!r} is neither a folder here nor a readable Hub data set with the table {table!r} "
        f"({'; '.join(reasons)}). Check the path or name."
    )

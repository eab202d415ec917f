"""`endex data NAME --out DIR`."""

from __future__ import annotations

import json
from pathlib import Path

from launch.arguments import parse, verb_parser
from launch.pycode import build_pycode
from retriever import InputError

__all__ = ["run"]

SETS = {"pycode": build_pycode}


def run(words: list[str]) -> int:
    """Build a data folder."""
    parser = verb_parser("data", "Build a data folder in the BEIR layout from what is on this machine.")
    parser.add_argument(
        "name", type=str, help="pycode: docstring -> function, from the installed Python packages."
    )
    parser.add_argument("--out", type=str, required=True, help="Data folder to write.")
    parser.add_argument("--max_documents", type=int, default=12_000, help="Documents at most.")
    options = parse(parser, words)
    if options.name not in SETS:
        raise InputError(f"there is no data set {options.name!r}. Choose one of {', '.join(SETS)}.")
    try:
        counts = SETS[options.name](Path(options.out), max_documents=options.max_documents)
    except ValueError as error:
        raise InputError(str(error)) from error
    print(
        json.dumps(counts)
        if options.json
        else f"{options.out}: " + ", ".join(f"{v:,} {k}" for k, v in counts.items())
    )
    return 0

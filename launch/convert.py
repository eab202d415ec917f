"""`endex convert INDEX --to bundle|npy|parquet|lance --out DIR`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from index.decoded import VectorType, write_npy, write_parquet
from index.interchange import ConvertReport, write_bundle
from index.lance_dataset import write_lance
from launch.arguments import parse, verb_parser
from retriever import InputError

__all__ = ["run"]

Form = Literal["bundle", "npy", "parquet", "lance"]
VECTORS = ("npy", "parquet")
WITH_TEXTS = ("parquet", "lance")


def run(words: list[str]) -> int:
    """Write an index folder in another form."""
    parser = verb_parser(
        "convert",
        "Write an index folder for another engine: its codebooks and codes (bundle), a Lance dataset indexed with its "
        "codebooks (lance), or, for engines that take no codebook, the vectors that its codes stand for (npy, "
        "parquet). Nothing is encoded or trained again. docs/engines.md says which engine takes what.",
    )
    parser.add_argument("index", type=str, help="Index folder that endex export or endex merge wrote.")
    parser.add_argument("--to", type=Form, required=True, help="Form to write.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write.")
    parser.add_argument(
        "--dtype",
        type=VectorType,
        default="float32",
        help="npy and parquet: numbers of the vectors, 4 or 2 bytes a dimension.",
    )
    parser.add_argument(
        "--texts", type=bool, default=True, help="parquet and lance: write title and text where stored."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing folder.")
    options = parse(parser, words)
    report = _convert(options)
    if options.json:
        print(json.dumps({"out": options.out, "to": options.to, **asdict(report)}))
    else:
        print(describe(options.out, report))
    return 0


def _convert(options: Any) -> ConvertReport:
    """Write the form that was asked for.

    Raises:
        InputError: If an option has no meaning for it.
    """
    form, folder, out = options.to, Path(options.index), Path(options.out)
    overwrite = {"overwrite": options.overwrite}
    if options.dtype != "float32" and form not in VECTORS:
        raise InputError(f"--dtype {options.dtype} needs --to npy or parquet, got --to {form}. Leave it out.")
    if not options.texts and form not in WITH_TEXTS:
        raise InputError(f"--texts false needs --to parquet or lance, got --to {form}. Leave it out.")
    if form == "bundle":
        return write_bundle(folder, out, **overwrite)
    if form == "npy":
        return write_npy(folder, out, dtype=options.dtype, **overwrite)
    if form == "parquet":
        return write_parquet(folder, out, dtype=options.dtype, texts=options.texts, **overwrite)
    return write_lance(folder, out, texts=options.texts, **overwrite)


def describe(out: str, report: ConvertReport) -> str:
    """Return what was written, for reading."""
    times = report.bytes_after / report.bytes_before
    exact = "as in the index" if report.lossless else f"numbers rounded by up to {report.rounding:.1e}"
    return (
        f"{out}: {report.ntotal:,} documents, {report.dim} dimensions, {report.bytes_before} bytes each before, "
        f"{report.bytes_after} after ({times:,.1f} times), without ids and texts\n"
        f"  scores ({report.metric}): {exact}\n"
        f"  {report.note}"
    )

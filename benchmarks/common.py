"""What every benchmark shares: options, machine, result file, table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `endex` does, see launch/main.py

import torch
from rich.console import Console
from rich.table import Table

from index._faiss import load_faiss
from launch.env import describe
from retriever.folder import write_json
from retriever.scores import Metric

__all__ = [
    "benchmark_parser",
    "faiss_quantizer",
    "forget_peak",
    "print_table",
    "resident",
    "seconds_since",
    "write_result",
]


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark: --json, --quick, --seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write machine, versions, options and rows here")
    parser.add_argument("--quick", action="store_true", help="a run of under a minute, to see that it works")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    return parser


def print_table(title: str, rows: Sequence[Mapping[str, Any]], caption: str = "") -> None:
    """Print rows of equal keys as a table, as wide as it is: cut-off numbers are of no use."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in rows[0]:
        table.add_column(
            str(name), justify="left" if isinstance(rows[0][name], str) else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=Console(width=1000).measure(table).maximum).print(table)


def write_result(
    path: Path | None, options: argparse.Namespace, rows: Sequence[Mapping[str, Any]], **more: Any
) -> None:
    """Write a result file, if a path is given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: _plain(value) for name, value in vars(options).items()}
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**describe(), "processor": _processor(), "torch_threads": torch.get_num_threads()},
        "options": plain,
        **more,
        "rows": list(rows),
    }
    write_json(path, json.loads(json.dumps(result, default=float)))
    print(f"wrote {path}")


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def faiss_quantizer(dim: int, factory: str, metric: Metric, seed: int) -> Any:
    """Return an untrained FAISS index of a factory string, seeded, without warnings on small samples.

    The quantizer may be PQ, RQ or LSQ, behind OPQ, PCA or lists or not; or bits behind ITQ or principal components. An
    OPQ matrix gets a quantizer of its own for that, which it must outlive: keep the index.
    """
    faiss = load_faiss()
    kind = faiss.METRIC_INNER_PRODUCT if metric == "inner_product" else faiss.METRIC_L2
    built = faiss.index_factory(dim, factory, kind)
    if factory.endswith(("LSH", "RaBitQ")):
        return built  # nothing random but ITQ's own start
    inner, clusterings = built, []
    if isinstance(built, faiss.IndexPreTransform):
        inner = faiss.downcast_index(built.index)
    if factory.startswith("OPQ"):
        matrix = faiss.downcast_VectorTransform(built.chain.at(0))
        opq = faiss.ProductQuantizer(matrix.d_out, inner.pq.M, inner.pq.nbits)
        matrix.pq = opq
        built.referenced_objects = [opq]
        clusterings.append(opq.cp)
    if "LSQ" in factory:
        inner.lsq.random_seed = seed  # it is trained without k-means
    else:
        clusterings.append(inner.rq.cp if "RQ" in factory else inner.pq.cp)
    if hasattr(inner, "nlist"):
        clusterings.append(inner.cp)
    for clustering in clusterings:
        clustering.min_points_per_centroid, clustering.seed = 1, seed
    return built


def set_metric(built: Any, metric: Metric) -> None:
    """Let a FAISS index, behind a transform or not, search by another metric; codes do not depend on it."""
    faiss = load_faiss()
    built.metric_type = faiss.METRIC_INNER_PRODUCT if metric == "inner_product" else faiss.METRIC_L2
    if isinstance(built, faiss.IndexPreTransform):
        built.index.metric_type = built.metric_type


def forget_peak() -> None:
    """Let the peak of this process's resident memory (VmHWM) begin anew with what is resident now; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    """Return the resident bytes of this process: `VmRSS` now, or `VmHWM` at most; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def seconds_since(start: float) -> float:
    """Return wall-clock seconds since a `time.perf_counter()`."""
    return time.perf_counter() - start

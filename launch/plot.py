"""Plots, with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from retriever import InputError

__all__ = ["plot_probes"]


def plot_probes(path: Path, curves: Mapping[str, Mapping[int, float]], measure: str) -> None:
    """Draw a measure against the number of probed lists, one line a curve, and write it to `path`.

    Raises:
        InputError: If matplotlib is not installed, or does not know the file's ending.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator, ScalarFormatter
    except ImportError:
        raise InputError("plots need matplotlib. Run: pip install 'endex[plot]'") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    probes = sorted({probe for curve in curves.values() for probe in curve})
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(probes)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("lists probed (nprobe)")
    axes.set_ylabel(measure)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
    except ValueError as error:
        raise InputError(
            f"{path} cannot be drawn: {error}. Give a name that ends in .png, .svg or .pdf."
        ) from None
    temporary.replace(path)

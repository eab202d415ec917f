"""Plots, with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from retriever import InputError

__all__ = ["plot_probes", "plot_sizes", "plot_speeds"]


def plot_probes(path: Path, curves: Mapping[str, Mapping[int, float]], measure: str) -> None:
    """Draw a measure against the number of probed lists, one line a curve, and write it to `path`.

    Raises:
        InputError: If matplotlib is not installed, or does not know the file's ending.
    """
    figure = _figure(6, 4)
    from matplotlib.ticker import NullLocator, ScalarFormatter

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
    _write(figure, path)


def plot_sizes(
    path: Path,
    curves: Mapping[str, Mapping[int, float]],
    levels: Mapping[str, float],
    measure: str,
    *,
    thick: Collection[str] = (),
) -> None:
    """Draw a measure against the bytes of a code, and write it to `path`.

    Args:
        path: File to write; its ending is its kind.
        curves: Measure by bytes, by the name of a system.
        levels: Measures of systems that are not compressed.
        measure: Name of the measure.
        thick: Names of the curves that are drawn in thick lines.

    Raises:
        InputError: If matplotlib is not installed, or does not know the file's ending.
    """
    figure = _figure(8.5, 4.5)
    from matplotlib.ticker import NullLocator, ScalarFormatter

    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(
            list(curve),
            list(curve.values()),
            color=f"C{number % 10}",
            marker="os^v"[number // 10 % 4],
            linewidth=3 if name in thick else 1.2,
            label=name,
        )
    for number, (name, value) in enumerate(levels.items()):
        axes.axhline(value, color="black", linestyle=("--", ":")[number % 2], linewidth=1, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({size for curve in curves.values() for size in curve}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bytes a document")
    axes.set_ylabel(measure)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    _write(figure, path)


def plot_speeds(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    measure: str,
    *,
    groups: Mapping[str, str] | None = None,
    dashed: Collection[str] = (),
) -> None:
    """Draw a measure against queries a second, one line a curve of (queries/s, measure), and write it to `path`.

    Args:
        path: File to write; its ending is its kind.
        curves: Points by name. A curve of one point is a point.
        measure: Name of the measure.
        groups: Name of a curve -> its group; curves of a group share a colour. By default each is its own.
        dashed: Names of the curves that are drawn dashed; the others are solid.

    Raises:
        InputError: If matplotlib is not installed, or does not know the file's ending.
    """
    figure = _figure(10, 5.5)
    axes = figure.add_subplot()
    seen: dict[str, list[str]] = {}
    for name, curve in curves.items():
        group = (groups or {}).get(name, name)
        seen.setdefault(group, []).append(name)
        speeds, values = zip(*sorted(curve), strict=True)
        axes.plot(
            speeds,
            values,
            color=f"C{list(seen).index(group) % 10}",
            marker="xos^v"[(len(seen[group]) - 1) % 5],
            markersize=5,
            linestyle="--" if name in dashed else "-",
            linewidth=1.2 if name in dashed else 2,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xlabel("queries a second")
    axes.set_ylabel(measure)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small")
    _write(figure, path)


def _figure(width: float, height: float) -> Any:
    """Return an empty figure; sizes in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib. Run: pip install 'endex[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
    except ValueError as error:
        raise InputError(
            f"{path} cannot be drawn: {error}. Give a name that ends in .png, .svg or .pdf."
        ) from None
    temporary.replace(path)

"""Plots are files of the kind that their name says, written whole or not at all."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from launch.plot import plot_probes, plot_sizes
from retriever import InputError

CURVES = {"learned": {1: 0.5, 4: 0.7, 16: 0.9}, "k-means": {1: 0.4, 4: 0.6, 16: 0.9}}


def test_png_shows_a_line_of_every_curve(tmp_path: Path) -> None:
    plot_probes(tmp_path / "two.png", CURVES, "Recall@100")
    plot_probes(tmp_path / "one.png", {"learned": CURVES["learned"]}, "Recall@100")
    one, two = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("one", "two"))
    orange = (two[..., 0] > 0.9) & (two[..., 1] > 0.4) & (two[..., 1] < 0.6) & (two[..., 2] < 0.2)
    assert orange.sum() > 100
    assert not ((one[..., 0] > 0.9) & (one[..., 1] > 0.4) & (one[..., 1] < 0.6) & (one[..., 2] < 0.2)).any()


def test_svg_names_measure_and_curves(tmp_path: Path) -> None:
    plot_probes(tmp_path / "plot.svg", CURVES, "Recall@100")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in text for name in (*CURVES, "Recall@100", "lists probed (nprobe)"))


def test_sizes_stand_beside_the_levels_of_what_is_not_compressed(tmp_path: Path) -> None:
    plot_sizes(tmp_path / "plot.svg", {"endex": {8: 0.5, 16: 0.6}}, {"dense": 0.7}, "nDCG@10")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert all(
        f"<!-- {name} -->" in text for name in ("endex", "dense", "nDCG@10", "bytes a document", "8", "16")
    )


def test_thick_curves_are_thicker_and_more_than_ten_curves_stay_apart(tmp_path: Path) -> None:
    curves = {f"system {number}": {8: number / 20, 16: number / 10} for number in range(12)}
    plot_sizes(tmp_path / "plot.svg", curves, {}, "nDCG@10", thick=["system 3"])
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert text.count("stroke-width: 3;") == 2  # the curve, and its line in the legend
    plot_sizes(tmp_path / "none.svg", curves, {}, "nDCG@10")
    assert "stroke-width: 3;" not in (tmp_path / "none.svg").read_text(encoding="utf-8")
    path = r'<path id="\w+" d="([^"]+)" style="stroke: #1f77b4'  # of a marker; of the first colour
    assert len(set(re.findall(path, text))) == 2


def test_unknown_ending_is_refused_and_an_existing_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "plot.nonsense"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"Give a name that ends in \.png, \.svg or \.pdf"):
        plot_probes(path, CURVES, "Recall@100")
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_matplotlib_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"pip install 'endex\[plot\]'"):
        plot_probes(tmp_path / "plot.png", CURVES, "Recall@100")

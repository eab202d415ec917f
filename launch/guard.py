"""A guard against folders and files that hide Endex's packages.

The packages have plain names. A user's own `training/` or `index.py` earlier on `sys.path` would be imported
instead of ours, with errors far from the cause.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

__all__ = ["PACKAGES", "hidden_packages"]

PACKAGES = ("retriever", "index", "training", "launch")


def hidden_packages() -> list[str]:
    """Return one line for each package of Endex that something else on `sys.path` hides; standard library only."""
    home = Path(__file__).resolve().parent.parent
    lines = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != home / name / "__init__.py":
            found = origin or (list(spec.submodule_search_locations or []) if spec else "nothing")
            lines.append(
                f"{found} hides Endex's package {name!r} ({home / name}). Start with the command `endex` from "
                f"another folder, rename yours, or take its folder out of PYTHONPATH (sys.path: {sys.path[:2]} ...)."
            )
    return lines

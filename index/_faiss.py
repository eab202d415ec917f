"""The one place that imports FAISS, late, and says what to do when it is missing or doubly installed."""

from __future__ import annotations

from functools import cache
from importlib.metadata import packages_distributions
from types import ModuleType

from retriever.errors import InputError

__all__ = ["load_faiss"]

REMEDY = (
    "pip uninstall -y faiss-cpu faiss-gpu faiss-gpu-cuvs && pip install 'endex[cpu]'  (or [gpu], or [cuvs])"
)


@cache
def load_faiss() -> ModuleType:
    """Return the `faiss` module.

    Raises:
        InputError: If FAISS is not installed, is broken, or several distributions share its folder.
    """
    owners = sorted(set(packages_distributions().get("faiss", [])))
    if len(owners) > 1:
        raise InputError(
            f"{' and '.join(owners)} are installed together and overwrite each other's module `faiss`. Run: {REMEDY}"
        )
    try:
        import faiss
    except ImportError as error:
        raise InputError(f"FAISS cannot be imported ({error}). Run: {REMEDY}") from None
    return faiss

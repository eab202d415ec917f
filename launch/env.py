"""`endex env`: what is installed, and whether it fits together."""

from __future__ import annotations

import json
import platform
from importlib.metadata import packages_distributions

import torch

from launch.arguments import parse, verb_parser
from retriever import InputError
from training.system import installed_version, names_of_cards

__all__ = ["describe", "run"]

LIBRARIES = (
    "endex",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "numpy",
    "sentence-transformers",
    "wandb",
)


def run(words: list[str]) -> int:
    """Print the environment; exit code 0 also when something is missing."""
    options = parse(verb_parser("env", "Say which libraries are here and whether they fit together."), words)
    found = describe()
    print(json.dumps(found) if options.json else "\n".join(f"{k:<24}{v}" for k, v in found.items()))
    return 0


def describe() -> dict[str, str]:
    """Return versions, devices and FAISS's state by name."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": str(torch.get_num_threads()),
    }
    found |= {name: installed_version(name) for name in LIBRARIES}
    found["cuda (torch)"] = torch.version.cuda or "none"
    found["cards"] = names_of_cards()
    found["faiss distribution"] = ", ".join(sorted(set(packages_distributions().get("faiss", [])))) or "none"
    found |= _faiss()
    return found


def _faiss() -> dict[str, str]:
    from index._faiss import load_faiss
    from index.gpu_rules import built_with_cuvs, has_gpu_code

    try:
        faiss = load_faiss()
    except InputError as error:
        return {"faiss": str(error)}
    cards = faiss.get_num_gpus() if has_gpu_code(faiss) else 0
    verdict = f"{cards} GPU(s){', with cuVS' if built_with_cuvs() else ''}" if cards else "CPU only"
    if torch.cuda.is_available() and not cards:
        verdict += "; torch sees a GPU: for search on it install the extra [gpu] or [cuvs] instead of [cpu]"
    return {"faiss": f"{faiss.__version__}, {verdict}"}

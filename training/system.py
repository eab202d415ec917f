"""What a run runs on: versions and devices."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["describe_system", "installed_version", "names_of_cards"]

LIBRARIES = ("endex", "torch", "transformers", "accelerate", "datasets", "numpy", "faiss-cpu", "faiss-gpu")


def describe_system(accelerator: Accelerator) -> dict[str, str]:
    """Return versions, devices and processes by name."""
    versions = {name: installed_version(name) for name in LIBRARIES}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: found for name, found in versions.items() if found != "not installed"},
        "cuda": torch.version.cuda or "none",
        "cards": names_of_cards(),
        "cpu_threads": str(torch.get_num_threads()),
        "device": str(accelerator.device),
        "processes": str(accelerator.num_processes),
        "distribution": str(accelerator.distributed_type.value),
    }


def installed_version(name: str) -> str:
    """Return the version of an installed distribution, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def names_of_cards() -> str:
    """Return the names of the CUDA devices, or "none"."""
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"

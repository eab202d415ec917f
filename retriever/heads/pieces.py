"""How much of a head's work is done at once: as much as stays in the caches of a CPU, or keeps a card busy."""

from __future__ import annotations

import torch

__all__ = ["at_once", "on_cpu"]

CARD = 64  # times as much on a card, where the number of calls is what costs; up to a gigabyte or two at once


def at_once(count: int, device: torch.device) -> int:
    """Return how many rows, pairs or entries to work on at once.

    Args:
        count: As many as suit a CPU.
        device: Where the work is done.
    """
    return count if on_cpu(device) else CARD * count


def on_cpu(device: torch.device) -> bool:
    """Whether to save work rather than calls."""
    return device.type == "cpu"

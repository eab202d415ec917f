"""Signals by which a cluster announces that it takes the machine back.

SLURM sends SIGTERM when the time is over or a job is pre-empted, and earlier any signal that `--signal` names;
Kubernetes and most schedulers send SIGTERM. What follows soon is SIGKILL.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from retriever.distributed import world_size

__all__ = ["PREEMPTED", "Preempted", "StopRequest"]

PREEMPTED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preempted(Exception):  # noqa: N818  not an error: all is saved
    """A signal stopped the run after a whole step; the checkpoint holds it.

    Attributes:
        step: Optimizer steps done.
        checkpoint: From which the run continues.
    """

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by a signal after step {step}; {checkpoint} is complete")
        self.step = step
        self.checkpoint = checkpoint


class StopRequest:
    """Notes SIGTERM and SIGUSR1 instead of dying of them, as long as its block runs.

    In a thread that is not the main one, where Python allows no handlers, signals keep their effect.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}
        self._last: Tensor | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {name: signal.signal(name, self._note) for name in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop. All call this together after every step, so that all stop at once.

        On accelerators the answer is that of the step before, so that nothing waits for the device.
        """
        if world_size() == 1:
            return self.received
        asked = torch.full((), int(self.received), device=device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        answer, self._last = (asked if device.type == "cpu" else self._last), asked
        return answer is not None and bool(answer.item())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

"""ServeConfig: what `endex serve` answers with, where, and up to which sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from index import Widths
from retriever import InputError, Precision

__all__ = ["ServeConfig"]

AS_EXPORTED = Widths()
AT_LEAST_ONE = ("max_batch", "max_queue", "max_k", "max_queries", "max_query_length", "max_ids", "max_body")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Address, batches, limits and live exchange of an index server.

    Attributes:
        index: Index folder, or a symbolic link to one.
        compare: A second index folder, shown beside the first on the search page and answering POST /compare.
        host: Address to listen on. The server asks for no password: put a proxy that does in front of any other.
        port: TCP port; 0 takes a free one.
        max_batch: Queries that share one forward pass and one search, from any number of requests.
        max_wait_ms: Milliseconds that a request waits for others to share its batch.
        max_queue: Requests that may wait; further ones get status 503.
        timeout: Seconds after which a request gets status 504.
        max_k: Most documents a query may ask for.
        max_queries: Most queries of a request.
        max_query_length: Most characters of a query.
        max_ids: Most document ids of a filter.
        max_body: Most bytes of a request.
        nprobe: Inverted lists of `index` probed unless a request says otherwise; by default the index's own.
        cascade: Documents that the stages of `index` pass on; by default as many as the index says.
        precision: Arithmetic of the query tower.
        device: torch device of the query tower.
        verify: Compare the checksum of every file before an index answers, not only of small ones.
        watch: Seconds between looks at the folder, whose new content is then loaded and exchanged; 0 never looks.
        swap_root: Folder from which POST /swap may load indexes; without it there is no /swap.
    """

    index: str
    compare: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 32
    max_wait_ms: float = 2.0
    max_queue: int = 256
    timeout: float = 10.0
    max_k: int = 1000
    max_queries: int = 32
    max_query_length: int = 4096
    max_ids: int = 10_000
    max_body: int = 1 << 20
    nprobe: int | None = None
    cascade: Widths = AS_EXPORTED
    precision: Precision = "fp32"
    device: str = "cpu"
    verify: bool = True
    watch: float = 5.0
    swap_root: str | None = None

    def __post_init__(self) -> None:
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be between 0 (any free one) and 65535, got {self.port}.")
        if not self.max_wait_ms >= 0:
            raise InputError(f"max_wait_ms must be 0 or more, got {self.max_wait_ms}.")
        if not self.timeout > 0:
            raise InputError(f"timeout must be more than 0 seconds, got {self.timeout}.")
        if not self.watch >= 0:
            raise InputError(f"watch must be 0 (never) or more seconds, got {self.watch}.")
        if self.swap_root is not None and not Path(self.swap_root).is_dir():
            raise InputError(f"swap_root must be a folder, got {self.swap_root}. Make it, or leave it out.")
        _check_device(self.device)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} is not usable here: {reason} Try cpu.") from None

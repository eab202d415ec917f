"""A server process: socket, loading and watching, orderly end."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import uvicorn
from fastapi import FastAPI

from index import Widths
from launch.serving.api import create_app
from launch.serving.config import ServeConfig
from launch.serving.metrics import Metrics
from launch.serving.service import SearchService
from retriever import InputError
from retriever.folder import read_manifest

__all__ = ["Server"]


class Server:
    """Serves an index until it is stopped.

    Args:
        config: What to serve and where.
        on_ready: Called once with the server's URL when the index is loaded.

    Raises:
        InputError: If a folder is no index folder, or the address is taken.
    """

    def __init__(self, config: ServeConfig, on_ready: Callable[[str], None] | None = None) -> None:
        metrics = Metrics()
        self.main = SearchService("main", Path(config.index), config, metrics)
        self.services = [self.main]
        if config.compare is not None:
            second = replace(config, nprobe=None, cascade=Widths())  # of the first index
            self.services.append(SearchService("compare", Path(config.compare), second, metrics))
        for service in self.services:
            read_manifest(service.live.folder, "index")  # a mistake is told before anything starts
        self._config = config
        self._on_ready = on_ready
        self._stopped = Event()
        self._error: Exception | None = None
        self._loader = Thread(target=self._load_and_watch, name="endex-loader", daemon=True)
        app = create_app(config, metrics, self.services, self._lifespan)
        self._socket = _listen(config.host, config.port)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=int(config.timeout) + 5,  # every request has ended by then
            )
        )

    @property
    def url(self) -> str:
        """Where the server listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `stop`; requests that have come are answered first.

        Raises:
            InputError: If the index cannot be loaded.
        """
        self._uvicorn.run(sockets=[self._socket])
        if self._error is not None:
            raise self._error

    def run_as_process(self) -> None:
        """Do the same and let a signal end the process without an error; in the main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # uvicorn handles both, then raises them again
        self.run()

    def stop(self) -> None:
        """Begin an orderly end, from any thread."""
        self._uvicorn.should_exit = True

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        for service in self.services:
            service.batcher.start()
        self._loader.start()
        yield
        self._stopped.set()
        for service in self.services:
            service.batcher.close()
        self._loader.join(timeout=5)

    def _load_and_watch(self) -> None:
        try:
            for service in self.services:
                service.live.swap()
        except Exception as error:
            self._error = error
            self.stop()
            return
        if self._on_ready is not None:
            self._on_ready(self.url)
        while self._config.watch and not self._stopped.wait(self._config.watch):
            for service in self.services:
                service.live.poll()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --host or --port."
        ) from None

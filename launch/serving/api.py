"""The HTTP API of `endex serve`, and its search page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from launch.serving.batcher import Closed, QueueFull
from launch.serving.config import ServeConfig
from launch.serving.limits import LimitBody
from launch.serving.live import Generation, NotReady, path_below
from launch.serving.metrics import MeasureRequests, Metrics, ServiceCollector
from launch.serving.schema import (
    Failure,
    Health,
    Hit,
    QueryResult,
    SearchRequest,
    SearchResponse,
    SwapRequest,
    SwapResponse,
)
from launch.serving.service import Answer, SearchService
from retriever import InputError

__all__ = ["create_app"]

RETRY_AFTER = {"Retry-After": "1"}  # seconds; a full queue is worked off sooner
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": about}
    for status, about in {
        413: "The request is too large.",
        422: "A value is wrong or over a limit.",
        503: "Too many requests wait, or the index is loading. Try again after the seconds in Retry-After.",
        504: "There was no answer in time.",
    }.items()
}

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    config: ServeConfig,
    metrics: Metrics,
    services: Sequence[SearchService],
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """Return the application that answers with the first service, and with the second, if there is one, beside it."""
    main, compare = services[0], services[1] if len(services) > 1 else None
    app = FastAPI(title="Endex", description="Search an Endex index.", lifespan=lifespan)
    metrics.registry.register(ServiceCollector(services))
    app.add_middleware(LimitBody, max_body=config.max_body, timeout=config.timeout)
    app.add_middleware(MeasureRequests, metrics=metrics)
    _add_failures(app)
    _add_searches(app, config, main, compare)
    if config.swap_root is not None:
        _add_swap(app, main, Path(config.swap_root))
    _add_page(app)

    @app.get("/health", responses={503: {"model": Health}})
    def health(response: Response) -> Health:
        """Say whether the indexes are loaded (200) or not yet (503)."""
        about = Health(
            status="loading",
            index=main.live.folder.name,
            compare=None if compare is None else compare.live.folder.name,
        )
        if not all(service.live.ready for service in services):
            response.status_code, response.headers["Retry-After"] = 503, "1"
            return about
        current = main.live.current
        numbers = {
            "generation": current.number,
            "ntotal": len(current.searcher.document_ids),
            "dim": current.searcher.dim,
        }
        return about.model_copy(update={"status": "ready", **numbers})

    @app.get("/metrics", response_class=Response)
    def show_metrics() -> Response:
        """Return counts, times, batch sizes and queues in Prometheus's format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _add_searches(
    app: FastAPI, config: ServeConfig, main: SearchService, compare: SearchService | None
) -> None:
    @app.post("/search", responses=FAILURES)
    async def search(request: SearchRequest) -> SearchResponse:
        """Find the best documents of each query."""
        return await _search(main, request, config)

    if compare is None:
        return
    second = compare

    @app.post("/compare", responses=FAILURES)
    async def search_second(request: SearchRequest) -> SearchResponse:
        """Do the same as /search, with the index to compare with."""
        return await _search(second, request, config)


async def _search(service: SearchService, request: SearchRequest, config: ServeConfig) -> SearchResponse:
    job = request.job(config)
    service.live.current  # noqa: B018 - raises NotReady
    try:
        answer = await asyncio.wait_for(asyncio.wrap_future(service.submit(job)), config.timeout)
    except QueueFull:
        raise HTTPException(
            503, f"{config.max_queue} requests wait already. Try again in a second.", headers=RETRY_AFTER
        ) from None
    except Closed:
        raise HTTPException(503, "the server is stopping. Try another.", headers=RETRY_AFTER) from None
    except TimeoutError:
        raise HTTPException(
            504, f"no answer within {config.timeout:g} s. Ask for less, or later when fewer others ask."
        ) from None
    return await run_in_threadpool(_response, answer, request.texts)


def _response(answer: Answer, texts: bool) -> SearchResponse:
    ids = answer.generation.searcher.document_ids
    return SearchResponse(
        generation=answer.generation.number,
        results=[
            QueryResult(
                hits=[
                    _hit(answer.generation, ids[row], row, score, texts)
                    for row, score in zip(rows, scores, strict=True)
                    if row >= 0
                ]
            )
            for rows, scores in zip(answer.rows.tolist(), answer.scores.tolist(), strict=True)
        ],
    )


def _hit(generation: Generation, name: str, row: int, score: float, texts: bool) -> Hit:
    document = generation.document(row) if texts else None
    if document is None:
        return Hit(id=name, score=score)
    return Hit(id=name, score=score, title=document.title, text=document.text)


def _add_swap(app: FastAPI, main: SearchService, root: Path) -> None:
    @app.post("/swap", responses={422: FAILURES[422]})
    def swap(request: SwapRequest) -> SwapResponse:
        """Load another index folder and answer with it from now on; a damaged one is refused and the old stays."""
        generation = main.live.swap(path_below(root, request.index))
        return SwapResponse(generation=generation.number, ntotal=len(generation.searcher.document_ids))


def _add_page(app: FastAPI) -> None:
    page = (files("launch.serving") / "page.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", page, re.S)
    assert script, "the page has one script"
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    headers = {
        "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)


def _add_failures(app: FastAPI) -> None:
    """Answer every failure with {"detail": "one line"}."""

    @app.exception_handler(InputError)
    async def wrong_input(_: Request, error: InputError) -> JSONResponse:
        return _failure(422, " ".join(str(error).split()))

    @app.exception_handler(RequestValidationError)
    async def wrong_shape(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        return _failure(
            422, f"{field or 'the body'}: {first['msg']}. See /docs for what a request looks like."
        )

    @app.exception_handler(NotReady)
    async def not_ready(_: Request, error: NotReady) -> JSONResponse:
        return _failure(503, "the index is being loaded. Try again in a second.", RETRY_AFTER)

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return _failure(error.status_code, error.detail, error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return _failure(500, "the server failed on this request; its log says how.")


def _failure(status: int, detail: str, headers: Any = None) -> JSONResponse:
    text = detail.encode("utf-8", "replace").decode()  # may quote a lone surrogate of the request
    return JSONResponse({"detail": text}, status, headers=headers)

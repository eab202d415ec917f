"""`endex serve DIR`: an HTTP API and a search page for an index folder."""

from __future__ import annotations

import json
import logging
from dataclasses import fields

from launch.arguments import parse, verb_parser
from launch.serving.config import ServeConfig
from retriever import InputError

__all__ = ["run"]


def run(words: list[str]) -> int:
    """Serve an index folder until SIGTERM or Ctrl-C."""
    parser = verb_parser(
        "serve", "Serve an index folder: POST /search, a search page at /, /health, /metrics, /docs."
    )
    parser.add_argument("index", type=str, help="Index folder that endex export wrote, or a link to one.")
    parser.add_class_arguments(ServeConfig, skip={"index"})
    options = parse(parser, words)
    config = ServeConfig(**{field.name: options[field.name] for field in fields(ServeConfig)})
    try:
        from launch.serving.server import Server
    except ModuleNotFoundError as error:
        if error.name in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise InputError(f"serving needs {error.name}. Run: pip install 'endex[serve]'") from None
        raise

    def ready(url: str) -> None:
        about = server.main.live.current.searcher
        count = len(about.document_ids)
        if options.json:
            print(json.dumps({"url": url, "index": config.index, "ntotal": count}), flush=True)
        else:
            print(f"{config.index}: {count:,} documents at {url} (Ctrl-C stops)", flush=True)

    logging.basicConfig(format="endex: %(message)s")
    server = Server(config, ready)
    server.run_as_process()
    return 0

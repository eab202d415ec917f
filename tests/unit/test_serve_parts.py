"""Options, limits, paths and exchange of `endex serve`, without a server."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import launch.serving.live
from launch.serving.config import ServeConfig
from launch.serving.live import Generation, LiveIndex, NotReady, path_below
from launch.serving.schema import SearchRequest
from retriever import Document, InputError

CONFIG = ServeConfig(index="i", max_k=20, max_queries=3, max_query_length=10, max_ids=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch": 0}, r"max_batch must be at least 1, got 0\."),
        ({"max_body": -1}, r"max_body must be at least 1, got -1\."),
        ({"port": 70000}, r"port must be between 0 .* and 65535, got 70000\."),
        ({"max_wait_ms": -1.0}, r"max_wait_ms must be 0 or more, got -1\.0\."),
        ({"max_wait_ms": float("nan")}, r"max_wait_ms must be 0 or more, got nan\."),
        ({"timeout": 0.0}, r"timeout must be more than 0 seconds, got 0\.0\."),
        ({"device": "gpuu"}, r"device 'gpuu' is not usable here: .* Try cpu\."),
        ({"watch": -2.0}, r"watch must be 0 .*, got -2\.0\."),
        ({"swap_root": "/nowhere"}, r"swap_root must be a folder, got /nowhere\."),
    ],
)
def test_a_wrong_option_is_refused_with_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ServeConfig(index="i", **changes)


def test_the_default_address_is_reachable_from_this_machine_only() -> None:
    assert ServeConfig(index="i").host == "127.0.0.1"


def test_swapping_over_http_is_off_by_default() -> None:
    assert ServeConfig(index="i").swap_root is None


# --- requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "exactly one of query, queries and vectors, got none"),
        ({"query": "a", "queries": ["b"]}, "got query and queries"),
        ({"queries": []}, "no query"),
        ({"vectors": []}, "no query"),
        ({"query": "a", "k": 21}, "k must be at most 20, got 21"),
        ({"queries": ["a"] * 4}, "the number of queries must be at most 3, got 4"),
        ({"vectors": [[1.0]] * 4}, "the number of queries must be at most 3, got 4"),
        ({"query": "a" * 11}, "the length of a query in characters must be at most 10, got 11"),
        ({"query": "a", "ids": ["1", "2", "3"]}, "the number of ids must be at most 2, got 3"),
        ({"query": "a", "ids": []}, "ids must name at least one document"),
        ({"vectors": [[1.0], [1.0, 2.0]]}, "same length"),
        ({"vectors": [[float("nan")]]}, "finite"),
        ({"vectors": [[1e39]]}, "finite float32"),
    ],
)
def test_a_request_beyond_a_limit_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SearchRequest(**request_).job(CONFIG)


def test_a_request_of_vectors_becomes_an_array() -> None:
    job = SearchRequest(vectors=[[1.0, 2.0]], k=3, ids=["a"]).job(CONFIG)
    assert job.vectors is not None
    np.testing.assert_array_equal(job.vectors, np.float32([[1, 2]]))
    assert (job.k, job.ids, job.size) == (3, ("a",), 1)


# --- paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["..", "../other", "a/../../other", "/etc", "link", "a\0b"])
def test_a_path_out_of_the_swap_root_is_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (root / "link").symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match="swap root"):
        path_below(root, path)


def test_a_path_below_the_swap_root_is_taken_relative_or_absolute(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    real = (tmp_path / "a").resolve()
    assert path_below(tmp_path, "a") == path_below(tmp_path, str(real)) == real


# --- exchange ----------------------------------------------------------------------------------------------------


class FakeSearcher:
    document_ids = ("d0",)
    takes_vectors = False

    def __init__(self, folder: Path) -> None:
        if (folder / "damaged").exists():
            raise InputError("damaged")
        self.folder = folder

    def search(self, queries: list[str], k: int) -> None: ...


@pytest.fixture
def live(tmp_path: Path) -> LiveIndex:
    """An index of a link `now` that leads to folder `one`, loaded."""
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(name)
    (tmp_path / "three/damaged").touch()
    point(tmp_path, "one")
    live = LiveIndex(tmp_path / "now", FakeSearcher)  # type: ignore[arg-type]
    live.swap()
    return live


def point(folder: Path, name: str) -> None:
    """Let the link `now` lead elsewhere, in one step."""
    (folder / "next").symlink_to(name)
    (folder / "next").replace(folder / "now")


def test_an_index_that_is_not_loaded_is_not_ready(tmp_path: Path) -> None:
    live = LiveIndex(tmp_path, FakeSearcher)  # type: ignore[arg-type]
    assert not live.ready
    with pytest.raises(NotReady):
        live.current  # noqa: B018


def test_a_folder_that_did_not_change_is_not_loaded_again(live: LiveIndex) -> None:
    assert not live.poll()
    assert live.current.number == 1


def test_a_link_that_leads_elsewhere_is_followed(live: LiveIndex, tmp_path: Path) -> None:
    point(tmp_path, "two")
    assert live.poll()
    assert live.current.number == 2
    assert live.current.searcher.folder == (tmp_path / "two").resolve()


def test_a_link_to_a_damaged_folder_is_refused_once(
    live: LiveIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    point(tmp_path, "three")
    assert [live.poll(), live.poll()] == [False, False]
    assert live.current.number == 1
    assert live.swaps == {"done": 1, "refused": 1}
    assert "refused, the old index stays: damaged" in caplog.text


def test_a_refused_folder_is_tried_again_later(
    live: LiveIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point(tmp_path, "three")
    live.poll()
    (tmp_path / "three/damaged").unlink()
    monkeypatch.setattr(launch.serving.live, "RETRY_SECONDS", 0.0)
    assert live.poll()


def test_a_folder_that_is_absent_changes_nothing(live: LiveIndex, tmp_path: Path) -> None:
    (tmp_path / "now").unlink()
    assert not live.poll()
    assert live.current.number == 1


def test_a_folder_that_is_replaced_while_it_loads_is_refused(tmp_path: Path) -> None:
    def load(folder: Path) -> Any:
        (folder / "manifest.json").write_text("another")
        return FakeSearcher(folder)

    (tmp_path / "manifest.json").write_text("one")
    with pytest.raises(InputError, match="replaced while it was being loaded"):
        LiveIndex(tmp_path, load).swap()


def raises() -> Document:
    raise FileNotFoundError


def test_a_folder_that_faiss_cannot_read_is_refused(tmp_path: Path) -> None:
    def load(folder: Path) -> Any:
        raise RuntimeError("read error")

    with pytest.raises(InputError, match="cannot be loaded: read error"):
        LiveIndex(tmp_path, load).swap()


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda: Document("d0", "t", "x"), Document("d0", "t", "x")),
        (lambda: Document("another", "t", "x"), None),
        (lambda: None, None),
        (raises, None),
    ],
    ids=["there", "another", "not stored", "gone"],
)
def test_a_text_is_shown_only_if_it_is_the_documents(
    read: Callable[[], Document | None], found: Document | None
) -> None:
    """The folder may have been replaced after its index was loaded."""
    searcher: Any = SimpleNamespace(document=lambda row: read(), document_ids=["d0"])
    assert Generation(1, "", searcher).document(0) == found


# --- page --------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere_and_never_parses_data_as_html() -> None:
    page = (files("launch.serving") / "page.html").read_text(encoding="utf-8")
    for word in (
        "http:",
        "https:",
        "//cdn",
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
    ):
        assert word not in page

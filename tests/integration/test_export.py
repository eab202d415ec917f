"""`endex export` by shards, in several processes, and through a real kill, ends with the bytes of one export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from index import FaissFit, IndexConfig, Searcher, export_index, merge_indexes
from launch.main import main
from retriever import Document, DualEncoder, DualEncoderConfig, embed_documents
from retriever.heads import ProductQuantizerConfig

DOCUMENTS = 9000  # three blocks of 4,096
NAMES = ("index", "codes.u8", "docid", "documents.jsonl", "documents.offsets")
RUN = "import sys; from launch.main import main; sys.exit(main())"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "corpus.jsonl"
    rows = ({"_id": f"d{row}", "text": f"w{row % 120} w{row // 120 % 120}"} for row in range(DOCUMENTS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    model = DualEncoderConfig(encoder=str(tiny_model), document_max_length=8).build(
        ProductQuantizerConfig(num_codebooks=8, codebook_bits=4)
    )
    documents = [Document(f"d{row}", "", f"w{row % 120} w{row % 97}") for row in range(300)]
    model.eval().head.warm_start(embed_documents(model, documents), FaissFit(), 0)
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "whole"
    assert main(["export", str(model), str(corpus), "--out", str(out), "--json"]) == 0
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **more}


def test_shards_and_merge(
    model: Path, corpus: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        words = ["export", model, corpus, "--out", tmp_path / str(number), "--shard", f"{number}/2", "--json"]
        assert main([str(word) for word in words]) == 0
    assert main(["merge", str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "merged")]) == 0
    assert content(tmp_path / "merged") == content(whole)
    assert "FAISS scores = model scores" in capsys.readouterr().out


def test_paths_may_be_strings(model: Path, whole: Path, tmp_path: Path) -> None:
    DualEncoder.load(str(model)).save(f"{tmp_path}/copy")
    assert (tmp_path / "copy" / "dual_encoder.json").is_file()
    documents = [Document(f"new{row}", "", f"w{row} w{row + 1}") for row in range(40)]
    parts = [f"{tmp_path}/one", f"{tmp_path}/two"]
    for out, some in zip(parts, (documents[:25], documents[25:]), strict=True):
        export_index(str(model), some, out, config=IndexConfig(), device="cpu", progress=False)
    report = merge_indexes([*parts, str(whole)], f"{tmp_path}/merged")
    assert report.ntotal == 40 + DOCUMENTS
    searcher = Searcher(f"{tmp_path}/merged", model=str(model))
    assert len(searcher.search(["w3 w4"], k=1)[1][0]) == 1


def test_several_processes_are_one(model: Path, corpus: Path, whole: Path, tmp_path: Path) -> None:
    """As accelerate and torchrun start it; the third block goes to one of two."""
    words = ["export", model, corpus, "--out", tmp_path / "index"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, words)],
            env=environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert content(tmp_path / "index") == content(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"index"}
    assert outputs[1][0] == "", "only the first process reports"


def test_killed_export_goes_on(model: Path, corpus: Path, whole: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-c",
        RUN,
        *map(str, ("export", model, corpus, "--out", tmp_path / "index", "--json")),
    ]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "index.part" / "encoding.json"
    deadline = time.monotonic() + 120
    while not state.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads(state.read_text())["rows"] in (4096, 8192), "it was killed on its way"
    assert main(words[3:]) == 0
    assert content(tmp_path / "index") == content(whole)


def test_dry_run_leaves_nothing(
    model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(model), str(corpus), "--out", str(tmp_path / "index"), "--dry_run"]
    assert main([*words, "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert (estimate["documents"], estimate["code_bytes"]) == (DOCUMENTS, 4 * DOCUMENTS)
    assert main(words) == 0
    assert "documents/s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_ids_to_remove_come_from_a_file(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").write_text("d5\nd8999\n")
    words = ["merge", str(whole), "--out", str(tmp_path / "less"), "--remove", str(tmp_path / "gone")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ntotal"] == DOCUMENTS - 2
    assert main([*words[:-1], str(tmp_path / "no")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_flipped_byte_of_a_large_file_is_found_by_verify(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("retriever.folder.FAST_CHECK", 1000)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in whole.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(whole)).write_bytes(path.read_bytes())
    damaged = bytearray((copy / "documents.jsonl").read_bytes())
    damaged[100_000] ^= 1
    (copy / "documents.jsonl").write_bytes(damaged)
    assert main(["search", str(copy), "--query", "w1", "--json"]) == 0
    assert main(["search", str(copy), "--query", "w1", "--verify"]) == 2
    assert "documents.jsonl is damaged" in capsys.readouterr().err


def test_json_is_all_that_is_printed_with_lists_on_disk(whole: Path, tmp_path: Path) -> None:
    """FAISS prints to C's stdout, which pytest's capture does not see: a process of its own does."""
    words = [
        "merge",
        str(whole),
        "--out",
        str(tmp_path / "disk"),
        "--index.kind",
        "ivfpq",
        "--index.on_disk",
        "true",
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words, "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["ntotal"] == DOCUMENTS
    assert (tmp_path / "disk" / "index.ivfdata").is_file()

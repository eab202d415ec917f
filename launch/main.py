"""`endex VERB ...`: the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from launch.guard import hidden_packages

__all__ = ["VERBS", "main"]

VERBS = {  # verb -> (module, what it does)
    "train": ("launch.train", "train towers and head on text pairs; write a model folder"),
    "export": ("launch.export", "encode a corpus to codes and put them into a FAISS index folder"),
    "merge": ("launch.merge", "join shards and indexes of one model; add, remove or replace documents"),
    "convert": ("launch.convert", "write an index for another engine: bundle, npy, parquet or Lance"),
    "search": ("launch.search", "search an index folder; print hits or write a TREC run"),
    "mine": ("launch.mine", "find hard negatives of training queries through an index folder"),
    "evaluate": ("launch.evaluate", "nDCG, MRR and recall of an index or a model on judged queries"),
    "serve": ("launch.serve", "answer queries over HTTP, with a search page"),
    "data": ("launch.data", "build a data folder from what is on this machine"),
    "env": ("launch.env", "say which torch, CUDA and FAISS are here and whether they fit together"),
}
USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code: 0 on success, 2 for a mistake that the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if hidden := hidden_packages():
        return _fail(hidden[0])
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else USER_ERROR
    if words[0] in ("--version", "version"):
        print(f"endex {_version()}")
        return 0
    if words[0] not in VERBS:
        return _fail(f"there is no verb {words[0]!r}. Choose one of {', '.join(VERBS)}; see endex --help.")
    return _run(words[0], words[1:])


def _run(verb: str, words: list[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # torch and FAISS bring an OpenMP each; spinning threads of one keep the cores from the other (6 times slower
    # k-means on two busy cores). Read when the libraries load, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from retriever.errors import InputError

    run: Callable[[list[str]], int] = import_module(VERBS[verb][0]).run
    try:
        return run(words)
    except (InputError, FileExistsError, PermissionError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("endex: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `endex search ... | head`
        sys.stderr.close()
        return 0


def _fail(message: str) -> int:
    print(f"endex: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


def _usage() -> str:
    lines = ["usage: endex VERB ... (endex VERB --help shows a verb's options)", ""]
    lines += [f"  {verb:<10}{about}" for verb, (_, about) in VERBS.items()]
    return "\n".join(lines)


def _version() -> str:
    try:
        return version("endex")
    except PackageNotFoundError:
        from retriever import __version__

        return __version__

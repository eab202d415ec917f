"""Parsing shared by the verbs: jsonargparse with one-line errors."""

from __future__ import annotations

import difflib
import re
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from retriever.errors import InputError

__all__ = ["clear_message", "parse", "verb_parser"]


def verb_parser(verb: str, description: str) -> ArgumentParser:
    """Return a parser for a verb, with `--config` (so that `--print_config` works) and `--json`."""
    parser = ArgumentParser(prog=f"endex {verb}", description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with options of this verb.")
    parser.add_argument("--json", action="store_true", help="Print the result as one JSON object.")
    return parser


def parse(parser: ArgumentParser, words: list[str]) -> Any:
    """Return the instantiated options.

    Raises:
        InputError: If an option is unknown or wrong.
    """
    try:
        return parser.instantiate(parser.parse_args(words))
    except (ArgumentError, ValueError, TypeError) as error:
        raise InputError(clear_message(str(error), option_names(parser))) from error


def option_names(parser: ArgumentParser) -> list[str]:
    """Return the dotted names of a parser's options."""
    return [name for name in parser.get_defaults().keys() if isinstance(name, str)]


def clear_message(message: str, known: list[str]) -> str:
    """Return a parser's message on one line, with the nearest known name for an unknown one."""
    text = " ".join(message.split())
    if unknown := re.search(
        r"(?:unrecognized arguments?: --|[Oo]ption '|[Kk]ey '|Unsupported option: )([\w.]+)", text
    ):
        if near := difflib.get_close_matches(unknown.group(1), known, n=1):
            text += f" Did you mean {near[0]!r}?"
    return text

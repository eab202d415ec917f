"""Parsing shared by the verbs: jsonargparse with one-line errors."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from retriever.errors import InputError
from training.recipe import clear_message

__all__ = ["parse", "verb_parser"]


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

"""Recipes: an `Experiment` from YAML and command line arguments, and back to YAML."""

from __future__ import annotations

import dataclasses
import re
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from retriever import InputError
from retriever.heads import HEADS, HeadConfig
from training.experiment import Experiment
from training.losses import LOSSES, LossConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["clear_message", "dump_experiment", "experiment_parser", "load_experiment", "parse_experiment"]


def experiment_parser(**options: Any) -> ArgumentParser:
    """Return a jsonargparse parser whose options are the fields of `Experiment`, dotted, and `--config FILE`."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(
        subclasses_enabled=[HeadConfig, LossConfig], docstring_parse_attribute_docstrings=True
    )
    parser = ArgumentParser(exit_on_error=False, **options)
    parser.add_argument("--config", action="config", help="YAML file of an experiment.")
    parser.add_class_arguments(Experiment)
    return parser


def load_experiment(path: str | Path) -> Experiment:
    """Read an experiment from YAML.

    Raises:
        InputError: If the file is missing, is not YAML, or has an unknown field or a wrong value.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file. Give a YAML recipe, for example one from configs/.")
    return parse_experiment(["--config", str(path)])


def parse_experiment(arguments: list[str]) -> Experiment:
    """Return the experiment that command line arguments (`--config FILE --seed 1 ...`) describe.

    Raises:
        InputError: If an argument or a field of the file is unknown or wrong.
    """
    from jsonargparse import ArgumentError

    parser = experiment_parser()
    try:
        parsed = parser.parse_args(arguments)
        values = parser.instantiate(parsed).as_dict()
    except (ArgumentError, ValueError, TypeError) as error:
        files = [value for name, value in pairwise(arguments) if name == "--config"]
        raise InputError(": ".join([*files, clear_message(str(error), field_names(Experiment))])) from error
    values.pop("config", None)
    return Experiment(**values)


def field_names(config: type) -> list[str]:
    """Return the names of all fields below a configuration class, bare and dotted, heads and losses included."""
    names: list[str] = []
    for name, kind in get_type_hints(config).items():
        children: list[type] = [kind] if isinstance(kind, type) and dataclasses.is_dataclass(kind) else []
        if kind is HeadConfig:
            children = list(HEADS.values())
        elif kind is LossConfig:
            children = list(LOSSES.values())
        below = [child_name for child in children for child_name in field_names(child)]
        names += [name, *below, *(f"{name}.{child_name}" for child_name in below)]
    return names


def clear_message(message: str, known: list[str]) -> str:
    """Return a parser's message on one line, with the nearest known name for an unknown one."""
    text = " ".join(message.split())
    pattern = r"(?:unrecognized arguments?: --|[Oo]ption '|[Kk]ey '|Unsupported option: )([\w.]+)"
    if (unknown := re.search(pattern, text)) and (near := get_close_matches(unknown.group(1), known, n=1)):
        text += f". Did you mean {near[0]!r}?"
    if "import path" in text:
        classes = [config.__name__ for config in (*HEADS.values(), *LOSSES.values())]
        text += f". Choose one of {', '.join(classes)}."
    return text


def dump_experiment(experiment: Experiment) -> str:
    """Return the YAML text from which `load_experiment` makes an equal experiment."""
    return str(yaml.dump(_plain(experiment), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Dumper(yaml.SafeDumper):
    """Quotes texts that begin like a number: YAML 1.1 and 1.2 disagree on which of them are numbers."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if text[:1] in "+-.0123456789" else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (HeadConfig, LossConfig)):
        known = {**HEADS, **LOSSES}
        assert known[value.name] is type(value), "every head and loss is registered"
        return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": fields}
    return fields

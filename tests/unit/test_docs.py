"""The pages in docs/methods say what the code does: their YAML loads, their tables name fields and defaults."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from index import IndexConfig
from retriever.heads import HEADS
from training import Experiment, load_experiment
from training.losses import LOSSES

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/methods").glob("*.md"))}
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
HEADINGS = (
    "When to take it",
    "Formula",
    "Arguments",
    "What the gradient reaches",
    "Paper, release and Endex",
    "Relations",
    "Example",
    "Results",
    "Source",
)
CLASSES = {config.__name__: (kind, config) for kind in (HEADS, LOSSES) for config in kind.values()}


def yaml_blocks() -> Iterator[Any]:
    """Yield every YAML block of every page."""
    for name, page in PAGES.items():
        blocks = re.findall(r"^```ya?ml\n(.*?)^```", page, re.M | re.S)
        yield from (pytest.param(block, id=f"{name}-{i}") for i, block in enumerate(blocks))


def table_rows() -> Iterator[Any]:
    """Yield page, option and default of every row of every table of arguments."""
    for name, page in PAGES.items():
        for table in re.findall(r"^\| option \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.M):
            for line in table.splitlines():
                option, default = (cell.strip() for cell in line.split("|")[1:3])
                yield pytest.param(name, option.strip("`"), default, id=f"{name}-{option}")


def option_fields(page: str, option: str) -> list[dataclasses.Field[Any]]:
    """Return the fields that an option can be: of a head or loss that the page names, or of another group."""
    group, _, name = option.partition(".")
    groups = {**get_type_hints(Experiment), "index": IndexConfig}
    kinds = {"head": HEADS, "loss": LOSSES}
    if group in kinds:
        named = set(re.findall(r"\w+Config", PAGES[page]))
        owners = [
            config for each, (kind, config) in CLASSES.items() if kind is kinds[group] and each in named
        ]
    else:
        owners = [groups[group]]
    return [field for owner in owners for field in dataclasses.fields(owner) if field.name == name]


def as_value(cell: str) -> object:
    """Return the value that YAML 1.2 gives a cell; PyYAML takes 1e-8 for a text."""
    return float(cell) if re.fullmatch(r"[\d.]+(e-?\d+)?", cell) else yaml.safe_load(cell)


@pytest.mark.parametrize("block", list(yaml_blocks()))
def test_a_yaml_block_of_a_page_builds_its_head_and_loss(tmp_path: Path, block: str) -> None:
    recipe = {"output": "run", "data": {"source": "data"}, **yaml.safe_load(block)}
    recipe["model"] = {"encoder": "model", **recipe.get("model", {})}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    experiment = load_experiment(path)
    assert experiment.head.build(384).dim == 384  # as MiniLM has, for which the recipes are
    assert experiment.loss.build() is not None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads(recipe: Path) -> None:
    assert isinstance(load_experiment(recipe), Experiment)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_page_that_a_recipe_names_is_there_and_names_the_recipe(recipe: Path) -> None:
    for page in re.findall(r"docs/methods/([\w-]+)\.md", recipe.read_text(encoding="utf-8")):
        assert f"endex train configs/{recipe.name}" in PAGES[page]


def test_every_recipe_that_a_page_names_is_there() -> None:
    named = {name for page in PAGES.values() for name in re.findall(r"configs/(\w+\.yaml)", page)}
    assert named <= {recipe.name for recipe in RECIPES}


@pytest.mark.parametrize(("page", "option", "default"), list(table_rows()))
def test_an_option_in_a_table_is_a_field(page: str, option: str, default: str) -> None:
    assert option_fields(page, option)


@pytest.mark.parametrize(("page", "option", "default"), list(table_rows()))
def test_a_default_in_a_table_is_the_fields(page: str, option: str, default: str) -> None:
    assert as_value(default) in [field.default for field in option_fields(page, option)]


@pytest.mark.parametrize(
    "config",
    [config for name, config in {**HEADS, **LOSSES}.items() if name not in ("none", "contrastive")],
    ids=lambda config: config.__name__,
)
def test_every_head_and_loss_is_in_an_example(config: type) -> None:
    assert any(f".{config.__name__}\n" in page for page in PAGES.values())


@pytest.mark.parametrize("page", [name for name in PAGES if name != "index"])
def test_a_page_has_its_parts_in_order(page: str) -> None:
    found = re.findall(r"^## (.*)$", PAGES[page], re.M)
    assert tuple(heading for heading in found if heading in HEADINGS) == HEADINGS


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_another_page_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([\w-]+)\.md\)", PAGES[page])
    assert links
    assert set(links) <= set(PAGES)

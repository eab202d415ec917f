"""Policies of the repository: which package imports what, what is never used, what lies where."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from index.builders import BUILDERS
from retriever.heads import HEADS
from training.losses import LOSSES

ROOT = Path(__file__).parents[2]
PACKAGES = ("retriever", "index", "training", "launch")  # each may import those on its left
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
TREES = dict(zip(NAMES, (ast.parse(path.read_text(encoding="utf-8")) for path in FILES), strict=True))
TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow", "comet_ml", "aim", "clearml", "swanlab", "neptune")
HEAVY = ("torch", "transformers", "numpy", "faiss", "datasets", "jsonargparse", "accelerate")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Yield (module, statement) of every import, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or "", node


def importers(module: str) -> set[str]:
    """Return the files that import a top-level module anywhere."""
    return {
        name
        for name, tree in TREES.items()
        for imported, _ in imports(tree)
        if imported.partition(".")[0] == module
    }


def top_level_imports(name: str) -> set[str]:
    """Return the top-level modules that a file imports outside functions, as far as it does so when it runs."""
    inside = {
        id(statement)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.FunctionDef)
        or (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
        for statement in ast.walk(node)
    }
    return {module.partition(".")[0] for module, node in imports(TREES[name]) if id(node) not in inside}


def strings(tree: ast.AST) -> Iterator[str]:
    """Yield every string that is not a docstring or a text standing alone."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_package_imports_only_packages_on_its_left(name: str) -> None:
    own = PACKAGES.index(name.partition("/")[0])
    allowed = {*PACKAGES[: own + 1]}
    found = {module.partition(".")[0] for module, _ in imports(TREES[name])} & set(PACKAGES)
    assert found <= allowed


def test_faiss_is_imported_only_in_index() -> None:
    assert {name.partition("/")[0] for name in importers("faiss")} == {"index"}


def test_faiss_is_imported_only_when_it_is_used() -> None:
    assert [name for name in NAMES if "faiss" in top_level_imports(name)] == []


def test_transformers_is_imported_only_by_the_encoder() -> None:
    assert importers("transformers") == {"retriever/encoder.py"}


def test_sentence_transformers_is_never_imported() -> None:
    assert importers("sentence_transformers") == set()


def test_datasets_is_imported_only_in_retriever() -> None:
    assert {name.partition("/")[0] for name in importers("datasets")} == {"retriever"}


def test_datasets_is_imported_only_when_it_is_used() -> None:
    assert [name for name in NAMES if "datasets" in top_level_imports(name)] == []


@pytest.mark.parametrize("tracker", TRACKERS)
def test_trackers_are_imported_only_by_tracking(tracker: str) -> None:
    assert importers(tracker) <= {"training/tracking.py"}


def test_trackers_are_named_only_by_tracking() -> None:
    """`endex env` may name distributions, to print their versions."""
    named = {name for name, tree in TREES.items() for text in strings(tree) if text in TRACKERS}
    assert named <= {"training/tracking.py", "launch/env.py"}


def test_tests_benchmarks_and_recipes_are_never_imported() -> None:
    assert set().union(*(importers(module) for module in ("tests", "benchmarks", "configs"))) == set()


@pytest.mark.parametrize("package", ["retriever", "training"])
def test_a_package_is_importable_without_the_libraries_it_uses_late(package: str) -> None:
    blocked = "import sys\nfor name in ('faiss', 'datasets', 'jsonargparse', 'ir_measures'):\n"
    done = run_python(f"{blocked}    sys.modules[name] = None\nimport {package}\n")
    assert done.returncode == 0, done.stderr


def test_the_command_lines_entry_imports_nothing_heavy() -> None:
    """So that its guard speaks before a hidden package fails somewhere else, and --help is quick."""
    done = run_python(f"import sys, launch.main\nprint([m for m in {HEAVY} if m in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_pickled(name: str) -> None:
    tree = TREES[name]
    modules = {module.partition(".")[0] for module, _ in imports(tree)}
    assert modules.isdisjoint({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "save"), ("torch", "load")}, node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert not {"save", "load"} & {alias.name for alias in node.names}, node.lineno
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", node.lineno


@pytest.mark.parametrize("folder", ["tests", "configs"])
def test_a_folder_that_is_no_package_has_no_init_file(folder: str) -> None:
    assert list((ROOT / folder).rglob("__init__.py")) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_marked_as_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def exported(name: str) -> list[str]:
    module = importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return list(vars(module).get("__all__", []))


@pytest.mark.parametrize("name", NAMES)
def test_every_module_says_what_it_exports(name: str) -> None:
    assert exported(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_exported_name_exists(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    assert [each for each in exported(name) if each not in vars(module)] == []


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_exported_twice(name: str) -> None:
    assert len(set(exported(name))) == len(exported(name))


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("retriever/heads/__init__.py", "HEADS"),
        ("training/losses/__init__.py", "LOSSES"),
        ("index/builders/__init__.py", "BUILDERS"),
        ("retriever/heads/estimators.py", "ESTIMATORS"),
        ("retriever/heads/selection.py", "SELECTIONS"),
        ("retriever/transforms/rotations.py", "ROTATIONS"),
        ("training/losses/distillation.py", "OBJECTIVES"),
        ("training/losses/inrp.py", "WEIGHTS"),
    ],
)
def test_a_registry_is_a_literal_of_names_and_classes(name: str, variable: str) -> None:
    values = [
        node.value
        for node in TREES[name].body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == variable
    ]
    assert len(values) == 1
    assert isinstance(values[0], ast.Dict)
    assert all(isinstance(key, ast.Constant) for key in values[0].keys)
    assert all(isinstance(value, ast.Name) for value in values[0].values)


@pytest.mark.parametrize("key", [*HEADS, *LOSSES])
def test_a_configuration_is_registered_under_its_own_name(key: str) -> None:
    assert {**HEADS, **LOSSES}[key].name == key


def test_no_name_is_both_a_heads_and_a_losss() -> None:
    assert set(HEADS).isdisjoint(LOSSES)


@pytest.mark.parametrize(
    ("folder", "registry"),
    [("retriever/heads", HEADS), ("training/losses", LOSSES), ("index/builders", BUILDERS)],
    ids=["heads", "losses", "builders"],
)
def test_every_registered_class_has_a_file_of_its_own(folder: str, registry: dict[str, type]) -> None:
    modules = [cls.__module__ for cls in registry.values()]
    assert len(set(modules)) == len(modules)
    assert all(module.startswith(folder.replace("/", ".") + ".") for module in modules)


def test_no_tracked_file_holds_a_path_of_a_developers_machine() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    local = re.compile(rb"(?<![\w.:/-])/(work/(main|shared|\.library)|tmp/ev|home/\w+|root)\b")
    hits = [
        f"{name}: {match[0].decode()}"
        for name in tracked.decode().split("\0")
        if name and (ROOT / name).is_file()
        for match in local.finditer((ROOT / name).read_bytes())
    ]
    assert hits == []

"""The built wheel: what it holds, and that it runs where folders of the same names lie."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from retriever import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


Endex = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def endex(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Endex:
    """Run the console script of a fresh environment that has the wheel and sees this environment's libraries."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home)
    target = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(target, "libraries.pth").write_text("\n".join(libraries) + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--quiet"]
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*install, *options, str(wheel)], check=True)

    def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(home / "bin" / "endex"), *words],
            cwd=cwd,
            env={**outside, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A user's folder with a package `training` and a module `index`, which must not be imported."""
    (tmp_path / "training").mkdir()
    for name in ("training/__init__.py", "index.py"):
        (tmp_path / name).write_text("raise RuntimeError('this is not Endex')\n")
    return tmp_path


def test_the_wheel_holds_the_four_packages_and_nothing_else(names: list[str]) -> None:
    top = {name.partition("/")[0] for name in names}
    assert top == {"retriever", "index", "training", "launch", f"endex-{__version__}.dist-info"}


def test_the_wheel_holds_every_module_of_the_packages(names: list[str]) -> None:
    packages = ("retriever", "index", "training", "launch")
    modules = {
        path.relative_to(ROOT).as_posix() for package in packages for path in (ROOT / package).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules


def test_the_wheel_marks_every_package_as_typed(names: list[str]) -> None:
    assert {name for name in names if name.endswith("py.typed")} == {
        f"{package}/py.typed" for package in ("retriever", "index", "training", "launch")
    }


def test_the_wheel_carries_the_licence(names: list[str]) -> None:
    assert f"endex-{__version__}.dist-info/licenses/LICENSE" in names


def test_the_installed_command_prints_the_version_beside_folders_of_equal_names(
    endex: Endex, hostile: Path
) -> None:
    done = endex("--version", cwd=hostile)
    assert (done.returncode, done.stdout) == (0, f"endex {__version__}\n"), done.stderr


def test_the_installed_command_works_beside_folders_of_equal_names(endex: Endex, hostile: Path) -> None:
    done = endex("env", cwd=hostile)
    assert done.returncode == 0, done.stderr
    assert "faiss" in done.stdout


@pytest.mark.parametrize("name", ["training/__init__.py", "index.py"])
def test_the_guard_names_the_file_that_hides_a_package(endex: Endex, hostile: Path, name: str) -> None:
    other = {"training/__init__.py": "index.py", "index.py": "training/__init__.py"}[name]
    (hostile / other).unlink()
    done = endex("env", cwd=hostile, PYTHONPATH=str(hostile))
    assert done.returncode == 2
    assert done.stderr.startswith(f"endex: {hostile / name} hides Endex's package")
    assert done.stderr.count("\n") == 1


def test_a_folder_without_an_init_file_hides_nothing(endex: Endex, tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    done = endex("--version", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr

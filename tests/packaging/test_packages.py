"""The map of folders to packages: complete, and never gone around."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("spec", "compiler", "runtime", "trainers")
# Code of ours, tests and demo included.
SOURCES = (*FOLDERS, "tests", "examples", "benchmarks")
BARE_IMPORT = re.compile(
    r"^\s*(?:from|import)\s+(?:spec|compiler|runtime|trainers)(?:\.[\w.]+)?\s*(?:import\b|as\b|,|#|$)"
)


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def python_files(folders: tuple[str, ...]) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_every_folder_with_code_is_a_listed_package(pyproject: dict) -> None:
    folders = {path.parent.relative_to(ROOT) for path in python_files(FOLDERS)}
    expected = {".".join(("archwright", *folder.parts)) for folder in folders}
    listed = pyproject["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(expected), "a package that is not listed is silently left out of the wheel"


def test_every_package_has_an_init() -> None:
    lacking = {path.parent for path in python_files(FOLDERS) if not (path.parent / "__init__.py").exists()}
    assert not lacking


def test_the_namespace_itself_has_no_init() -> None:
    assert not (ROOT / "__init__.py").exists()


def test_links_lead_to_the_folders() -> None:
    for folder in FOLDERS:
        link = ROOT / "tests" / "linktree" / "archwright" / folder
        assert link.is_symlink() and not link.readlink().is_absolute()
        assert link.resolve() == ROOT / folder


def test_bare_names_are_never_imported() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in python_files(SOURCES)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BARE_IMPORT.match(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import spec",
        "from spec import load",
        "import compiler.ir as ir",
        "    from runtime.text import x",
        "import trainers",
    ],
)
def test_the_search_and_ruff_both_see_a_bare_import(line: str) -> None:
    assert BARE_IMPORT.match(line)
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--select",
        "TID251",
        "--stdin-filename",
        "x.py",
        "-",
    ]
    run = subprocess.run(
        command, input=f"def function():\n    {line.strip()}\n", cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1 and "TID251" in run.stdout


def test_ruff_refuses_relative_imports() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "compiler/ir/x.py", "-"]
    run = subprocess.run(command, input="from . import block\n", cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "TID252" in run.stdout


def test_names_that_would_shadow_a_library_are_not_used() -> None:
    shadowing = {"onnx", "tensorrt", "torch", "numpy"}
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.stem in shadowing]
    assert not found


def test_constraints_pin_every_dependency(pyproject: dict) -> None:
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    # The gpu extra's libraries were never installed on the machines that wrote the pins.
    requirements = [*project["dependencies"], *(line for extra in extras if extra != "gpu" for line in extras[extra])]
    names = {re.split(r"[\[<>=,;]", line)[0].lower() for line in requirements}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if line and not line.startswith("#")}
    assert names <= pinned, f"not pinned: {sorted(names - pinned)}"


def test_the_license_is_there() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()

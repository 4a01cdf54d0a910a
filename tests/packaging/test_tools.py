"""The tools around the code: make, the test shares, the guard of the type check."""

import os
import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"setup", "demo", "test", "test-quick", "test-slow", "lint", "typecheck", "bench", "clean"}


def load_script(path: Path) -> ModuleType:
    found = util.spec_from_file_location(path.stem, path)
    assert found and found.loader
    module = util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


shares = load_script(ROOT / "tests" / "shares.py")
check = load_script(ROOT / "tests" / "linktree" / "check.py")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A test run that make itself started must not hand its flags on.
    environment = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    }
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_make_lists_its_targets() -> None:
    result = make()
    assert result.returncode == 0
    assert TARGETS <= set(re.findall(r"^ +make (\S+)", result.stdout, re.MULTILINE))


def test_an_old_python_is_refused_with_the_way_out(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    fake = "import sys; sys.version_info = (3, 10, 4); exec(sys.argv.pop(1))"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{fake}' \"$2\"\n")
    old.chmod(0o755)
    result = make("setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr and "make PYTHON=" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_an_absent_python_is_named(tmp_path: Path) -> None:
    result = make("setup", "PYTHON=python-that-is-not-there", f"VENV={tmp_path / 'venv'}")
    assert result.returncode != 0
    assert "There is no python-that-is-not-there" in result.stderr


@pytest.mark.parametrize("settings", [("ARCHWRIGHT_TORCH=2.12.0", "ARCHWRIGHT_TORCH_INDEX=file:///wheels"), ()])
def test_the_torch_override_reaches_pip(settings: tuple[str, ...], tmp_path: Path) -> None:
    steps = make("-n", "setup", f"VENV={tmp_path / 'venv'}", *settings).stdout
    torch_step = next(line for line in steps.splitlines() if line.endswith(" torch"))
    archwright_step = next(line for line in steps.splitlines() if "-e '.[" in line)
    assert ("s/^torch==.*/torch==2.12.0/" in steps) is bool(settings)
    assert ("--index-url 'file:///wheels'" in torch_step) is bool(settings)
    assert "--index-url" not in archwright_step


def test_every_family_has_a_share_and_they_fit_in_fifteen_minutes() -> None:
    table = shares.read_shares(ROOT)
    families = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    assert families <= table.keys(), f"without a share: {sorted(families - table.keys())}"
    assert sum(table.values()) <= 2 * 15 * 60, "test-seconds of two workers"


def test_the_shares_are_read_from_a_report(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.spec.test_load" name="a" time="1.5"/>'
        '<testcase classname="tests.spec.test_load" name="b" time="2.0"/>'
        '<testcase classname="tests.other.test_x.TestClass" name="c" time="1.0"/>'
        "</testsuite></testsuites>"
    )
    times = shares.read_times(report)
    assert times == {"spec": (2, 3.5), "other": (1, 1.0)}
    text = shares.table(times, {"spec": 2})
    assert "over by 2 s" in text and "no share" in text


def test_the_type_check_notices_files_it_did_not_see() -> None:
    report = {"summary": {"filesAnalyzed": 3}}
    assert check.missing_files(report, 5) == 2
    assert check.missing_files(report, 3) == 0


def test_the_type_check_counts_every_file() -> None:
    assert check.count_files(ROOT) == sum(len(list((ROOT / folder).rglob("*.py"))) for folder in check.FOLDERS) > 20


@pytest.mark.heavy
def test_pyright_covers_every_file_and_finds_a_planted_fault(tmp_path: Path) -> None:
    """A copy of the tree with one fault in a strict folder: the configuration reaches it through the link."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("spec", "compiler", "runtime", "trainers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "linktree", tmp_path / "tests" / "linktree", symlinks=True)
    (tmp_path / "compiler" / "ir" / "planted.py").write_text("def untyped(value):\n    return value\n")
    result = subprocess.run([sys.executable, "tests/linktree/check.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.search(r"compiler/ir/planted\.py:1:\d+: error: .*value", result.stdout), result.stdout
    assert "files fewer" not in result.stderr


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("compiler/ir/planted.py", "import archwright.runtime.doctor", "spec <- compiler <- runtime <- trainers"),
        ("spec/planted.py", "import torch", "the language needs neither torch nor numpy"),
        ("compiler/blocks/planted.py", "import numpy", "the IR and the blocks are plain Python"),
        ("spec/planted.py", "import json", None),
    ],
)
def test_the_import_contracts_find_a_planted_fault(file: str, line: str, contract: str | None, tmp_path: Path) -> None:
    """On a copy laid out as the wheel has it; a folder on the path comes before the editable installation."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    for folder in ("spec", "compiler", "runtime", "trainers"):
        shutil.copytree(ROOT / folder, tmp_path / "archwright" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "archwright" / file).write_text(f"{line}\n")
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == (1 if contract else 0), result.stdout + result.stderr
    if contract:
        assert f"{contract} BROKEN" in result.stdout and "planted" in result.stdout

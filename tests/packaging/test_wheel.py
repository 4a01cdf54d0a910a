"""The wheel holds everything, and works without the source tree."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("spec", "compiler", "runtime", "trainers")

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that no build folder of this one mixes in."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip builds it, without the network."""
    output = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(output),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True)
    (built,) = output.glob("archwright-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel in it.

    The dependencies come from this environment through a .pth file, and the editable finder of this one does not come
    along: .pth files are read in site folders only.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(command, check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(binary: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(binary), *arguments], cwd=folder, capture_output=True, text=True)


def test_wheel_holds_every_module_and_preset(source: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    # The build leaves a folder `build` in the source, which is not looked at.
    files = [path for folder in FOLDERS for path in (source / folder).rglob("*") if path.suffix in {".py", ".yaml"}]
    expected = {f"archwright/{path.relative_to(source).as_posix()}" for path in files}
    assert expected <= names, f"not in the wheel: {sorted(expected - names)}"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"archwright", names[-1].split("/")[0]}
    assert {name.split("/")[1] for name in names if name.startswith("archwright/")} == set(FOLDERS)


def test_the_installed_wheel_imports_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import archwright.spec, archwright.trainers; print(archwright.spec.__file__)"
    result = run(installed / "python", "-c", code, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(installed.parent)


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    # --target puts console scripts under site-packages/bin, with the interpreter of the pip that ran; start it by hand.
    code = "import sys; from archwright.spec.cli import main; sys.exit(main())"
    for arguments in (
        ["--help"],
        ["presets", "--output-format", "json"],
        ["init", "--preset", "tiny", "-o", "tiny.yaml"],
    ):
        result = run(installed / "python", "-c", code, *arguments, folder=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "tiny.yaml").exists()

"""The wheel holds everything, and works without the source tree."""

import json
import os
import random
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
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([str(binary), *arguments], cwd=folder, env=environment, capture_output=True, text=True)


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


def archwright(installed: Path, folder: Path, *arguments: str) -> str:
    """The standard output of a command that succeeds.

    --target puts console scripts under site-packages/bin, with the interpreter of the pip that ran: started by hand.
    """
    code = "import sys; from archwright.spec.cli import main; sys.exit(main())"
    result = run(installed / "python", "-c", code, *arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def write_texts(folder: Path) -> None:
    """Sentences of made-up words."""
    chooser = random.Random(0)
    syllables = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
    words = ["".join(chooser.choices(syllables, k=chooser.randint(1, 3))) for _ in range(400)]
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(". ".join(" ".join(chooser.choices(words, k=8)) for _ in range(40)))


def test_the_installed_command_plans_trains_builds_and_generates(installed: Path, tmp_path: Path) -> None:
    """Preset tiny, from text to an artifact that writes, with the wheel alone."""

    def command(*arguments: str) -> str:
        return archwright(installed, tmp_path, *arguments)

    write_texts(tmp_path / "texts")
    command("init", "--preset", "tiny", "-o", "tiny.yaml")
    assert "tiny" in {preset["name"] for preset in json.loads(command("presets", "--output-format", "json"))}
    sources = "data.sources=[{kind: text, path: texts}]"
    command("validate", "tiny.yaml", "--set", sources)
    planned = json.loads(command("plan", "tiny.yaml", "--gpus", "1xH100", "--output-format", "json"))
    assert planned["parameters"]["total"] > 0 and planned["fits"]
    command("tokenizer", "train", "tiny.yaml", "-o", "tokenizer", "--set", sources)
    tokenizer = ["--set", "tokenizer.path=tokenizer"]
    command("data", "build", "tiny.yaml", "-o", "data", "--set", sources, *tokenizer)
    command("train", "tiny.yaml", "-o", "run", "--set", "data.path=data", *tokenizer)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 50 and losses[-1] < losses[0] - 1
    command("build", "run", "--to", "onnx", "-o", "artifact")
    generate = ["--prompt", "ba", "--max-tokens", "8", "--temperature", "0", "--output-format", "json"]
    answers = [json.loads(command("generate", model, *generate)) for model in ("artifact", "run")]
    assert answers[0]["tokens"] == answers[1]["tokens"] and answers[0]["text"]

"""What README.md and CONTRIBUTING.md tell people to type: it exists, and it runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from archwright.spec import load
from archwright.spec.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
ARCHWRIGHT = Path(sys.executable).parent / "archwright"
COMMANDS = [command.removeprefix("archwright ") for command in re.findall(r"`(archwright [^`]+)`", README)]
# A command with a word in capitals stands for a file that only a training run makes; the demo runs those.
COMPLETE = [command for command in COMMANDS if not re.search(r"\b[A-Z]{2,}\b", command)]


def archwright(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ARCHWRIGHT, *arguments], cwd=folder, capture_output=True, text=True)


def test_every_verb_is_in_the_readme() -> None:
    assert {shlex.split(command)[0] for command in COMMANDS} == set(VERBS)


@pytest.mark.heavy
def test_complete_commands_run_in_order(tmp_path: Path) -> None:
    assert len(COMPLETE) >= 7
    for command in COMPLETE:
        result = archwright(*shlex.split(command), folder=tmp_path)
        assert result.returncode == 0, f"archwright {command}\n{result.stderr}"
        assert "Traceback" not in result.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(verb: str, tmp_path: Path) -> None:
    result = archwright(verb, "--help", folder=tmp_path)
    assert result.returncode == 0 and verb in result.stdout, result.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
def test_yaml_blocks_are_legal(text: str) -> None:
    load("preset:tiny", dict(YAML(typ="safe").load(text)))


def test_the_first_block_is_three_lines_of_python() -> None:
    first = re.search(r"```(\w*)\n(.*?)```", README, re.DOTALL)
    assert first and first[1] == "python"
    assert len(first[2].strip().splitlines()) == 3


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = README + CONTRIBUTING
    named = re.findall(r"(?:`|^)make (?:[A-Z_]+=\S+ )*([a-z -]+?)(?:`|$| +#)", text, re.MULTILINE)
    assert len(named) > 8
    assert {target for line in named for target in line.split()} <= targets


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README + CONTRIBUTING):
        assert (ROOT / link).exists(), link

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from archwright.spec import cli, load
from archwright.spec.cli import VERBS, main, parse_overrides
from archwright.spec.errors import ArchwrightError

LANGUAGE_VERBS = [name for name, (target, _) in VERBS.items() if target.startswith("archwright.spec.")]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    return status, *capsys.readouterr()


def test_the_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]):
    for arguments in ([], ["--help"], ["-h"]):
        status, out, _ = run(capsys, *arguments)
        assert status == 0
        assert all(re.search(rf"^  {verb} ", out, re.MULTILINE) for verb in VERBS)


def test_version(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "--version")
    assert status == 0 and re.fullmatch(r"archwright \d+\.\d+\.\d+\S*\n", out)


@pytest.mark.parametrize(("verb", "hint"), [("validat", "did you mean `validate`?"), ("xyzzy", "lists the verbs")])
def test_an_unknown_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str], verb: str, hint: str):
    status, out, err = run(capsys, verb)
    assert (status, out) == (2, "") and hint in err


@pytest.mark.parametrize("verb", LANGUAGE_VERBS)
def test_help(capsys: pytest.CaptureFixture[str], verb: str):
    status, out, _ = run(capsys, verb, "--help")
    assert status == 0 and out.startswith(f"usage: archwright {verb} ")


@pytest.mark.parametrize(
    "arguments", [["validate"], ["validate", "x", "--sett"], ["validate", "x", "--set", "train.steps"]]
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    status, _, err = run(capsys, *arguments)
    assert status == 2 and err.startswith("usage: archwright validate ")


def test_init_validate_show(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(capsys, "init", "--preset", "tiny", "-o", "spec.yaml")[:2] == (0, "wrote spec.yaml\n")
    assert run(capsys, "validate", "spec.yaml")[:2] == (0, "spec.yaml: ok (tiny)\n")
    status, out, _ = run(capsys, "show", "spec.yaml", "--set", "train.steps=7", "--set", "name=other")
    Path("shown.yaml").write_text(out)
    assert status == 0 and load("shown.yaml") == load("spec.yaml", {"train.steps": 7, "name": "other"})
    status, out, _ = run(capsys, "show", "spec.yaml", "--provenance")
    assert status == 0 and "  steps: 50  # spec.yaml:" in out


def test_init_does_not_overwrite(folder: Path, capsys: pytest.CaptureFixture[str]):
    Path("spec.yaml").write_text("mine")
    status, _, err = run(capsys, "init", "-o", "spec.yaml")
    assert status == 1 and "SPEC090" in err and Path("spec.yaml").read_text() == "mine"
    assert run(capsys, "init", "-o", "spec.yaml", "--force")[0] == 0
    assert load("spec.yaml") == load("preset:tiny")
    assert run(capsys, "init", "-o", ".", "--force")[0] == 1


def test_init_of_an_unknown_preset(folder: Path, capsys: pytest.CaptureFixture[str]):
    status, _, err = run(capsys, "init", "--preset", "tyni", "-o", "spec.yaml")
    assert status == 1 and "SPEC006" in err and "did you mean `tiny`?" in err
    assert os.listdir() == []


def test_presets(capsys: pytest.CaptureFixture[str]):
    assert run(capsys, "presets")[0] == 0
    status, out, _ = run(capsys, "presets", "--output-format", "json")
    listing = {preset["name"]: preset for preset in json.loads(out)}
    assert status == 0 and listing["llama3.1-8b"]["parameters"] == 8_030_261_248 and listing["tiny"]["summary"]


def test_schema(folder: Path, capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "schema")
    assert status == 0 and json.loads(out)["$defs"]["Model"]
    assert run(capsys, "schema", "-o", "schema.json")[:2] == (0, "")
    assert Path("schema.json").read_text() == out


def test_an_error_is_printed_once_in_the_format_that_was_asked_for(capsys: pytest.CaptureFixture[str]):
    fault = ("preset:tiny", "--set", "train.steps=0")
    status, out, err = run(capsys, "validate", *fault)
    assert (status, out) == (1, "") and err.startswith("--set train.steps:1:1: SPEC014 ") and "Traceback" not in err
    status, out, err = run(capsys, "validate", *fault, "--output-format", "json")
    assert (status, err) == (1, "") and json.loads(out)["diagnostics"][0]["code"] == "SPEC014"
    status, out, err = run(capsys, "validate", *fault, "--output-format=github")
    assert (status, err) == (1, "") and out.startswith("::error file=--set train.steps,line=1,")
    status, out, _ = run(capsys, "validate", "preset:tiny", "--output-format", "json")
    assert status == 0 and json.loads(out) == {"ok": True, "name": "tiny", "diagnostics": []}


def test_overrides():
    overrides = parse_overrides(["a.b=1", "c = [x, y=z]", "a.b=2"])
    assert list(overrides) == ["c", "a.b"]
    with pytest.raises(ValueError, match="not PATH=VALUE"):
        parse_overrides(["=1"])
    first = cli.parser("validate", "")
    cli.add_set(first)
    assert list(first.parse_args(["--set", "a=1", "--set", "b=2"]).overrides) == ["a", "b"]
    assert first.parse_args([]).overrides == {}


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ArchwrightError("RUN001", "no", where="x", help="y"), 1, "x: RUN001 no\n  help: y"),
        (FileNotFoundError(2, "No such file or directory", "spec.yaml"), 1, "spec.yaml: SPEC092 "),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("broken\ntwice"), 3, "internal error: RuntimeError: broken twice"),
    ],
)
def test_how_a_verb_may_end(
    error: BaseException, status: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("archwright.spec.verbs.validate", fail)
    found, _, err = run(capsys, "validate")
    assert found == status and words in err and "Traceback" not in err
    if status in (1, 3):
        assert "Traceback" in run(capsys, "validate", "--debug")[2]


def test_a_name_that_the_terminal_cannot_show_is_no_error(folder: Path):
    """A file's name may be no text at all, and a terminal may be of another time."""
    command = f"{sys.executable} -c 'from archwright.spec.cli import main; main()' validate preset:tiny --set name="
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["sh", "-c", command + "naïve"], capture_output=True, text=True, env=environment)
    assert "na\\xefve" in done.stdout and done.stderr == ""


def test_a_reader_that_goes_away_is_no_error():
    command = (
        f"{sys.executable} -c 'import sys; from archwright.spec.cli import main; sys.exit(main())' schema | head -1"
    )
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "{\n", "")


def test_validate_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from archwright.spec.cli import main; status = main(['validate', 'preset:tiny'])\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'sentencepiece', 'rich'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_verbs_let_waiting_threads_sleep(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    environment = {} if given is None else {"OMP_WAIT_POLICY": given}
    monkeypatch.setattr(os, "environ", environment)
    assert run(capsys, "presets")[0] == 0
    assert environment["OMP_WAIT_POLICY"] == expected

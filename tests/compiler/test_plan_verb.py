"""`archwright plan`."""

import json

import pytest

from archwright.spec.cli import main


def test_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "preset:llama3.2-1b", "--output-format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 1_235_814_400


def test_what_does_not_fit_is_printed_and_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "preset:llama3.1-8b", "--gpus", "1xH100", "--output-format", "json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is False and answer["parameters"]["total"] == 8_030_261_248
    assert main(["plan", "preset:llama3.1-8b", "--gpus", "1xH100"]) == 1
    assert "fits            no:" in capsys.readouterr().out


def test_text_shows_the_memory_of_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "preset:llama3.1-8b", "--gpus", "512xH100", "--set", "build.precision=bfloat16"]
    arguments += ["--set", "build.max_positions=8192", "--set", "build.parallel.tensor=2"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "llama3.1-8b: inference, tensor 2, 256 replicas" in text
    assert "8,030,261,248; 4,540,600,320 on each rank" in text
    assert "weights              9.081 GB  █████" in text


def test_errors_are_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "preset:tiny", "--gpus", "8xTPU"]) == 1
    assert "PLAN001" in capsys.readouterr().err
    assert main(["plan", "preset:tiny", "--gpus", "3xH100", "--set", "parallel.tensor=2"]) == 1
    assert "PLAN002" in capsys.readouterr().err
    assert main(["plan", "preset:tiny", "--dump-after", "fuse"]) == 2
    assert main(["plan", "--help"]) == 0


def test_a_program_is_dumped_instead(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "preset:tiny", "--set", "parallel.tensor=2", "--dump-after", "partition"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("program: ") and "mlp: SwiGLU enter=tensor" in text and "FLOPs" not in text

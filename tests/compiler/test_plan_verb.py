"""`archwright plan`."""

import json
from collections.abc import Callable
from pathlib import Path

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
    assert "weights                    9.081 GB  ████" in text


TRAIN_8B = "train={kind: pretrain, precision: bfloat16, batch_size: 1024, micro_batches: 4, sequence_length: 8192}"
TRAIN_405B = (
    "train={kind: pretrain, precision: bfloat16, batch_size: 512, micro_batches: 64, sequence_length: 8192, "
    "activation_checkpointing: {kind: selective, keep: [attention]}}"
)
GOLDEN = {
    "inference_8b": ["preset:llama3.1-8b", "build.precision=bfloat16", "build.parallel.tensor=2"],
    "training_8b": ["preset:llama3.1-8b", TRAIN_8B, "parallel={tensor: 2, sequence: true}"],
    "training_405b": ["preset:llama3.1-405b", TRAIN_405B, "parallel={tensor: 8, pipeline: 16, sequence: true}"],
    "too_large_405b": ["preset:llama3.1-405b", TRAIN_405B, "parallel.tensor=8", "train.micro_batches=2"],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_plans_of_512_gpus(name: str, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]) -> None:
    """The text, and the JSON with one rank of each pipeline position."""
    spec, *settings = GOLDEN[name]
    arguments = ["plan", spec, "--gpus", "512xH100", *(word for each in settings for word in ("--set", each))]
    status = main(arguments)
    text = capsys.readouterr().out
    assert main([*arguments, "--output-format", "json"]) == status == (1 if name == "too_large_405b" else 0)
    content = json.loads(capsys.readouterr().out)
    ranks = content["memory"]["per_rank"]
    assert [rank["rank"] for rank in ranks] == list(range(2 if name == "inference_8b" else 512))
    content["memory"]["per_rank"] = list({rank["pipeline"]: rank for rank in ranks}.values())
    del content["constants"]  # a table of their own
    golden(f"plan_{name}.txt", f"{text}\n{json.dumps(_rounded(content), indent=1)}\n")


def _rounded(value: object) -> object:
    """Six digits: the last ones depend on the order of sums."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def test_errors_are_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "preset:tiny", "--gpus", "8xTPU"]) == 1
    assert "PLAN001" in capsys.readouterr().err
    assert main(["plan", "preset:tiny", "--gpus", "3xH100", "--set", "parallel.tensor=2"]) == 1
    assert "PLAN002" in capsys.readouterr().err
    assert main(["plan", "--help"]) == 0


MIXED = """\
version: 1
name: mixed
model:
  vocab_size: 100
  hidden_size: 24
  max_positions: 64
  positions: {kind: learned}
  layers:
    - repeat: 3
      layer:
        norm: {kind: layernorm}
        attention: {kind: gqa, heads: 4, kv_heads: 2, head_dim: 8, bias: all, position: {kind: none}}
        ffn: {kind: gelu, hidden_size: 96}
    - layer:
        attention: {kind: gqa, heads: 4, kv_heads: 2, mask: {kind: window, size: 16}, position: {kind: rope}}
        ffn: {kind: swiglu, hidden_size: 64}
build: {parallel: {tensor: 4}}
"""


@pytest.mark.parametrize("name", ["lower", "partition"])
def test_the_program_after_a_pass(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]
) -> None:
    """One line a block and a parameter, equal layers once; after partition with splits, `enter` and `reduce`."""
    (folder / "mixed.yaml").write_text(MIXED)
    texts = []
    for spec, *settings in (["preset:tiny", "--set", "parallel.tensor=2"], ["mixed.yaml"]):
        assert main(["plan", spec, *settings, "--dump-after", name]) == 0
        texts.append(capsys.readouterr().out)
    golden(f"dump_after_{name}.txt", "\n".join(texts))


def test_an_unknown_pass_is_told_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "preset:tiny", "--dump-after", "fuse"]) == 2
    told = capsys.readouterr().err
    assert "invalid choice: 'fuse'" in told and "lower" in told and "partition" in told


def test_a_program_is_dumped_instead(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "preset:tiny", "--set", "parallel.tensor=2", "--dump-after", "partition"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("program: ") and "mlp: SwiGLU enter=tensor" in text and "FLOPs" not in text

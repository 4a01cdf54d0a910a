"""`build`, `verify`, `inspect` and `generate` as typed: what is printed where, and the exit status."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from archwright.runtime import open_model
from archwright.spec.cli import main
from archwright.spec.manifest import write_manifest


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def type_in(monkeypatch: pytest.MonkeyPatch, text: str, *, terminal: bool = False) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(text) if terminal else io.StringIO(text))


@pytest.mark.parametrize("verb", ["build", "verify", "inspect", "generate"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "usage" in capsys.readouterr().out


def test_build_then_verify(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["build", str(model_folder), "--to", "onnx", "-o", str(out)]
    assert main([*arguments, "--set", "build.parallel.tensor=2"]) == 0
    printed = capsys.readouterr()
    assert "prefill and decode" in printed.out and "build: writing the graphs and weights of 2 ranks" in printed.err
    assert main(["verify", str(out), "--output-format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and all(check["result"] == "ok" for check in report["checks"])
    (out / "rank1" / "stage0.data").write_bytes(b"")
    assert main(["verify", str(out)]) == 1
    printed = capsys.readouterr()
    assert "rank1/stage0.data" in printed.err and "VERIFY001" in printed.err and "failed" in printed.out


def test_build_from_a_bare_spec(
    tmp_path: Path, write_spec: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["build", str(write_spec()), "--to", "onnx", "-o", str(out)]
    assert main(arguments) == 1
    assert "--set build.weights.kind=generated" in capsys.readouterr().err and not out.exists()
    assert main([*arguments, "--set", "build.weights.kind=generated", "--output-format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert main([*arguments, "--set", "build.weights.kind=generated"]) == 1, "it exists already"


def test_usage(tmp_path: Path, model_folder: Path) -> None:
    assert main(["build", str(model_folder), "-o", str(tmp_path / "out")]) == 2
    assert main(["build", str(model_folder), "--to", "coreml", "-o", str(tmp_path / "out")]) == 2
    assert main(["generate", str(model_folder)]) == 2
    assert main(["generate", str(model_folder), "--prompt", "the", "--system", "Be brief."]) == 2
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["generate", str(tmp_path), "--prompt", "the"]) == 1


def test_generate_prints_as_it_comes(model_folder: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = open_model(model_folder).generate("the stop", max_tokens=9)[0].text
    for path, engine in ((model_folder, "PyTorch"), (artifact, "ONNX Runtime")):
        assert main(["generate", str(path), "--prompt", "the stop", "--max-tokens", "9"]) == 0
        printed = capsys.readouterr()
        assert printed.out == expected + "\n"
        assert engine in printed.err and "9 tokens (length), prompt of" in printed.err


def test_generate_as_json(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(model_folder), "--prompt", "the", "--max-tokens", "5", "--output-format", "json"]
    arguments += ["--temperature", "0.8", "--top-k", "40", "--top-p", "0.9", "--seed", "3"]
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 3}
    answer = open_model(model_folder).generate("the", max_tokens=5, **options)[0]
    assert (record["prompt"], record["text"], record["tokens"]) == ("the", answer.text, answer.tokens)
    assert record["finish_reason"] == answer.finish_reason and record["timings"]["prefill_s"] > 0
    assert main([*arguments, "--prompt", "stop"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [each["prompt"] for each in records] == ["the", "stop"] and records[0]["tokens"] == answer.tokens


def test_generate_a_batch_and_stop(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = open_model(model_folder).generate("the", max_tokens=9)[0].text
    stop = text[3:5]
    arguments = ["generate", str(model_folder), "--prompt", "the", "--prompt", "stop", "--max-tokens", "9"]
    assert main([*arguments, "--stop", stop]) == 0
    assert capsys.readouterr().out.startswith(f"== the\n{text[: text.index(stop)]}\n== stop\n")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--max-tokens", "0"], "RUN031"),
        (["--temperature", "-1"], "RUN031"),
        (["--top-p", "2"], "RUN031"),
        (["--prompt", "the" * 200], "RUN033"),
        (["--device", "tpu"], "RUN021"),
        (["--backend", "onnxruntime"], "RUN022"),
    ],
)
def test_generate_with_wrong_values(
    model_folder: Path, arguments: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(model_folder), "--prompt", "the", *arguments]) == 1
    assert f"{code} " in capsys.readouterr().err


def test_chat_with_piped_questions(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "the stop\n\ntext\n/exit\nnever asked\n")
    arguments = ["generate", str(model_folder), "--chat", "--max-tokens", "6", "--output-format", "json"]
    assert main(arguments) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["the stop", "text"]
    model = open_model(model_folder)
    messages = [{"role": "user", "content": "the stop"}]
    for record, question in zip(records, ("text", ""), strict=True):
        ids = model.chat.encode(messages, generation_prompt=True)
        assert record["tokens"] == model.generate([ids], max_tokens=6)[0].tokens
        messages += [{"role": "assistant", "content": record["text"]}, {"role": "user", "content": question}]


def test_chat_that_outgrows_the_model(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "the\n" * 5)
    assert main(["generate", str(model_folder), "--chat", "--system", "text", "--max-tokens", "12"]) == 0
    printed = capsys.readouterr()
    assert "longer than the model's 96 tokens: forgot the oldest" in printed.err


def test_a_question_over_the_capacity(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Piped, it ends the run with status 1; at a terminal it is reported, left out, and the chat goes on."""
    questions = "the\n" + "the stop " * 40 + "\ntext\n"
    arguments = ["generate", str(model_folder), "--chat", "--max-tokens", "4"]
    type_in(monkeypatch, questions)
    assert main(arguments) == 1
    piped = capsys.readouterr()
    type_in(monkeypatch, questions, terminal=True)
    assert main(arguments) == 0
    typed = capsys.readouterr()
    assert "RUN033" in piped.err and "RUN033" in typed.err and typed.err.count("> ") == 4
    assert typed.out.startswith(piped.out) and len(typed.out) > len(piped.out)


def test_chat_without_a_template(
    tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    type_in(monkeypatch, "the\n")
    assert main(["generate", str(write_model(tokenizer=False)), "--chat"]) == 1


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict, str]:
    assert main(["inspect", str(path), "--output-format", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(path)]) == 0
    return facts, capsys.readouterr().out


def test_inspect_a_model(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, text = inspected(model_folder, capsys)
    assert (facts["kind"], facts["parameters"], facts["precision"]) == ("model", 44192, "float32")
    assert facts["tensors"]["model.layers.1.self_attn.k_proj.weight"] == [16, 32]
    assert facts["tokenizer"]["bos_id"] == 1 and facts["files"]["model.safetensors"] > 4 * 44192
    assert "44,192" in text and "model.layers.0..1.mlp.up_proj.weight  [64, 32]" in text and "KiB" in text


def test_inspect_an_artifact(two_ranks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, text = inspected(two_ranks, capsys)
    assert (facts["kind"], facts["ranks"], facts["capacity"], facts["precision"]) == ("artifact", 2, 96, "float32")
    assert facts["tensors"]["model.layers.1.self_attn.k_proj.weight"] == [8, 32], "of one rank"
    assert facts["measured"]["errors"] and "tensors (of rank 0)" in text


def make_run(path: Path, models: list[Path], *, finished: bool) -> Path:
    """A run as `train` leaves it, from model folders as its checkpoints."""
    (path / "checkpoints").mkdir(parents=True)
    shutil.copy(models[0] / "spec.yaml", path / "spec.yaml")
    shutil.copy(models[0] / "tokenizer.model", path / "tokenizer.model")
    for number, model in enumerate(models, 9):
        step = path / "checkpoints" / f"step-{number:08d}"
        step.mkdir()
        shutil.copy(model / "model.safetensors", step / "model.safetensors")
        write_manifest(step, kind="run", spec=None, details={})
    (path / "metrics.jsonl").write_text('{"step": 9, "loss": 3.5}\n{"step": 10, "loss": 3.25}\n{"step": 1')
    if finished:
        (path / "model").mkdir()
    return path


def test_a_run_is_opened_and_inspected_at_its_newest_checkpoint(
    tmp_path: Path, write_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    models = [write_model(seed=seed) for seed in (1, 2)]
    run = make_run(tmp_path / "run", models, finished=True)
    facts, text = inspected(run, capsys)
    assert (facts["kind"], facts["checkpoints"], facts["finished"]) == ("run", [9, 10], True)
    assert facts["last_metrics"] == {"step": 10, "loss": 3.25} and "9, 10" in text
    tokens = [open_model(path).generate("the", max_tokens=8)[0].tokens for path in (*models, run)]
    assert tokens[2] == tokens[1] != tokens[0]
    assert main(["build", str(run), "--to", "onnx", "-o", str(tmp_path / "out")]) == 0
    assert open_model(tmp_path / "out").generate("the", max_tokens=8)[0].tokens == tokens[1]


def test_inspect_a_run_without_checkpoints(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", [model_folder], finished=False)
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    facts, _ = inspected(run, capsys)
    assert (facts["checkpoints"], facts["finished"], facts["parameters"]) == ([], False, 44192)


def test_inspect_a_tokenizer_and_data(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, text = inspected(tokenizer_folder, capsys)
    assert facts["kind"] == "tokenizer" and "<|im_end|>" in text
    (tmp_path / "train-00000.tokens.bin").write_bytes(b"12345678")
    write_manifest(tmp_path, kind="data", spec=None, details={"train": {"tokens": 4}, "dtype": "uint16"})
    facts, text = inspected(tmp_path, capsys)
    assert (facts["kind"], facts["train"]) == ("data", {"tokens": 4}) and "uint16" in text


def test_inspect_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert main(["inspect", str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().err.count("RUN017") == 2

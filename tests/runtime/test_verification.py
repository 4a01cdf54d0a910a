"""`verify` finds every change, names the file, and does not run what it did not find whole."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from archwright.runtime import numerics, verification, verify
from archwright.runtime.artifact import SEAL, seal
from archwright.runtime.verification import Report
from archwright.spec import ArchwrightError
from archwright.spec.cli import main
from archwright.spec.files import sha256_file


@pytest.fixture
def copy(tmp_path: Path, two_ranks: Path) -> Path:
    """A copy of a good artifact, to be damaged."""
    path = tmp_path / "artifact"
    shutil.copytree(two_ranks, path)
    return path


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def reseal(path: Path) -> None:
    """Write the manifest that a forger would: hashes of the files as they are now."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry |= {"sha256": sha256_file(path / name), "bytes": (path / name).stat().st_size}
    measured = manifest["measured"]
    measured[SEAL] = seal(manifest["details"], measured, manifest["spec_digest"])
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def results(report: Report) -> dict[str, str]:
    return {check.name: check.result for check in report.checks}


def test_a_good_artifact(copy: Path) -> None:
    report = verify(copy)
    assert report.ok and not report.problems()
    assert set(results(report).values()) == {"ok"}
    numbers = {check.name: check for check in report.checks if check.error is not None}
    assert set(numbers) == {"whole sequences", "prefill and decode", "end of the cache"}
    assert all(
        0 < check.error < check.tolerance == 2e-5 for check in numbers.values() if check.error and check.tolerance
    )
    text = report.as_text()
    assert "result" in text and "allowed" in text and "2.0e-05" in text
    assert report.as_json()["ok"] is True and json.dumps(report.as_json())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["data", "onnx"])
@pytest.mark.parametrize("position", [0, -1])
def test_one_bit_in_a_file(copy: Path, rank: int, kind: str, position: int) -> None:
    name = f"rank{rank}/stage0.{kind}"
    flip(copy / name, position)
    report = verify(copy)
    assert not report.ok and report.problems()[0].startswith(f"VERIFY001 {name}: its SHA-256")
    assert results(report)["numbers"] == "not done"


def test_one_bit_anywhere_in_the_manifest(copy: Path) -> None:
    """Each byte of it counts: hashes, details, measurements, spaces."""
    original = (copy / "manifest.json").read_bytes()
    for position in range(0, len(original), 23):
        flip(copy / "manifest.json", position)
        try:
            report = verify(copy)
        except ArchwrightError as error:
            assert error.code in ("SPEC091", "RUN015")
        else:
            assert not report.ok, original[position - 10 : position + 10]
            assert any(word in report.problems()[0] for word in ("manifest.json", "SHA-256", "bytes", "missing"))
        (copy / "manifest.json").write_bytes(original)
    assert verify(copy).ok


def test_other_files(copy: Path) -> None:
    flip(copy / "tokenizer.model", 50)
    (copy / "extra.txt").write_text("extra")
    problems = verify(copy).problems()
    assert [problem.split(":")[0] for problem in problems] == ["VERIFY001 extra.txt", "VERIFY001 tokenizer.model"]


def test_a_name_that_is_no_text(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / os.fsdecode(b"caf\xe9")).touch()
    assert main(["verify", str(copy)]) == 1
    assert "VERIFY001 caf\\udce9: not listed in manifest.json" in capsys.readouterr().out


def test_a_missing_rank(copy: Path) -> None:
    shutil.rmtree(copy / "rank1")
    assert "VERIFY001 rank1/stage0.data: missing" in verify(copy).problems()
    reseal_without(copy, "rank1/")
    report = verify(copy)
    assert report.problems() == ["VERIFY001 rank1/stage0.onnx: missing, and spec.yaml says 2 ranks"]


def reseal_without(path: Path, prefix: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith(prefix)}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def test_no_manifest(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(ArchwrightError, match="SPEC091"):
        verify(copy)


def test_not_an_artifact(model_folder: Path) -> None:
    with pytest.raises(ArchwrightError, match=r"RUN015 not an artifact but a model"):
        verify(model_folder)


@pytest.mark.parametrize("link", ["symbolic", "hard", "folder"])
def test_links_out_of_the_folder(copy: Path, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    if link == "folder":
        (copy / "rank1").rename(outside)
        (copy / "rank1").symlink_to(outside)
        name = "rank1"
    else:
        (copy / "rank1" / "stage0.data").rename(outside)
        name = "rank1/stage0.data"
        (os.symlink if link == "symbolic" else os.link)(outside, copy / name)
    problems = [problem for problem in verify(copy).problems() if problem.startswith("VERIFY002")]
    assert len(problems) == 1 and problems[0].startswith(f"VERIFY002 {name} is a")


def test_a_pipe_in_the_folder(copy: Path) -> None:
    os.mkfifo(copy / "rank1" / "pipe")
    assert [problem.split(":")[0] for problem in verify(copy).problems()] == [
        "VERIFY002 rank1/pipe is neither a file nor a folder"
    ]


@pytest.mark.parametrize(("key", "value"), [("length", "0"), ("length", "x"), ("offset", "-4"), ("offset", "9" * 20)])
def test_external_data_of_another_size(copy: Path, key: str, value: str) -> None:
    def edit(model: onnx.ModelProto) -> None:
        for entry in model.graph.initializer[-1].external_data:
            if entry.key == key:
                entry.value = value

    change(copy / "rank1" / "stage0.onnx", edit)
    reseal(copy)
    report = verify(copy)
    assert not report.ok and results(report)["numbers"] == "not done"


@pytest.mark.parametrize("location", ["../rank0/stage0.data", "/etc/hostname", "sub/stage0.data", ""])
def test_external_data_elsewhere(copy: Path, location: str) -> None:
    change(copy / "rank1" / "stage0.onnx", lambda model: set_location(model, location))
    reseal(copy)
    report = verify(copy)
    assert any(f"VERIFY003 rank1/stage0.onnx: names `{location}`" in problem for problem in report.problems())
    assert results(report)["numbers"] == "not done", "a graph that reaches out of its folder is not run"


def change(graph: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(graph, load_external_data=False)
    edit(model)
    graph.write_bytes(model.SerializeToString(deterministic=True))


def set_location(model: onnx.ModelProto, location: str) -> None:
    for entry in model.graph.initializer[-1].external_data:
        if entry.key == "location":
            entry.value = location


def node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(item for item in model.graph.node if item.op_type == op)


def swap_gate_and_up(model: onnx.ModelProto) -> None:
    projections = [item for item in model.graph.node if item.op_type == "MatMul" and "mlp" in item.name]
    gate, up = projections[:2]
    gate.input[1], up.input[1] = up.input[1], gate.input[1]


def set_attribute(model: onnx.ModelProto, op: str, name: str, value: Any) -> None:
    for item in node(model, op).attribute:
        if item.name == name:
            item.CopyFrom(onnx.helper.make_attribute(name, value))


GRAPH_FAULTS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "scale": lambda model: set_attribute(model, "Attention", "scale", 0.4),
    "epsilon": lambda model: set_attribute(model, "RMSNormalization", "epsilon", 0.1),
    "mask off by one": lambda model: setattr(node(model, "LessOrEqual"), "op_type", "Less"),
    "gate and up": swap_gate_and_up,
    "residual": lambda model: setattr(node(model, "Add"), "op_type", "Sub"),
}


@pytest.mark.parametrize("fault", GRAPH_FAULTS)
def test_graphs_that_compute_something_else(copy: Path, fault: str) -> None:
    """With hashes that fit: only the numbers can show it."""
    for rank in range(2):
        change(copy / f"rank{rank}" / "stage0.onnx", GRAPH_FAULTS[fault])
    reseal(copy)
    report = verify(copy)
    assert results(report)["linter"] == results(report)["files and hashes"] == "ok"
    assert results(report)["whole sequences"] == "failed" and report.problems()[0].startswith("VERIFY007")


def test_a_missing_sum(copy: Path) -> None:
    def remove(model: onnx.ModelProto) -> None:
        collective = node(model, "DistCollective")
        for item in model.graph.node:
            item.input[:] = [collective.input[0] if name == collective.output[0] else name for name in item.input]
        model.graph.node.remove(collective)
        model.graph.value_info.remove(next(v for v in model.graph.value_info if v.name == collective.output[0]))

    for rank in range(2):
        change(copy / f"rank{rank}" / "stage0.onnx", remove)
    reseal(copy)
    assert results(verify(copy))["whole sequences"] == "failed"


def test_ranks_that_would_wait_for_each_other(copy: Path) -> None:
    change(copy / "rank1" / "stage0.onnx", lambda model: model.graph.node.remove(node(model, "DistCollective")))
    reseal(copy)
    assert results(verify(copy))["linter"] == "failed"


def test_a_write_at_the_wrong_row(copy: Path) -> None:
    """A cache that is written one row late is right for whole sequences and wrong for steps."""

    def shift(model: onnx.ModelProto) -> None:
        one = onnx.helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1])
        model.graph.initializer.append(one)
        model.graph.node.insert(0, onnx.helper.make_node("Sub", ["write_index", "one"], ["late"], name="late"))
        zero = onnx.helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0])
        model.graph.initializer.append(zero)
        model.graph.node.insert(1, onnx.helper.make_node("Max", ["late", "zero"], ["row"], name="row"))
        for item in model.graph.node:
            if item.op_type == "TensorScatter":
                item.input[2] = "row"

    for rank in range(2):
        change(copy / f"rank{rank}" / "stage0.onnx", shift)
    reseal(copy)
    found = results(verify(copy))
    assert (found["whole sequences"], found["prefill and decode"]) == ("ok", "failed")


def test_a_graph_that_cannot_be_read(copy: Path) -> None:
    """A forged graph is a failed check, not a crash."""
    for content in (b"", b"\xff" * 100, b"\x08\x0a"):
        (copy / "rank1" / "stage0.onnx").write_bytes(content)
        reseal(copy)
        report = verify(copy)
        assert not report.ok and "rank1/stage0.onnx" in " ".join(report.problems())


def test_a_replicated_weight_that_differs_between_ranks(copy: Path) -> None:
    flip(copy / "rank1" / "stage0.data", 0)
    reseal(copy)
    report = verify(copy)
    assert any("VERIFY006 rank1: its part of" in problem for problem in report.problems())
    assert results(report)["numbers"] == "not done"


def test_weights_that_are_not_finite(copy: Path) -> None:
    graph = onnx.load(copy / "rank0" / "stage0.onnx", load_external_data=False).graph
    down = next(t for t in graph.initializer if "down_proj" in t.name)
    offset = next(int(entry.value) for entry in down.external_data if entry.key == "offset")
    with (copy / "rank0" / "stage0.data").open("r+b") as file:
        file.seek(offset)
        file.write(np.float32(np.nan).tobytes())
    reseal(copy)
    assert "is not finite" in verify(copy).problems()[0]


@pytest.mark.parametrize(
    "change_spec", ["tensor: 2|tensor: 1", "eps: 1e-05|eps: 1e-01", "vocab_size: 400|vocab_size: 401"]
)
def test_a_spec_that_says_something_else(copy: Path, change_spec: str) -> None:
    before, after = change_spec.split("|")
    text = (copy / "spec.yaml").read_text()
    assert before in text
    (copy / "spec.yaml").write_text(text.replace(before, after))
    reseal(copy)
    assert not verify(copy).ok


def test_above_the_limit_the_reduced_spec_is_checked(
    copy: Path, build_artifact: Callable[..., Path], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "LARGE", 1000)
    artifact = build_artifact(model_folder, {"build.parallel.tensor": 2, "build.precision": "bfloat16"})
    assert json.loads((artifact / "manifest.json").read_text())["details"]["numbers_checked_on"] == "reduced"
    report = verify(artifact)
    assert report.ok
    assert all("reduced spec" in check.detail for check in report.checks if check.error is not None)


def test_the_tolerances_are_those_of_the_table(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(numerics.TOLERANCES, ("onnxruntime", "float32"), 1e-9)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(numerics, "ROUNDING", 0)
    report = verify(copy)
    assert [check.result for check in report.checks if check.error is not None] == ["failed"] * 3
    assert "the error is" in report.problems()[0] and "FAILED" not in report.as_text()


def test_a_model_that_enlarges_rounding_is_held_against_torch(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times what torch in float32 is off by is rounding, ten times is none."""
    monkeypatch.setitem(numerics.TOLERANCES, ("onnxruntime", "float32"), 1e-9)  # pyright: ignore[reportArgumentType]
    report = verify(copy)
    assert report.ok and "where torch in float32 is off by" in report.as_text()
    whole = next(check for check in report.checks if check.name == "whole sequences")
    assert whole.tolerance is not None and 1e-8 < whole.tolerance < 1e-4
    monkeypatch.setattr(numerics, "torch_error", lambda *args: 1e-3 if args[-1] == "float64" else 1e-2)
    assert not verify(copy).ok, "torch itself is not the oracle's"

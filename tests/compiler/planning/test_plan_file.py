"""Plans on disk, and what makes one stale."""

import json
from pathlib import Path
from typing import Any

import pytest

from archwright.compiler import plan
from archwright.compiler.passes import degrees_of
from archwright.compiler.planning import check_plan, write_plan
from archwright.spec import ArchwrightError, load
from archwright.spec.cli import main

TINY = {"parallel.tensor": 2}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    spec = load("preset:tiny", TINY)
    write_plan(tmp_path / "plan.json", plan(spec, gpus="4xH100"), spec)
    return tmp_path / "plan.json"


def test_a_fresh_plan_is_accepted(path: Path) -> None:
    spec = load("preset:tiny", TINY)
    check_plan(path, spec, degrees_of(spec.parallel, 4))
    content = json.loads(path.read_text())
    assert content["parameters"]["total"] == 125_248 and content["inputs"]["parallel.data_shard"] == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"train.steps": 7}, {"train.seed": 3}, {"name": "other"}, {"model.init.std": 0.5},
        {"train.optimizer.learning_rate": 1e-5}, {"train.log_every": 1},
    ],
)  # fmt: skip
def test_what_no_figure_depends_on_may_change(path: Path, settings: dict[str, Any]) -> None:
    spec = load("preset:tiny", TINY | settings)
    check_plan(path, spec, degrees_of(spec.parallel, 4))


@pytest.mark.parametrize(
    ("settings", "world", "told"),
    [
        ({"model.layers": 3}, 4, "`model.layers` was 2 and is 3"),
        ({"model.layer.attention.kv_heads": 4}, 4, "`model.layer.attention.kv_heads` was 2 and is 4"),
        ({"train.micro_batches": 2}, 4, "`train.micro_batches` was 1 and is 2"),
        ({"train.activation_checkpointing": {"kind": "full"}}, 4, '`train.activation_checkpointing.kind` was "none"'),
        ({"train.optimizer": {"kind": "muon"}}, 4, '`train.optimizer.kind` was "adamw" and is "muon"'),
        ({}, 8, "`parallel.data_shard` was 2 and is 4"),
        ({"parallel.sequence": True}, 4, "`parallel.sequence` was false and is true"),
    ],
)
def test_a_stale_plan_names_the_first_difference(path: Path, settings: dict[str, Any], world: int, told: str) -> None:
    spec = load("preset:tiny", TINY | settings)
    with pytest.raises(ArchwrightError, match="PLAN005") as caught:
        check_plan(path, spec, degrees_of(spec.parallel, world))
    assert told in caught.value.message


def test_a_plan_of_training_builds_nothing(path: Path) -> None:
    spec = load("preset:tiny")
    with pytest.raises(ArchwrightError, match='`kind` was "training" and is "inference"'):
        check_plan(path, spec, degrees_of(spec.build.parallel), "inference")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"inputs": 3}', "[" * 100_000, "\xff"])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="latin1")
    spec = load("preset:tiny")
    for path in (tmp_path / "plan.json", tmp_path / "absent.json"):
        with pytest.raises(ArchwrightError, match="PLAN004"):
            check_plan(path, spec, degrees_of(spec.parallel))


def test_build_and_train_refuse_a_stale_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = ["--set", "build.weights.kind=generated", "--set", "train=null"]
    assert main(["plan", "preset:tiny", *weights, "-o", "plan.json"]) == 0
    rest = ["--plan", "plan.json", "-o", "out", "--set", "build.max_batch=2"]
    assert main(["build", "preset:tiny", "--to", "onnx", *weights, *rest]) == 1
    assert "PLAN005" in (told := capsys.readouterr().err) and "`build.max_batch` was" in told
    assert main(["train", "preset:tiny", "--plan", "plan.json", "-o", "run"]) == 1
    assert "PLAN005" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"plan.json"}

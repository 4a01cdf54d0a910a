"""benchmarks/fit_plan.py finds constants again that made up the measurements; the plan is near what was measured."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from archwright.compiler.planning.constants import DEFAULTS

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
PATH, TRUTH = BENCHMARKS / "fit_plan.py", BENCHMARKS / "results" / "2026-11-25-plan-truth.json"
SETTINGS = [
    ("1xH100", {"train.batch_size": 2}),
    ("2xH100", {"train.batch_size": 8}),
    ("1xH100", {"train.batch_size": 4}),
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    found = importlib.util.spec_from_file_location("fit_plan", PATH)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["fit_plan"] = module
    found.loader.exec_module(module)
    return module


def test_constants_are_found_again(tool: ModuleType) -> None:
    true = {**DEFAULTS, "matmul_fraction": 0.65, "allocator_slack": 0.10}
    runs = []
    for gpus, more in SETTINGS:
        train = {"kind": "pretrain", "precision": "bfloat16", "sequence_length": 4096}
        line = {"spec": "preset:llama3.2-1b", "set": {"train": train, **more}, "gpus": gpus}
        measured = tool.read_run(json.dumps(line)).planned(true)
        runs.append(tool.read_run(json.dumps({**line, **measured})))
    free = ["matmul_fraction", "allocator_slack"]
    fitted = tool.fit(DEFAULTS, free, lambda constants: tool.loss(runs, constants))
    assert fitted["matmul_fraction"] == pytest.approx(0.65, rel=0.02)
    assert fitted["allocator_slack"] == pytest.approx(0.10, rel=0.1)
    assert {name for name in fitted if fitted[name] != DEFAULTS[name]} == set(free)


@pytest.mark.parametrize("name", [run["name"] for run in json.loads(TRUTH.read_text())["runs"]])
def test_the_plan_is_near_what_was_measured(tool: ModuleType, name: str) -> None:
    """Memory within 10%, the step within 20%; and as the result file says, unless it has to be written again."""
    (recorded,) = (each for each in json.loads(TRUTH.read_text())["runs"] if each["name"] == name)
    (found,) = tool.compare([tool.read_run(json.dumps(recorded["run"]))], "")["runs"]
    for measure in ("step_s", "peak_allocated_bytes", "peak_device_bytes"):
        assert abs(found[measure]["deviation"]) < (0.2 if measure == "step_s" else 0.1)
        assert found[measure] == pytest.approx(recorded[measure], rel=1e-3, abs=1e-4)


def test_a_comparison_is_read_again(tool: ModuleType, tmp_path: Path) -> None:
    runs = tool.read_runs([TRUTH])
    again = tmp_path / "again.json"
    again.write_text(json.dumps(tool.compare(runs, "there")))
    assert [run.given for run in tool.read_runs([again])] == [run.given for run in runs]

"""benchmarks/fit_plan.py finds constants again that made up the measurements."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from archwright.compiler.planning.constants import DEFAULTS

PATH = Path(__file__).resolve().parents[3] / "benchmarks" / "fit_plan.py"
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

"""Parts of the demo that need no training; continuous integration runs the whole."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from archwright.spec.cli import main

CHARTS = Path(__file__).resolve().parents[2] / "examples" / "demo" / "charts.py"


@pytest.fixture
def charts() -> Any:
    spec = importlib.util.spec_from_file_location("charts", CHARTS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("options", [[], ["--gpus", "2xH100", "--set", "parallel.data_shard=2"]])
def test_every_kind_of_memory_has_a_colour(charts: Any, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "preset:tiny", "--output-format", "json", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    drawing = charts.plan_drawing(plan)
    ranks = plan["memory"]["per_rank"]
    kinds = {name for rank in ranks for name, size in rank.items() if name.endswith("_bytes") and size}
    named = {text.replace(" ", "_") for text in re.findall(r">([a-z ]+) [0-9.]+ MB<", drawing)}
    assert {f"{name}_bytes" for name in named} == kinds - {"total_bytes"}
    assert drawing.count("<rect") == len(ranks) * len(named)

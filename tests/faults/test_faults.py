"""Whatever a write meets, afterwards the old version or the new one is there, whole, and the next run works.

`sweep` does it; here its findings are judged and printed.
"""

from collections.abc import Callable
from typing import Any

import pytest

from archwright.compiler.targets.tensorrt_loader import load_tensorrt
from archwright.spec import ArchwrightError

CARELESS, ENGINE = "careless", "artifact with engine"
OPERATIONS = (
    "tokenizer",
    "data shards",
    "artifact",
    "checkpoint",
    "checkpoint, written again",
    "checkpoint, two renames",
    "model folder",
    "model folder, more steps",
    "training",
    "training, resumed",
)
Rows = dict[str, dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[pytest.param("quick", marks=pytest.mark.heavy), pytest.param("full", marks=pytest.mark.slow)],
)
def rows(request: pytest.FixtureRequest, rows_of: Callable[..., Rows]) -> Rows:
    return rows_of("sweep", request.param)


@pytest.mark.parametrize("name", OPERATIONS)
def test_old_or_new_and_the_next_run_works(
    rows: Rows, name: str, record_property: Callable[[str, object], None]
) -> None:
    row = rows[name]
    problems = row.pop("problems")
    record_property("table: faults at points of writing", {**row, "half true": len(problems)})
    assert not problems, "\n".join(problems)
    assert min(row["kills"], row["errors"], row["old"], row["new"]) > 0
    assert row["old"] + row["new"] == row["faults"] == row["kills"] + row["errors"] >= 20


def test_a_careless_writer_is_found_out(rows: Rows) -> None:
    """The check of the check: one that writes where readers look, and does not flush."""
    text = "\n".join(rows[CARELESS]["problems"])
    assert "neither the old version nor the new" in text
    assert "is not flushed when" in text
    assert "the next run ended with" in text


@pytest.mark.slow
def test_engines_too(rows_of: Callable[..., Rows], record_property: Callable[[str, object], None]) -> None:
    """Where a TensorRT is installed that builds on this machine.

    A fault, of one kind in turn, at each of the some 45 points between the first folder and the flushed name of the
    artifact: graph, weights, engine, log, probe, manifest. TensorRT computes one engine, without a fault; the runs with
    faults write it again. Some 30 s of a core.
    """
    try:
        load_tensorrt()
    except ArchwrightError as error:
        pytest.skip(str(error))
    rows = rows_of("sweep", "quick", ENGINE)
    test_old_or_new_and_the_next_run_works(rows, ENGINE, record_property)


def test_every_operation_is_judged(rows: Rows) -> None:
    assert rows.keys() == {*OPERATIONS, CARELESS}

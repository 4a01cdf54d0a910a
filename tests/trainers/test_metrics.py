"""metrics.jsonl across interruptions."""

from pathlib import Path

import pytest

from archwright.trainers.metrics import METRICS, MetricsWriter, read_metrics

LOSS = 0.1 + 0.2


def write(run: Path, first: int, last: int, *, last_step: int) -> None:
    with MetricsWriter(run, last_step=last_step) as metrics:
        for step in range(first, last + 1):
            metrics.append({"step": step, "loss": LOSS})
        metrics.sync()


def test_numbers_keep_their_precision(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, last_step=0)
    assert [record["loss"] for record in read_metrics(tmp_path)] == [LOSS, LOSS]


def test_steps_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, 1, 9, last_step=0)
    write(tmp_path, 6, 8, last_step=5)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 1, 3, last_step=0)
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes()[:-9])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 3, 3, last_step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["5", "null", "[1, 2]", '{"loss": 1.0}', '{"step": "3"}', "[" * 100_000, "\x00"])
def test_a_line_that_is_no_record_ends_them(tmp_path: Path, line: str) -> None:
    write(tmp_path, 1, 2, last_step=0)
    with (tmp_path / METRICS).open("a") as file:
        file.write(f"{line}\n")
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []

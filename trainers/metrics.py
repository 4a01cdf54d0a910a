"""metrics.jsonl: one JSON object a step, every step once."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from archwright.spec.files import atomic_write
from archwright.spec.json_text import parse_json

METRICS = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first. A last line that a kill tore is not one."""
    path = run / METRICS
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            break  # torn: what follows, if anything, was written after it
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            break
        records.append(record)
    return records


class MetricsWriter:
    """Appends records; numbers are written so that they read back as the same float64.

    A record: step (from 1), loss (nats per token), grad_norm (before clipping), learning_rate, tokens (targets so far),
    tokens_per_s, and where the step was evaluated validation_loss and validation_bits_per_byte.
    """

    def __init__(self, run: Path, *, last_step: int) -> None:
        """Keeps the records up to `last_step`, the step of the checkpoint that training goes on from."""
        kept = [record for record in read_metrics(run) if record["step"] <= last_step]
        self._path = run / METRICS
        atomic_write(self._path, "".join(_line(record) for record in kept))
        self._file = self._path.open("a")

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """On the disk: a checkpoint must not outlive the records of its steps."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"

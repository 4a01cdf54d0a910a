"""The programs `sweep` and `kills`, run in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def rows_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, dict[str, Any]]]:
    """`rows_of("sweep", "quick")`: what the program printed, by operation."""

    def run(program: str, *arguments: str) -> dict[str, dict[str, Any]]:
        command = [sys.executable, "-m", f"tests.faults.{program}", str(tmp_path_factory.mktemp(program)), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert done.returncode == 0
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        return {row["name"]: row for row in rows}

    return run

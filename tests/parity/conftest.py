"""The pair of gloo processes that the whole suite feeds."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archwright.compiler.ir import Plan
from tests.parity.cases import Case, Outputs

Record = Callable[[str, object], None]
ROOT = Path(__file__).resolve().parents[2]


class Ranks:
    """`world` worker processes; see `tests/parity/worker.py`."""

    def __init__(self, world: int, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.parity.worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [*command, str(rank), str(world), str(folder / "rendezvous")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment,
            )
            for rank in range(world)
        ]  # fmt: skip

    def run(self, case: Case, plan: Plan, *, dtype: str | None) -> list[Any]:
        """The answers of all ranks: Outputs of the local Programs in `dtype`, or of the training module (None)."""
        request = {"case": case, "program": plan.program, "local": plan.local, "dtype": dtype}
        for process in self.processes:
            pickle.dump(request, process.stdin)
            process.stdin.flush()
        answers = [pickle.load(process.stdout) for process in self.processes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def run_local(self, case: Case, plan: Plan, *, dtype: str) -> Outputs:
        """Rank 0's outputs, after a check that the other ranks have the same."""
        first, *others = self.run(case, plan, dtype=dtype)
        for other in others:
            np.testing.assert_array_equal(other.whole_BSV, first.whole_BSV)
            np.testing.assert_array_equal(other.cached_RV, first.cached_RV)
        return first

    def close(self) -> None:
        for process in self.processes:
            pickle.dump(None, process.stdin)
            process.stdin.close()
        for process in self.processes:
            process.wait(timeout=30)
            process.stdout.close()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pair = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield pair
    pair.close()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """`record_property`, which refuses to work together with `--junit-xml`."""
    return lambda name, value: request.node.user_properties.append((name, value))

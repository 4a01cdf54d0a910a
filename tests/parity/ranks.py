"""The pair of gloo processes that the whole suite feeds."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from archwright.compiler.ir import Plan
from tests.parity.cases import Case, Outputs

ROOT = Path(__file__).resolve().parents[2]


class Ranks:
    """`world` worker processes, started when they are first needed; see `tests/parity/worker.py`."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self._mutation: str | None = None
        self._started = 0

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.parity.worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [*command, str(rank), str(self.world), str(self.folder / f"rendezvous{self._started}")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment,
            )
            for rank in range(self.world)
        ]  # fmt: skip

    def _abandon(self) -> None:
        """End the processes, whose connection may be broken; the next call starts others."""
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()
            with suppress(BrokenPipeError):  # what it did not read
                process.stdin.close()
        self.processes = []
        self._started += 1

    @contextmanager
    def mutated(self, name: str) -> Iterator[None]:
        """Inside, the processes have the seeded bug `name` of `tests/parity/seeded_bugs`."""
        self._mutation = name
        yield
        self._mutation = None

    def run(self, case: Case, plan: Plan, *, dtype: str | None) -> list[Any]:
        """The answers of all ranks: Outputs of the local Programs in `dtype`, or of the training module (None)."""
        if not self.processes:
            self._start()
        plan = replace(plan, table=dict(plan.table))  # a read-only mapping cannot be pickled
        request = {"case": case, "plan": plan, "dtype": dtype, "mutation": self._mutation}
        try:
            for process in self.processes:
                pickle.dump(request, process.stdin)
                process.stdin.flush()
            answers = [pickle.load(process.stdout) for process in self.processes]
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        except Exception:
            self._abandon()
            raise
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

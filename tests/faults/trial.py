"""A child process that may be killed, and what must be so after it: the old version or the new, whole, and a next run
that works and says which.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from archwright.spec import ArchwrightError
from tests.faults.operations import Contents, Operation

LIMIT_S = 60
State = Literal["old", "new", "broken"]


class Child:
    """A forked process that does steps, the next one whenever it is asked to."""

    def __init__(self, log: Path, *steps: Callable[[], int]) -> None:
        log.touch()
        self._log, self._read = log, 0
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, log, steps))
        self._process.start()
        other.close()

    def start(self) -> None:
        """Ask for the next step."""
        self._pipe.send(None)

    def finish(self) -> tuple[int, str]:
        """Wait for the step: its exit status, or minus the signal that ended the child; and what it printed."""
        try:
            status = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            status = self._process.exitcode
        text = self._log.read_bytes()[self._read :].decode(errors="replace")
        self._read = self._log.stat().st_size
        return status, text

    def step(self) -> tuple[int, str]:
        self.start()
        return self.finish()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _work(pipe: Connection, log: Path, steps: Sequence[Callable[[], int]]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for step in steps:
        pipe.recv()
        signal.alarm(LIMIT_S)
        status = step()
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send(status)


def run_to_status(run: Callable[[Path], int], root: Path) -> int:
    """As the command line does: 1 for what is the user's or the system's, 3 for the rest."""
    try:
        return run(root)
    except OSError as error:
        print(f"SPEC092 {error}")
        return 1
    except ArchwrightError as error:
        print(error)
        return 1
    except Exception:
        traceback.print_exc()
        return 3


@dataclass(frozen=True)
class Expected:
    """What is there before an operation and after one without a fault: contents, and the names of all files."""

    before: Contents
    after: Contents
    names: set[str]


def state_of(operation: Operation, expected: Expected, root: Path) -> tuple[State, list[str]]:
    """Which version is there, and what is half true."""
    problems = operation.problems(root)
    try:
        contents = operation.contents(root)
    except ArchwrightError as error:
        return "broken", [*problems, str(error)]
    if contents == expected.after:
        return "new", problems
    if contents == expected.before or operation.stages:
        return "old", problems
    return "broken", [*problems, "neither the old version nor the new"]


def problems_of_next_run(
    operation: Operation, expected: Expected, root: Path, state: State, step: Callable[[], tuple[int, str]]
) -> list[str]:
    """What is wrong with the next run, which is `step`: its status, what it says, or what is there after it."""
    problems: list[str] = []
    refuses = bool(operation.refuses) and state == "new"
    says = operation.refuses if refuses else operation.says(root)
    status, text = step()
    if status != refuses or says not in text:
        problems.append(f"the next run ended with {status} and does not say `{says}`: {text.strip()[-400:]}")
    names = names_of(root)
    if names != expected.names:
        problems.append(f"after the next run these names are too many or too few: {sorted(names ^ expected.names)}")
    elif operation.contents(root) != expected.after:
        problems.append("after the next run the result is not that of a run without a fault")
    return problems


def names_of(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}

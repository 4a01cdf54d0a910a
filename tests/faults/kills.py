"""SIGKILL at random moments of operations, every one in a process forked from this warm one.

python -m tests.faults.kills FOLDER TIMES   prints one JSON object an operation
"""

import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.operations import Operation, longer_operations, warm_up
from tests.faults.trial import Child, Expected, names_of, problems_of_next_run, run_to_status, state_of


@dataclass
class Row:
    """What became of one operation. old, new: what the kill left; the next run then gave the result of no kill."""

    name: str
    seconds: float
    kills: int = 0
    old: int = 0
    new: int = 0
    problems: list[str] = field(default_factory=list[str])


def reference(operation: Operation, folder: Path) -> tuple[Expected, float]:
    """The operation without a kill, and how long it takes."""
    root = folder / "reference"
    root.mkdir()
    operation.before(root)
    before = operation.contents(root)
    child = Child(folder / "reference.log", lambda: run_to_status(operation.run, root))
    started = time.perf_counter()
    status, text = child.step()
    seconds = time.perf_counter() - started
    child.close()
    assert status == 0, text
    return Expected(before, operation.contents(root), names_of(root)), seconds


def kill_at(operation: Operation, expected: Expected, moment: float, place: Path, row: Row) -> list[str]:
    """One kill, then the next run; counts it in `row`, unless the operation was done before, and says what is wrong."""
    root = place / "root"
    root.mkdir(parents=True)
    operation.before(root)
    child = Child(place / "log", lambda: run_to_status(operation.run, root))
    child.start()
    time.sleep(moment)
    child.kill()
    status, text = child.finish()
    child.close()
    state, problems = state_of(operation, expected, root)
    if status not in (0, -signal.SIGKILL):
        problems.append(f"ended with {status}: {text[-400:]}")
    row.kills += status < 0
    row.old += status < 0 and state == "old"
    row.new += status < 0 and state == "new"
    child = Child(place / "log of the next run", lambda: run_to_status(operation.again, root))
    problems += problems_of_next_run(operation, expected, root, state, child.step)
    child.close()
    return problems


def main(arguments: list[str]) -> int:
    folder, times = Path(arguments[0]), int(arguments[1])
    for operation in longer_operations(warm_up(folder)):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            expected, seconds = reference(operation, Path(temporary))
            row = Row(operation.name, seconds)
            for number in itertools.count():
                if row.kills == times:
                    break
                moment, place = random.uniform(0, seconds), Path(temporary, str(number))
                problems = kill_at(operation, expected, moment, place, row)
                row.problems += [f"{operation.name}, killed after {moment:.3f} s: {line}" for line in problems]
                shutil.rmtree(place)
            print(json.dumps(asdict(row)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

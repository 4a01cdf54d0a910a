"""A fault at each point of each operation, every one in a process of its own, forked from this warm one.

    python -m tests.faults.sweep FOLDER quick|full [NAME ...]   prints one JSON object an operation

A process that survives its fault goes on as its user would, in the same process; after a kill another process does.
Without names all are tried but the engine, for which a TensorRT is needed.
quick tries one kind of fault at a point, in turn, and of the writes to a file the first, the last and every fourth.
"""

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.injection import MODES, SPACE, Disk, Fault, Point, unflushed, unseen
from tests.faults.operations import ENGINE, Operation, operations, warm_up
from tests.faults.trial import Child, Expected, names_of, problems_of_next_run, run_to_status, state_of

WRITES_APART = 4


@dataclass
class Row:
    """What became of one operation. problems: sentences, each with its point and mode."""

    name: str
    points: int = 0
    faults: int = 0
    kills: int = 0
    errors: int = 0
    old: int = 0
    new: int = 0
    problems: list[str] = field(default_factory=list[str])


def reference(operation: Operation, folder: Path) -> tuple[Expected, list[Point], list[str]]:
    """The operation without a fault: its points, and what the disk did not see or was not told to flush."""
    root = folder / "reference"
    root.mkdir()
    operation.before(root)
    before, names_before = operation.contents(root), {Path(name).name for name in names_of(root)}
    answer = folder / "points.json"

    def run() -> int:
        with Disk(root) as disk:
            status = run_to_status(operation.run, root)
        problems = [f"{name} was written unseen" for name in unseen(disk.points, root) - names_before]
        problems += unflushed(disk.points, operation.journal)
        answer.write_text(json.dumps([[asdict(point) for point in disk.points], problems]))
        return status

    child = Child(folder / "reference.log", run)
    status, text = child.step()
    child.close()
    assert status == 0, text
    points, problems = json.loads(answer.read_text())
    expected = Expected(before, operation.contents(root), names_of(root))
    return expected, [Point(**point) for point in points], problems


def faults(points: Sequence[Point], quick: bool) -> Iterator[Fault]:
    """Those that are possible; or a part of them in which every kind of change and of fault occurs."""
    writes: dict[str, list[int]] = {}
    for number, point in enumerate(points):
        if point.kind == "write":
            writes.setdefault(point.path, []).append(number)
    left_out = {number for numbers in writes.values() for i, number in enumerate(numbers[:-1]) if i % WRITES_APART}
    turn = 0
    for number, point in enumerate(points):
        modes = [mode for mode in MODES if mode != "full" or point.kind in SPACE]
        if not quick:
            yield from (Fault(number, mode) for mode in modes)
        elif number not in left_out:
            yield Fault(number, modes[turn % len(modes)])
            turn += 1


def sweep(operation: Operation, folder: Path, quick: bool) -> Row:
    """Fault after fault, each in a folder that is as it was before the operation."""
    expected, points, problems = reference(operation, folder)
    row = Row(operation.name, points=len(points), problems=problems)
    for fault in faults(points, quick):
        point = points[fault.number]
        place = folder / f"{fault.number}-{fault.mode}"
        place.mkdir()
        problems = try_fault(operation, expected, point, fault, place, row)
        where = f"{operation.name}, {fault.mode} at point {fault.number} ({point.kind} {Path(point.path).name})"
        row.problems += [f"{where}: {problem}" for problem in problems]
        shutil.rmtree(place)
    return row


def try_fault(operation: Operation, expected: Expected, point: Point, fault: Fault, place: Path, row: Row) -> list[str]:
    """One fault, then what a user does next; counts it in `row` and returns what is wrong."""
    root = place / "root"
    root.mkdir()
    operation.before(root)
    disk = Disk(root, fault)

    def run() -> int:
        with disk:
            return run_to_status(operation.run, root)

    def again() -> int:
        return run_to_status(operation.again, root)

    child = Child(place / "log", run, again)
    status, text = child.step()
    removing = point.kind == "remove" or point.path.endswith(".old")
    problems = list(_problems_of_status(status, text, fault, removing))
    leftovers = {name for name in names_of(root) if ".tmp-" in name}
    if status >= 0 and leftovers and not removing:
        problems.append(f"left {sorted(leftovers)}")
    state, half_true = state_of(operation, expected, root)
    row.faults += 1
    row.kills += status < 0
    row.errors += status > 0
    row.old += state == "old"
    row.new += state == "new"
    if status < 0:
        child.close()
        child = Child(place / "log of another process", again)
    problems += half_true + problems_of_next_run(operation, expected, root, state, child.step)
    child.close()
    return problems


def _problems_of_status(status: int, text: str, fault: Fault, removing: bool) -> Iterator[str]:
    """A fault is told as the system's refusal. One in the removal of leftovers may pass in silence."""
    if fault.mode == "kill":
        if status != -signal.SIGKILL:
            yield f"not killed, but {status}: {text[-400:]}"
    elif status != 1 and not (status == 0 and removing):
        yield f"ended with {status}: {text[-400:]}"
    elif status == 1 and not ("SPEC092" in text and "No space left" in text):
        yield f"does not say that the disk is full: {text[-400:]}"


def main(arguments: list[str]) -> int:
    folder, quick, names = Path(arguments[0]), arguments[1] == "quick", arguments[2:]
    for operation in operations(warm_up(folder)):
        if operation.name in names or not (names or operation.name == ENGINE):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                print(json.dumps(asdict(sweep(operation, Path(place), quick))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Processes killed with -9 at random moments leave nothing half true, and what goes on after them is bit-exact."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from archwright.spec.manifest import check_manifest
from archwright.trainers.metrics import read_metrics
from tests.faults.operations import contents_of, write_inputs

Rows = dict[str, dict[str, Any]]
Record = Callable[[str, object], None]
MAIN = "import sys; from archwright.spec.cli import main; sys.exit(main())"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
VICTIMS = ("launcher", "rank 0", "rank 1")
TITLE = "table: killed with -9 at random moments"


@pytest.fixture(
    scope="module", params=[pytest.param(3, marks=pytest.mark.heavy), pytest.param(10, marks=pytest.mark.slow)]
)
def rows(request: pytest.FixtureRequest, rows_of: Callable[..., Rows]) -> tuple[int, Rows]:
    return request.param, rows_of("kills", str(request.param))


@pytest.mark.parametrize("name", ["tokenizer", "data shards", "artifact", "training of 60 steps"])
def test_a_killed_operation_succeeds_when_run_again(rows: tuple[int, Rows], name: str, record_property: Record) -> None:
    """The training's result is compared bit by bit with that of one that nobody killed."""
    times, found = rows
    row = found[name]
    problems = row.pop("problems")
    record_property(TITLE, {"name": name, "kills": row["kills"], "old": row["old"], "new": row["new"], "processes": 1})
    assert not problems, "\n".join(problems)
    assert row["kills"] == row["old"] + row["new"] == times


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "inputs"
    with redirect_stdout(StringIO()):
        write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def command(inputs: Path) -> Callable[..., list[str]]:
    """A training of 60 steps in two processes, into a run folder."""

    def make(run: Path, *more: str) -> list[str]:
        changes = {
            "tokenizer.path": inputs / "tokenizer", "data.path": inputs / "data", "parallel.tensor": 2,
            "train.steps": 60, "train.checkpoint.every": 4,
        }  # fmt: skip
        sets = [f"--set={path}={value}" for path, value in changes.items()]
        return [sys.executable, "-c", MAIN, "train", str(inputs / "small.yaml"), "-o", str(run), *sets, *more]

    return make


def start(arguments: list[str], **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more
    )


def result_of(run: Path) -> tuple[dict[str, str], str]:
    """Weights and states of the last checkpoint and the model; the metrics without what a clock says."""
    records = [{**record, "tokens_per_s": 0} for record in read_metrics(run)]
    assert check_manifest(run / "model") == []
    return contents_of(run / "checkpoints") | contents_of(run / "model"), json.dumps(records)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def straight(command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed."""
    run = tmp_path_factory.mktemp("straight") / "run"
    subprocess.run(command(run), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    return run


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, marks=pytest.mark.heavy if i < 2 else pytest.mark.slow) for i in range(10)],
)
def test_two_processes_killed_and_resumed_are_straight(
    command: Callable[..., list[str]], straight: Path, tmp_path: Path, number: int,
    record_property: Record,
) -> None:  # fmt: skip
    """The launcher or a worker: the others end, too, and do not disturb the run that goes on at once."""
    run, victim, moment = tmp_path / "run", VICTIMS[number % 3], random.randint(1, 50)
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command(run), env=ENVIRONMENT, stdout=log, stderr=log)
        wait_until(lambda: len(read_metrics(run)) >= moment)
        time.sleep(random.uniform(0, 0.02))  # anywhere in a step, or in the checkpoint of every fourth
        workers = children_of(process.pid)
        os.kill(process.pid if victim == "launcher" else workers[int(victim[-1])], signal.SIGKILL)
        process.wait()
    text = (tmp_path / "log").read_text()
    assert victim == "launcher" or (process.returncode == 3 and f"{victim} was ended by signal 9" in text), text
    assert "internal error" not in text
    steps = len(read_metrics(run))
    resumed = subprocess.run(command(run, "--resume"), env=ENVIRONMENT, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    record_property(TITLE, {"name": f"training, {victim} after step {steps}", "kills": 1, "old": 1, "processes": 2})
    assert result_of(run) == result_of(straight)
    assert not [path for path in run.rglob("*") if ".tmp-" in path.name]


@pytest.mark.heavy
def test_a_full_disk_ends_all_processes_and_says_so(
    command: Callable[..., list[str]], straight: Path, tmp_path: Path
) -> None:
    """A limit of the files' size stands for the full disk; the optimizer's states are the first file beyond it."""
    run = tmp_path / "run"
    states = next((straight / "checkpoints").glob("*/optimizer.safetensors")).stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (states - 1, states - 1))

    failed = start(command(run), preexec_fn=limit)
    text, _ = failed.communicate()
    assert failed.returncode == 1, text
    assert text.count("SPEC092 the system refuses: File too large") == 1, text
    assert "internal error" not in text
    assert not [path for path in run.rglob("*") if ".tmp-" in path.name]
    resumed = subprocess.run(command(run, "--resume"), env=ENVIRONMENT, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert result_of(run) == result_of(straight)


BUILD_DATA = """
import sys, time
from pathlib import Path
from archwright.spec import load
from archwright.trainers.data_build import build_data

def advance(num_bytes):
    print("one batch is done", flush=True)
    time.sleep(600)

spec, out, tokenizer = sys.argv[1:]
build_data(load(spec, {"tokenizer.path": tokenizer}), Path(out), workers=2, advance=advance)
"""


@pytest.mark.heavy
def test_workers_of_a_killed_data_build_end(inputs: Path, tmp_path: Path) -> None:
    """Workers that wait for a task from a main process which is no more would wait for ever."""
    arguments = [str(inputs / "small.yaml"), str(tmp_path / "data"), str(inputs / "tokenizer")]
    with start([sys.executable, "-c", BUILD_DATA, *arguments]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "one batch is done\n"
        others = children_of(process.pid)
        process.kill()
    assert len(others) >= 2, "a worker, and Python's tracker of semaphores"
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others))
    again = [sys.executable, "-c", MAIN, "data", "build", *arguments[:1], "-o", *arguments[1:2]]
    done = subprocess.run([*again, f"--set=tokenizer.path={arguments[2]}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["data"]
    assert contents_of(tmp_path / "data") == contents_of(inputs / "data")

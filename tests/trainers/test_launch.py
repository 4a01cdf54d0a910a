"""Worlds of processes: what `train` starts itself, what torchrun starts, and how they end."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed

from archwright.compiler.ir import Degrees
from archwright.spec import ArchwrightError, Spec, load
from archwright.trainers.launch import World, check_world, num_gpus, reserved_port, run_workers, world_of
from archwright.trainers.metrics import read_metrics
from archwright.trainers.training import train_in_world

Overrides = dict[str, object]
PROGRAM = ["-c", "import sys; from archwright.spec.cli import main; sys.exit(main())"]


def arguments(spec_file: Path, run: Path, settings: Overrides) -> list[str]:
    sets = [f"--set={path}={json.dumps(value)}" for path, value in settings.items()]
    return ["train", str(spec_file), "-o", str(run), *sets]


def run_train(spec_file: Path, run: Path, settings: Overrides, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *PROGRAM, *arguments(spec_file, run, settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def wait_for(condition: object, seconds: float = 30.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_world_of_torchrun() -> None:
    assert world_of({"PATH": "x"}) is None
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    world = world_of(variables)
    assert world == World(rank=5, size=8, local_rank=1, local_size=4)
    assert not world.main


def spec_of(**parallel: object) -> Spec:
    return load("preset:llama3.1-8b", {"parallel": parallel})


def test_a_world_of_another_size_is_refused() -> None:
    given = spec_of(tensor=2, data_shard=1)
    assert check_world(World(size=2), given) == Degrees(tensor=2)
    with pytest.raises(ArchwrightError) as caught:
        check_world(World(size=3), given)
    assert caught.value.code == "TRAIN007"
    assert "3 processes were started, `parallel` needs 2" in str(caught.value)
    assert "--nproc-per-node 2" in str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "size", "expected"),
    [
        ({}, 1, Degrees()),
        ({}, 6, Degrees(data_shard=6)),
        ({"tensor": 2}, 8, Degrees(tensor=2, data_shard=4)),
        ({"tensor": 2, "data_replicate": 2}, 8, Degrees(tensor=2, data_replicate=2, data_shard=2)),
        ({"tensor": "auto", "data_shard": 2}, 8, Degrees(tensor=4, data_shard=2)),
        ({"context": 2, "pipeline": 2}, 4, Degrees(context=2, pipeline=2)),
    ],
)
def test_the_axis_that_is_auto_fills_the_world(parallel: Overrides, size: int, expected: Degrees) -> None:
    assert check_world(World(size=size), spec_of(**parallel)) == expected


@pytest.mark.parametrize(("size", "near"), [(7, 4), (2, 4), (10, 8)])
def test_auto_needs_a_multiple_of_the_rest(size: int, near: int) -> None:
    with pytest.raises(ArchwrightError) as caught:
        check_world(World(size=size), spec_of(tensor=4))
    assert caught.value.code == "TRAIN007"
    assert "`parallel` needs a multiple of 4" in str(caught.value)
    assert f"--nproc-per-node {near}" in str(caught.value)


def test_what_auto_becomes_is_held_against_the_rules() -> None:
    with pytest.raises(ArchwrightError) as caught:
        check_world(World(size=3), spec_of(tensor="auto", data_shard=1))
    assert caught.value.code == "SPEC021"


@pytest.mark.parametrize(
    ("shown", "number"), [("", 0), ("0", 1), ("0,3", 2), ("-1", 0), ("GPU-1f2e,GPU-77ab, GPU-0c", 3), ("1,", 1)]
)
def test_visible_gpus(shown: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert num_gpus() == number


def test_gpus_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert num_gpus() == len(list(Path("/proc/driver/nvidia").glob("gpus/*")))


def test_the_first_failing_worker_gives_the_status(capfd: pytest.CaptureFixture[str]) -> None:
    """A spec that does not exist: every worker fails with 1, none hangs."""
    assert run_workers(2, ["validate", "absent.yaml"], os.environ) == 1
    assert "SPEC001" in capfd.readouterr().err
    assert run_workers(2, ["presets"], os.environ) == 0


@pytest.mark.heavy
def test_a_mismatch_under_torchrun_is_told(spec_file: Path, training: Overrides, tmp_path: Path) -> None:
    settings = {**training, "parallel.data_shard": 1}
    done = run_train(spec_file, tmp_path / "run", settings, RANK="0", WORLD_SIZE="3")
    assert done.returncode == 1
    assert "TRAIN007" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.heavy
def test_an_error_of_the_user_is_told_once(spec_file: Path, training: Overrides, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = run_train(spec_file, tmp_path / "run", {**training, "parallel.tensor": 2})
    assert done.returncode == 1
    assert done.stderr.count("TRAIN004") == 1
    assert "Traceback" not in done.stderr and "internal" not in done.stderr


def assert_equal_trainings(first: Path, second: Path) -> None:
    one, two = read_metrics(first), read_metrics(second)
    for key in ("loss", "learning_rate", "tokens"):
        assert [record[key] for record in two] == pytest.approx([record[key] for record in one], rel=1e-10, abs=0)
    assert two[-1]["validation_loss"] == pytest.approx(one[-1]["validation_loss"], rel=1e-10)


@pytest.fixture
def in_float64(training: Overrides) -> Overrides:
    return {**training, "train.precision": "float64", "train.steps": 24, "train.micro_batches": 2}


@pytest.mark.heavy
def test_two_processes_equal_one(
    spec_file: Path, make_spec: Callable[..., Spec], in_float64: Overrides, tmp_path: Path
) -> None:
    train_in_world(make_spec(in_float64), tmp_path / "one", World(), resume=False)
    done = run_train(spec_file, tmp_path / "two", {**in_float64, "parallel.tensor": 2})
    assert done.returncode == 0, done.stderr
    assert_equal_trainings(tmp_path / "one", tmp_path / "two")
    assert "2 processes" in done.stdout
    assert done.stdout.count("step 24/24  loss") == 1


@pytest.mark.heavy
def test_under_torchrun(spec_file: Path, make_spec: Callable[..., Spec], in_float64: Overrides, tmp_path: Path) -> None:
    """With an untied head here, tied above."""
    settings = {**in_float64, "model.tied_embeddings": False}
    train_in_world(make_spec(settings), tmp_path / "one", World(), resume=False)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    worker = [sys.executable, *PROGRAM, *arguments(spec_file, tmp_path / "two", {**settings, "parallel.tensor": 2})]
    done = subprocess.run(
        [sys.executable, *torchrun, *worker],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert_equal_trainings(tmp_path / "one", tmp_path / "two")


def one_who_wants_any(port: int) -> socket.socket:
    """A socket to which the system can give this port only, when it asks for any."""
    any_one = socket.socket()
    ip_local_port_range = 51  # Linux 6.3
    try:
        any_one.setsockopt(socket.IPPROTO_IP, ip_local_port_range, struct.pack("=I", port | port << 16))
    except OSError:
        any_one.close()
        pytest.skip("this system has no port range for a socket")
    return any_one


@pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux")
def test_the_port_of_the_workers_goes_to_nobody_else() -> None:
    """A training of two processes failed beside others that asked for ports at the same moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with reserved_port() as port:
            for reuse in (0, 1):
                with one_who_wants_any(port) as other, pytest.raises(OSError, match="in use"):
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
                    other.bind(("127.0.0.1", 0))
            with one_who_wants_any(port) as other, pytest.raises(OSError, match="Cannot assign"):
                other.connect(listener.getsockname())
            torch.distributed.TCPStore("127.0.0.1", port, 1, is_master=True).set("here", "first worker")
        with one_who_wants_any(port) as other:
            other.connect(listener.getsockname())


@pytest.fixture
def long_training(
    spec_file: Path, training: Overrides, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A training in two processes that has begun, and the ids of its workers."""
    settings = {**training, "train.steps": 100_000, "parallel.tensor": 2}
    process = subprocess.Popen(
        [sys.executable, *PROGRAM, *arguments(spec_file, tmp_path / "run", settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: len(read_metrics(tmp_path / "run")) > 1, 90)
        yield process, children(process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_launcher(
    long_training: tuple[subprocess.Popen[bytes], list[int]], number: signal.Signals
) -> None:
    process, workers = long_training
    assert len(workers) == 2 and all(map(alive, workers))
    process.send_signal(number)
    status = process.wait(timeout=30)
    wait_for(lambda: not any(map(alive, workers)))
    assert status == (130 if number == signal.SIGINT else -number)


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_that_dies_ends_all(long_training: tuple[subprocess.Popen[bytes], list[int]]) -> None:
    process, workers = long_training
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(timeout=30) == 3
    assert not any(map(alive, workers))


@pytest.mark.heavy
def test_an_error_during_the_training_is_told_once(spec_file: Path, training: Overrides, tmp_path: Path) -> None:
    broken = {"train.optimizer.learning_rate": 1e30, "train.clip_norm": None, "parallel.tensor": 2}
    done = run_train(spec_file, tmp_path / "run", {**training, **broken})
    assert done.returncode == 1
    assert done.stderr.count("TRAIN015") == 1
    assert "internal" not in done.stderr


@pytest.mark.heavy
def test_copies_that_are_demanded_need_gpus(spec_file: Path, training: Overrides, tmp_path: Path) -> None:
    settings = {**training, "parallel.tensor": 2, "parallel.sequence": True, "parallel.symmetric_memory": True}
    done = run_train(spec_file, tmp_path / "run", settings)
    assert done.returncode == 1
    assert done.stderr.count("TRAIN018") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()

"""One training started in several ways: by itself, by torchrun, and by a torchrun on each of several nodes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from archwright.trainers.metrics import read_metrics

pytestmark = pytest.mark.heavy
PROGRAM = [sys.executable, "-c", "import sys; from archwright.spec.cli import main; sys.exit(main())"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
Overrides = dict[str, object]


def command(spec_file: Path, run: Path, settings: Mapping[str, object]) -> list[str]:
    sets = [f"--set={path}={json.dumps(value)}" for path, value in settings.items()]
    return [*PROGRAM, "train", str(spec_file), "-o", str(run), *sets]


def finish(*processes: "subprocess.Popen[str]") -> None:
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def settings(training: Overrides) -> Overrides:
    return {**training, "train.precision": "float64", "train.steps": 8, "train.micro_batches": 2}


@pytest.fixture(scope="module")
def alone(spec_file: Path, settings: Overrides, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    finish(start(command(spec_file, run, {**settings, "parallel.data_shard": 1})))
    return [record["loss"] for record in read_metrics(run)]


def test_one_torchrun_fills_the_axis_that_is_auto(
    spec_file: Path, settings: Overrides, alone: list[float], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    finish(start([*torchrun, *command(spec_file, tmp_path / "run", settings)]))
    assert [record["loss"] for record in read_metrics(tmp_path / "run")] == pytest.approx(alone, rel=1e-10, abs=0)


def test_torchrun_on_two_nodes(spec_file: Path, settings: Overrides, alone: list[float], tmp_path: Path) -> None:
    """Two launchers that meet at a port, two processes each; here both nodes are this machine."""
    endpoint = f"127.0.0.1:{free_port()}"
    mesh = {"parallel.pipeline": 2, "parallel.data_shard": "auto"}
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--no-python",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=archwright",
    ]  # fmt: skip
    arguments = [*torchrun, *command(spec_file, tmp_path / "run", {**settings, **mesh})]
    finish(start(arguments), start(arguments))
    assert [record["loss"] for record in read_metrics(tmp_path / "run")] == pytest.approx(alone, rel=1e-10, abs=0)


def test_what_auto_becomes_must_be_legal(spec_file: Path, settings: Overrides, tmp_path: Path) -> None:
    """Four sequences cannot be shared by three data ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--no-python"]
    done = start([*torchrun, *command(spec_file, tmp_path / "run", settings)])
    _, errors = done.communicate(timeout=200)
    assert done.returncode == 1
    assert "SPEC045" in errors and "internal" not in errors
    assert not (tmp_path / "run").exists()

"""Mixtures of experts spread over processes, and cut within them, are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.compiler.distributed.experts_worker import CASES

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.heavy


def run_world(expert: int, tensor: int, folder: Path) -> dict[str, Any]:
    """What rank 0 reports."""
    command = [sys.executable, "-m", "tests.compiler.distributed.experts_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(expert), str(tensor), str(folder / "rendezvous")],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
        )
        for rank in range(expert * tensor)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return json.loads(outputs[0])


@pytest.mark.parametrize(("expert", "tensor"), [(2, 1), (2, 2)])
def test_outputs_and_gradients_are_those_of_one_process(expert: int, tensor: int, tmp_path: Path) -> None:
    found = run_world(expert, tensor, tmp_path)
    for case in CASES[: 4 - tensor]:  # compiled: not once more under tensor 2
        assert found[case]["logits"] < 1e-12
        assert found[case]["loss"] < 1e-12
        assert found[case]["gradients"] < 1e-12
    assert max(found["means"]) < 1e-12
    assert found["even"]["smallest gradient"] > 0, "every parameter takes part"
    assert found["all tokens to one rank"]["smallest gradient"] == 0, "experts that nobody chose"

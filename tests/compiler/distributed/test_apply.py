"""A Plan applied to torch modules, at tensor 1, 2 and 4: the same model, however it lies."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.heavy


def run_world(size: int, folder: Path) -> list[dict[str, Any]]:
    """The reports of all ranks of one world."""
    command = [sys.executable, "-m", "tests.compiler.distributed.worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder / f"rendezvous-{size}")],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return [json.loads(output) for output in outputs]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("worlds")
    return {size: run_world(size, folder) for size in (1, 2, 4)}


@pytest.mark.parametrize("model", ["tied", "untied", "muon"])
@pytest.mark.parametrize("size", [2, 4])
class TestWorld:
    def test_initial_values_are_the_same(self, worlds: dict[int, Any], size: int, model: str) -> None:
        assert worlds[size][0][model]["hashes"] == worlds[1][0][model]["hashes"]

    def test_training_is_that_of_one_process(self, worlds: dict[int, Any], size: int, model: str) -> None:
        one, many = worlds[1][0][model], worlds[size][0][model]
        assert many["losses"] == pytest.approx(one["losses"], rel=1e-10, abs=0)
        assert many["norms"] == pytest.approx(one["norms"], rel=1e-8, abs=0)
        assert many["final"] == pytest.approx(one["final"], rel=1e-7, abs=1e-7)
        assert one["losses"][-1] != one["losses"][0]

    def test_norm_counts_replicas_once(self, worlds: dict[int, Any], size: int, model: str) -> None:
        one, many = worlds[1][0][model]["norm"], worlds[size][0][model]["norm"]
        assert many["before"] == pytest.approx(one["before"], rel=1e-12)
        assert many["after"] == pytest.approx(one["before"] / 2, rel=1e-12)

    def test_every_parameter_is_a_dtensor(self, worlds: dict[int, Any], size: int, model: str) -> None:
        assert worlds[size][0][model]["dtensors"] == [True]
        assert worlds[1][0][model]["dtensors"] == [False]

    def test_ranks_agree_on_what_is_replicated(self, worlds: dict[int, Any], size: int, model: str) -> None:
        assert len({json.dumps([rank[model]["losses"], rank[model]["own"]]) for rank in worlds[size]}) == 1


def test_local_shapes(worlds: dict[int, Any]) -> None:
    """4 query heads and 2 key/value heads of 8: at 4 ranks the key/value heads are replicated."""
    layer = "model.layers.0."
    two, four = worlds[2][0]["tied"]["local"], worlds[4][0]["tied"]["local"]
    assert two[layer + "self_attn.q_proj.weight"] == [16, 32]
    assert two[layer + "self_attn.k_proj.weight"] == [8, 32]
    assert four[layer + "self_attn.q_proj.weight"] == [8, 32]
    assert four[layer + "self_attn.k_proj.weight"] == [16, 32]
    assert four[layer + "self_attn.o_proj.weight"] == [32, 8]
    assert four[layer + "mlp.down_proj.weight"] == [32, 12]
    assert four["model.embed_tokens.weight"] == [96, 32]

"""What each process of a world holds of a model, and the norm of all gradients. That plans train alike: tests/multi."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archwright.compiler.passes import lower
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import load
from tests.compiler.distributed.worker import BASE, MODELS, PLANS

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.heavy
CASES = [f"{plan}: {model}" for plan in PLANS for model in MODELS]


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
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """plan: model → what each rank says."""
    folder = tmp_path_factory.mktemp("worlds")
    worlds = [run_world(size, folder) for size in (1, 2, 4)]
    return {case: [rank[case] for rank in world] for world in worlds for case in world[0]}


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_a_dtensor_or_none_is(reports: dict[str, Any], case: str) -> None:
    """All where ranks share a stage, norms too; none where each stage is one rank's."""
    degrees = PLANS[case.partition(":")[0]]
    shared = degrees.world > degrees.pipeline
    assert [rank["dtensors"] for rank in reports[case]] == [[shared]] * degrees.world


@pytest.mark.parametrize("case", CASES)
def test_the_norm_counts_copies_once(reports: dict[str, Any], case: str) -> None:
    """That of the full tensors, on every rank; a tied matrix that two stages hold is one tensor."""
    params = lower(load("preset:tiny", {**BASE, **MODELS[case.partition(": ")[2]]})).params()
    drawn = GeneratedWeights(params=params, seed=6)
    expected = math.sqrt(sum(float(np.square(drawn.read(name).astype(np.float64)).sum()) for name in params))
    norms = {rank["norm"] for rank in reports[case]}
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(expected, rel=1e-12)


LAYER = "model.layers.0."


@pytest.mark.parametrize(
    ("case", "name", "shapes"),
    [
        ("tensor 2: tied", "self_attn.q_proj", [[16, 32]] * 2),
        ("tensor 2: tied", "self_attn.k_proj", [[8, 32]] * 2),
        ("tensor 4: tied", "self_attn.q_proj", [[8, 32]] * 4),
        ("tensor 4: tied", "self_attn.k_proj", [[16, 32]] * 4),  # two heads, which four ranks share
        ("tensor 2: untied", "self_attn.k_proj", [[8, 32]] * 2),  # one head
        ("tensor 4: tied", "self_attn.o_proj", [[32, 8]] * 4),
        ("tensor 4: tied", "mlp.down_proj", [[32, 12]] * 4),
        ("data_shard 2: tied", "mlp.down_proj", [[16, 48]] * 2),
        ("data_shard 2, tensor 2: tied", "mlp.down_proj", [[16, 24]] * 4),
        ("data_shard 2, tensor 2: tied", "mlp.gate_proj", [[12, 32]] * 4),
        ("data_replicate 2: tied", "mlp.down_proj", [[32, 48]] * 2),
        ("data_replicate 2, data_shard 2: tied", "mlp.down_proj", [[16, 48]] * 4),
        ("context 2: tied", "mlp.down_proj", [[16, 48]] * 2),  # shares masters as data_shard does
        ("pipeline 2: tied", "mlp.down_proj", [[32, 48], None]),
        ("tensor 4: tied", "input_layernorm", [[32]] * 4),
        ("data_shard 2: tied", "input_layernorm", [[16]] * 2),
    ],
)
def test_local_shapes(reports: dict[str, Any], case: str, name: str, shapes: list[Any]) -> None:
    assert [rank["local"].get(f"{LAYER}{name}.weight") for rank in reports[case]] == shapes


@pytest.mark.parametrize(
    ("case", "rows"),
    [
        ("one", [91]),
        ("tensor 2", [46, 46]),
        ("tensor 4", [23, 23, 23, 23]),
        ("data_shard 2", [46, 45]),
        ("data_shard 2, tensor 2", [23, 23, 23, 23]),
        ("data_replicate 2", [91, 91]),
        ("pipeline 2, tensor 2", [46, 46, None, None]),
        ("pipeline 2, data_shard 2", [46, 45, None, None]),
    ],
)
def test_tables_are_filled_up_to_equal_pieces(reports: dict[str, Any], case: str, rows: list[int | None]) -> None:
    """91 tokens over tensor ranks; FSDP's own cut need not be even. A head of its own is cut likewise."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    untied = [rank["local"] for rank in reports[f"{case}: untied"]]
    shapes = [None if number is None else [number, 32] for number in rows]
    assert [rank.get(embedding) for rank in untied] == shapes
    pipelined = None in rows
    assert [rank.get(head) for rank in untied] == (shapes[::-1] if case == "pipeline 2, tensor 2" else
                                                   shapes[2:] + shapes[:2] if pipelined else shapes)  # fmt: skip


def test_both_ends_hold_a_tied_matrix(reports: dict[str, Any]) -> None:
    for plan, expected in (("pipeline 2", [True, True]), ("pipeline 2, interleaved", [True, True])):
        held = [any(shape[0] == 91 for shape in rank["local"].values()) for rank in reports[f"{plan}: tied"]]
        assert held == expected
        names = [set(rank["local"]) for rank in reports[f"{plan}: tied"]]
        assert all("model.embed_tokens.weight" in own for own in names), "under the embedding's name"


def test_interleaved_ranks_hold_every_other_stage(reports: dict[str, Any]) -> None:
    """Four layers in four stages: rank 0 has the first and the third."""
    for rank, report in enumerate(reports["pipeline 2, interleaved: tied"]):
        layers = {int(name.split(".")[2]) for name in report["local"] if name.startswith("model.layers.")}
        assert layers == {rank, rank + 2}

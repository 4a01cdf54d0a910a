"""The plans of two processes on two GPUs, through NCCL: they train as one GPU does.

Without GPUs the same tests run by `ARCHWRIGHT_PLANS_ON=cpu pytest -m gpu tests/multi/test_gpus.py`, through gloo.
"""

import os
from collections.abc import Iterator
from itertools import cycle

import pytest
import torch

from tests.multi.plans import MESHES, MODELS, legal
from tests.multi.test_invariance import cosine, largest
from tests.multi.worlds import Worlds

DEVICE = os.environ.get("ARCHWRIGHT_PLANS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def _covering() -> list[tuple[str, str]]:
    """Each mesh of two processes with one model, the next that it can train; in this order the most micro-batches meet
    the fewest layers."""
    turn, pairs = cycle(["tied", "moe", "untied", "moe, untied"]), list[tuple[str, str]]()
    for mesh in (name for name, mesh in MESHES.items() if mesh.processes == 2):
        pairs.append((next(model for model in turn if legal(model, mesh)), mesh))
    return pairs


PAIRS = _covering()
TABLE = f"two processes on {DEVICE}"
BFLOAT16 = {
    "train__precision": "bfloat16",
    "train__compile": False,
    # At three times this rate routers choose other experts after some steps, whatever the plan.
    "train__optimizer__learning_rate": 1e-3,
}
FLOAT32 = {"train__precision": "float32", "train__compile": False}


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    made = Worlds(tmp_path_factory.mktemp("gpus"), DEVICE)
    yield made
    made.close()


def _compared(
    gpus: Worlds, request: pytest.FixtureRequest, pair: tuple[str, str], steps: int, settings: dict[str, object]
) -> tuple[float, float]:
    """(largest relative deviation of the loss, cosine of the first gradients), which the table shows."""
    model, mesh = pair
    one, many = (gpus.train(model, each, steps, **settings) for each in ("one", mesh))
    assert many["initial"] == one["initial"]
    loss = largest(many["losses"], one["losses"])
    similar = cosine(many["gradients"][0], one["gradients"][0])
    precision = settings["train__precision"]
    row = {"plan": mesh, "model": model, "precision": precision, "steps": steps}
    row |= {"loss": f"{loss:.1e}", "1 - cosine": f"{1 - similar:.1e}", "last loss": f"{many['losses'][-1]:.4f}"}
    request.node.user_properties.append((f"table: {TABLE}", row))
    return loss, similar


@pytest.mark.parametrize("model, mesh", PAIRS)
def test_plan_in_bfloat16(gpus: Worlds, request: pytest.FixtureRequest, model: str, mesh: str) -> None:
    loss, _ = _compared(gpus, request, (model, mesh), 50, BFLOAT16)
    assert loss <= 5e-3


@pytest.mark.parametrize("model, mesh", PAIRS)
def test_plan_in_float32(gpus: Worlds, request: pytest.FixtureRequest, model: str, mesh: str) -> None:
    loss, similar = _compared(gpus, request, (model, mesh), 10, FLOAT32)
    assert loss <= 1e-5
    assert similar >= 0.99999


@pytest.mark.parametrize("mesh", ["data_shard 2", "tensor 2", "tensor 2, sequence", "tensor 2, sequence, selective"])
def test_compiled_plan_in_float32(gpus: Worlds, request: pytest.FixtureRequest, mesh: str) -> None:
    settings = {**FLOAT32, "train__compile": True}
    loss, similar = _compared(gpus, request, ("tied", mesh), 10, settings)
    assert loss <= 1e-5
    assert similar >= 0.99999
    assert gpus.train("tied", mesh, 10, **settings)["window"] == ("sequence" in mesh and DEVICE == "cuda")


def test_the_pairs_have_every_model_and_every_mesh() -> None:
    assert {model for model, _ in PAIRS} == MODELS.keys()
    assert {mesh for _, mesh in PAIRS} == {name for name, mesh in MESHES.items() if mesh.processes == 2}

"""The plans of two processes on two GPUs, through NCCL: they train as one GPU does."""

from collections.abc import Iterator

import pytest
import torch

from tests.multi.plans import MESHES, MODELS, legal
from tests.multi.test_invariance import cosine, largest
from tests.multi.worlds import Worlds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
PAIRS = [(model, mesh) for mesh in MESHES for model in MODELS if MESHES[mesh].processes == 2 and legal(model, mesh)]
EAGER = {"train__compile": False}


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    made = Worlds(tmp_path_factory.mktemp("gpus"), "cuda")
    yield made
    made.close()


@pytest.mark.parametrize("model, mesh", PAIRS)
def test_plan_in_bfloat16(gpus: Worlds, request: pytest.FixtureRequest, model: str, mesh: str) -> None:
    one, many = (gpus.train(model, each, 50, train__precision="bfloat16", **EAGER) for each in ("one", mesh))
    row = {"plan": f"{model}, {mesh}", "loss": f"{largest(many['losses'], one['losses']):.1e}"}
    request.node.user_properties.append(("table: two GPUs, bfloat16, 50 steps", row))
    assert many["initial"] == one["initial"]
    assert largest(many["losses"], one["losses"]) <= 5e-3


@pytest.mark.parametrize("model, mesh", PAIRS)
def test_plan_in_float32(gpus: Worlds, request: pytest.FixtureRequest, model: str, mesh: str) -> None:
    one, many = (gpus.train(model, each, 10, train__precision="float32", **EAGER) for each in ("one", mesh))
    row = {"plan": f"{model}, {mesh}", "loss": f"{largest(many['losses'], one['losses']):.1e}"}
    request.node.user_properties.append(("table: two GPUs, float32, 10 steps", row))
    assert largest(many["losses"], one["losses"]) <= 1e-5
    assert cosine(many["gradients"][0], one["gradients"][0]) >= 0.99999

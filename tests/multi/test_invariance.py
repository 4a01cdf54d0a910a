"""Any plan trains the same model: same initial tensors, same data, same losses, norms and gradients."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from tests.multi.plans import COVERING, MESHES, MODELS, NUM_STEPS, legal
from tests.multi.worlds import Worlds

Found = dict[str, Any]
pytestmark = pytest.mark.heavy
STEPS_OF_FOUR = 25
"""Of four processes, which two cores run slowly; `make test-slow` has all steps."""
COVERING_FLOAT32 = [(model, mesh) for model, mesh in COVERING if MESHES[mesh].processes == 2][::3]
WHOLE = [pair for pair in COVERING if MESHES[pair[1]].processes <= 2]
EVERY = [(model, mesh) for mesh in MESHES for model in MODELS if mesh != "one" and legal(model, mesh)]


def whole(tensors: dict[str, list[float]]) -> Any:
    return np.concatenate([np.asarray(tensors[name]) for name in sorted(tensors)])


def distance(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> float:
    """‖found - wanted‖ / ‖wanted‖ over all tensors together."""
    assert found.keys() == wanted.keys()
    return float(np.linalg.norm(whole(found) - whole(wanted)) / np.linalg.norm(whole(wanted)))


def cosine(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> float:
    a, b = whole(found), whole(wanted)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def largest(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def compare(one: Found, many: Found) -> dict[str, float]:
    """Largest relative deviations."""
    return {
        "loss": largest(many["losses"], one["losses"]),
        "norm": largest(many["norms"], one["norms"]),
        "first gradient": distance(many["gradients"][0], one["gradients"][0]),
        "last gradient": distance(many["gradients"][-1], one["gradients"][-1]),
    }


def check_float64(
    worlds: Worlds, request: pytest.FixtureRequest, model: str, mesh: str, steps: int = NUM_STEPS
) -> None:
    one, many = worlds.train(model, "one", steps), worlds.train(model, mesh, steps)
    deviations = compare(one, many)
    row = {"plan": f"{model}, {mesh}"} | {name: f"{value:.1e}" for name, value in deviations.items()}
    request.node.user_properties.append((f"table: plans over {steps} steps in float64", row))
    assert many["initial"] == one["initial"]
    assert max(deviations.values()) <= 1e-10, deviations
    learned = 0.5 if steps == NUM_STEPS else 0.8
    assert one["losses"][-1] < learned * one["losses"][0], "the model learns, so the comparison means something"


def check_float32(worlds: Worlds, model: str, mesh: str) -> None:
    one, many = (worlds.train(model, each, 10, train__precision="float32") for each in ("one", mesh))
    assert many["initial"] == one["initial"]
    assert largest(many["losses"], one["losses"]) <= 1e-5
    assert cosine(many["gradients"][0], one["gradients"][0]) >= 0.99999
    assert many["norms"][0] == pytest.approx(one["norms"][0], rel=1e-5)


@pytest.mark.parametrize("model, mesh", WHOLE)
def test_plan(worlds: Worlds, request: pytest.FixtureRequest, model: str, mesh: str) -> None:
    check_float64(worlds, request, model, mesh)


@pytest.mark.parametrize("model, mesh", COVERING_FLOAT32)
def test_plan_in_float32(worlds: Worlds, model: str, mesh: str) -> None:
    check_float32(worlds, model, mesh)


@pytest.mark.parametrize("model, mesh", [pair for pair in COVERING if MESHES[pair[1]].processes > 2])
def test_plan_of_four(worlds: Worlds, request: pytest.FixtureRequest, model: str, mesh: str) -> None:
    """Last, so that the worlds of one and two processes are started once."""
    check_float64(worlds, request, model, mesh, STEPS_OF_FOUR)


@pytest.mark.slow
@pytest.mark.parametrize("model, mesh", [pair for pair in EVERY if pair not in WHOLE])
def test_every_plan(worlds: Worlds, request: pytest.FixtureRequest, model: str, mesh: str) -> None:
    check_float64(worlds, request, model, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("model, mesh", [pair for pair in EVERY if pair not in COVERING_FLOAT32])
def test_every_plan_in_float32(worlds: Worlds, model: str, mesh: str) -> None:
    check_float32(worlds, model, mesh)


def test_the_covering_set_has_every_axis_and_every_model() -> None:
    def axes(meshes: Iterable[str]) -> set[str]:
        return {name for mesh in meshes for name in MESHES[mesh].settings}

    assert axes(mesh for _, mesh in COVERING) == axes(MESHES)
    assert {model for model, _ in COVERING} == MODELS.keys()
    assert set(COVERING) <= set(EVERY)

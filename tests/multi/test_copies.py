"""Tensor ranks that exchange tokens by copies train as one process does.

Their windows lie in files of this host, and copies are made at the last moment: all but that is what runs on GPUs.
"""

from collections.abc import Iterator

import pytest

from tests.multi.plans import MESHES, NUM_STEPS
from tests.multi.test_invariance import compare
from tests.multi.worlds import Worlds

pytestmark = pytest.mark.heavy
STEPS = 20
SHARING = [mesh for mesh in MESHES if "sequence" in mesh]


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    made = Worlds(tmp_path_factory.mktemp("lent"), "lent")
    yield made
    made.close()


def check(lent: Worlds, model: str, mesh: str, steps: int, **more: object) -> None:
    one, many = lent.train(model, "one", steps), lent.train(model, mesh, steps, **more)
    assert (one["window"], many["window"]) == (False, True)
    assert many["initial"] == one["initial"]
    deviations = compare(one, many)
    assert max(deviations.values()) <= 1e-10, deviations


@pytest.mark.parametrize("mesh", ["tensor 2, sequence", "tensor 2, sequence, selective"])
def test_plan(lent: Worlds, mesh: str) -> None:
    check(lent, "tied", mesh, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [mesh for mesh in SHARING if MESHES[mesh].processes == 2])
def test_compiled_plan(lent: Worlds, mesh: str) -> None:
    """Pieces of whole sequences, rows that are computed again, and values that are kept."""
    check(lent, "tied", mesh, STEPS, train__compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SHARING)
def test_every_plan(lent: Worlds, mesh: str) -> None:
    check(lent, "tied" if "expert" not in mesh else "moe", mesh, NUM_STEPS)


def test_without_a_window_ranks_use_collectives(lent: Worlds) -> None:
    found = lent.train("tied", "tensor 2, sequence", 2, parallel__symmetric_memory=False)
    assert not found["window"]

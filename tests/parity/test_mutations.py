"""The differential suite can fail: each seeded bug turns its comparison red, and without it the same one is green."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archwright.compiler.ir import Degrees
from archwright.compiler.passes import lower, partition
from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.spec import load
from tests.parity.cases import Case, Outputs, make_case, oracle
from tests.parity.conftest import Ranks, Record
from tests.parity.mutations import MUTATIONS
from tests.parity.targets import compare, run_onnx, run_torch, torch_module
from tests.parity.test_differential import GRADIENT_TOLERANCE, one_process_gradients

SPEC = """\
version: 1
name: mutated
model:
  vocab_size: 61
  hidden_size: 33
  max_positions: 64
  layers: 2
  layer:
    norm: {kind: rmsnorm, eps: 1e-3}
    attention:
      kind: gqa
      heads: 8
      kv_heads: 2
      head_dim: 10
      position: {kind: rope, theta: 10_000, scaling: {kind: llama3, original_max_positions: 32}}
    ffn: {kind: swiglu, hidden_size: 44}
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = tmp_path_factory.mktemp("mutations") / "spec.yaml"
    path.write_text(SPEC)
    return make_case(lower(load(path)), seed=0)


@pytest.fixture(scope="module")
def expected(case: Case) -> Outputs:
    return oracle(case)


@pytest.fixture(scope="module")
def gradients(case: Case) -> dict[str, object]:
    return one_process_gradients(case)


@pytest.fixture
def excess(
    case: Case, expected: Outputs, gradients: dict[str, object], ranks: Ranks, tmp_path: Path
) -> Callable[[str], float]:
    """Target → its error in units of the tolerance; infinite where it refuses the work."""

    def measure(target: str) -> float:
        degree = {"joined2": 2, "joined4": 4, "ranks": 2, "gradients": 2}.get(target, 1)
        plan = partition(case.program, Degrees(tensor=degree))
        if target == "torch":
            outputs = run_torch(case, torch_module(case, torch.float32))
            return compare(outputs, expected) / TOLERANCES["torch", "float32"]
        if target == "ranks":
            answers = ranks.run(case, plan, dtype="float32")
            return max(compare(answer, expected) for answer in answers) / TOLERANCES["torch", "float32"]
        if target == "gradients":
            _, _, actual = ranks.run(case, plan, dtype=None)[0]
            return max(largest_error(actual[name], gradients[name]) for name in gradients) / GRADIENT_TOLERANCE
        return compare(run_onnx(case, plan, tmp_path), expected) / TOLERANCES["onnxruntime", "float32"]

    def guarded(target: str) -> float:
        try:
            return measure(target)
        except AssertionError:  # the writer's check of shapes
            return float("inf")

    return guarded


@pytest.mark.parametrize("target", sorted({mutation.target for mutation in MUTATIONS.values()}))
def test_without_a_bug_the_comparison_is_green(target: str, excess: Callable[[str], float]) -> None:
    assert excess(target) <= 1


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_turns_the_comparison_red(
    name: str, excess: Callable[[str], float], monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    mutation = MUTATIONS[name]
    mutation.patch(monkeypatch)
    error = excess(mutation.target)
    record("times the tolerance", error)
    # Ten times, so that a bug is told from rounding by a wide margin.
    assert error > 10

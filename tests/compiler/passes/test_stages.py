"""Program → pipeline stages: neighbouring segments, the heaviest stage as light as can be."""

from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archwright.compiler.interpreters.cost_ops import run_cost
from archwright.compiler.ir import Degrees, Program
from archwright.compiler.ir.verifier import verify_program
from archwright.compiler.passes import TRAINING_TABLE, lower, partition
from archwright.compiler.passes.stages import NOMINAL_SEQUENCE, _lightest, cut_stages
from archwright.spec import ArchwrightError, load


def best_by_trial(weights: Sequence[int], number: int) -> int:
    """The least largest sum of all ways to cut, the first part with two segments or more."""
    return min(
        max(sum(weights[start:stop]) for start, stop in zip((0, *cuts), (*cuts, len(weights)), strict=True))
        for cuts in combinations(range(1, len(weights)), number - 1)
        if number == 1 or cuts[0] >= 2
    )


@given(st.data())
def test_the_heaviest_stage_is_as_light_as_can_be(data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(0, 20), min_size=3, max_size=9))
    number = data.draw(st.integers(1, len(weights) - 1))
    stages = _lightest(weights, number)
    assert len(stages) == number and stages[0][0] == 0 and stages[-1][1] == len(weights)
    assert all(before[1] == after[0] for before, after in pairwise(stages))
    assert all(stop > start for start, stop in stages)
    assert number == 1 or stages[0][1] >= 2, "the embedding is with a layer"
    assert max(sum(weights[start:stop]) for start, stop in stages) == best_by_trial(weights, number)


def program_of(layers: int, **changes: object) -> Program:
    return lower(load("preset:tiny", {"model.layers": layers, **changes}))


@pytest.mark.parametrize("layers", [1, 2, 5, 8])
def test_stages_are_balanced_in_flops(layers: int) -> None:
    program = program_of(layers)
    cost = run_cost(program, batch=1, sequence=min(512, NOMINAL_SEQUENCE), targets=True)
    weights = [cost.of(segment).causal_flops for segment in program.segments]
    assert weights[0] == 0 and all(weight > 0 for weight in weights[1:])
    for number in range(1, layers + 1):
        stages = cut_stages(program, number)
        assert max(sum(weights[start:stop]) for start, stop in stages) == best_by_trial(weights, number)


def test_a_heavy_head_takes_layers_from_its_stage() -> None:
    light, heavy = program_of(8), program_of(8, **{"model.vocab_size": 60_000})
    assert cut_stages(light, 2) == ((0, 5), (5, 10))
    ((_, stop), _) = cut_stages(heavy, 2)
    assert stop == 9, "the head alone outweighs the layers"


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ArchwrightError) as caught:
        cut_stages(program_of(3), 4)
    assert caught.value.code == "IR012" and "3 layers cannot be 4 stages" in caught.value.message
    with pytest.raises(ArchwrightError, match="IR012"):
        partition(program_of(3), Degrees(pipeline=2, stages_per_rank=2))


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("pipeline", "stages_per_rank"), [(1, 1), (2, 1), (2, 2), (4, 1), (3, 2)])
def test_a_plan_has_its_stages(pipeline: int, stages_per_rank: int, tensor: int) -> None:
    """Together they are the Program, and each is one that the verifier accepts."""
    degrees = Degrees(pipeline=pipeline, stages_per_rank=stages_per_rank, tensor=tensor, sequence=True)
    plan = partition(program_of(6), degrees, TRAINING_TABLE)
    assert len(plan.stages) == pipeline * stages_per_rank
    together = [segment for number in range(len(plan.stages)) for segment in plan.stage(number).segments]
    assert tuple(together) == plan.program.segments
    for number in range(len(plan.stages)):
        verify_program(plan.stage(number))

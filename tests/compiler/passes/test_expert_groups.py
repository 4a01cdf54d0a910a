"""Experts of a deployment, whose ranks all have the same tokens: what `partition` derives and the verifier checks."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from archwright.compiler.blocks import Experts, MoeDecoderLayer
from archwright.compiler.interpreters.cost_ops import run_cost
from archwright.compiler.ir import Boundary, Degrees, Plan, Program
from archwright.compiler.ir.verifier import verify_plan
from archwright.compiler.passes import TRAINING_TABLE, degrees_of, partition, run_passes
from archwright.compiler.planning.layout import splits_of
from archwright.spec import ArchwrightError, Spec, load
from archwright.spec.models import BuildParallel

MOE = {"kind": "moe", "experts": 6, "experts_per_token": 2, "hidden_size": 24, "shared": {"hidden_size": 32}}
BOTH = Boundary(mesh_axis="tensor", outer="expert")


def make_spec() -> Spec:
    return load("preset:tiny", {"model.layer.ffn": MOE})


def experts_of(plan: Plan) -> Experts:
    layer = plan.program.segments[1].block
    assert isinstance(layer, MoeDecoderLayer)
    return layer.mlp.experts


@pytest.mark.parametrize(
    ("degrees", "boundary"),
    [
        (Degrees(), None),
        (Degrees(tensor=2), Boundary(mesh_axis="tensor")),
        (Degrees(expert=3), Boundary(mesh_axis="expert")),
        (Degrees(expert=3, tensor=2), BOTH),
    ],
)
def test_ranks_of_the_same_tokens_add_up_their_experts(degrees: Degrees, boundary: Boundary | None) -> None:
    plan = run_passes(make_spec(), degrees)
    experts = experts_of(plan)
    assert (experts.enter, experts.reduce, experts.dispatch) == (boundary, boundary, None)
    shape = plan.local.params()["model.layers.0.mlp.experts.gate_proj"].shape
    assert shape == (6 // degrees.expert, 24 // degrees.tensor, 64)
    assert plan.local.params()["model.layers.0.mlp.gate.weight"].shape == (6, 64), "everybody routes"


def test_ranks_with_tokens_of_their_own_exchange_them() -> None:
    experts = experts_of(run_passes(make_spec(), Degrees(expert=3, tensor=2), TRAINING_TABLE))
    assert experts.dispatch == "expert" and experts.reduce == Boundary(mesh_axis="tensor")


def test_one_sum_runs_over_both_axes() -> None:
    plan = run_passes(make_spec(), Degrees(expert=2, tensor=2))
    cost = run_cost(plan.local, batch=1, sequence=3, visible=3, splits=splits_of(plan))
    found = Counter((each.kind, each.mesh_axis) for each in cost.collectives if not each.backward)
    # Of two layers: attention and shared expert; the experts.
    assert found == {("all_reduce", "tensor"): 4, ("all_reduce", "expert+tensor"): 2}
    flops = [sum(each.flops for each in costs if each.op == "experts") for costs in (cost.costs, _whole_costs())]
    assert flops[0] * 4 == flops[1]


def _whole_costs() -> Any:
    return run_cost(run_passes(make_spec(), Degrees()).local, batch=1, sequence=3, visible=3).costs


@pytest.mark.parametrize(
    "changes",
    [
        {"reduce": None},
        {"enter": None},
        {"reduce": Boundary(mesh_axis="tensor")},
        {"reduce": Boundary(mesh_axis="expert")},
        {"dispatch": "expert"},
    ],
)
def test_the_verifier_finds_a_wrong_sum(changes: dict[str, Any]) -> None:
    plan = run_passes(make_spec(), Degrees(expert=2, tensor=2))

    def broken(program: Program) -> Program:
        first, layer, *rest = program.segments
        block = layer.block
        assert isinstance(block, MoeDecoderLayer)
        mlp = replace(block.mlp, experts=replace(block.mlp.experts, **changes))
        return replace(program, segments=(first, replace(layer, block=replace(block, mlp=mlp)), *rest))

    with pytest.raises(ArchwrightError, match="IR009"):
        verify_plan(replace(plan, program=broken(plan.program), local=broken(plan.local)))


def test_degrees_of_a_build_section() -> None:
    degrees = degrees_of(BuildParallel(pipeline=3, expert=2, tensor=4))
    assert degrees == Degrees(pipeline=3, expert=2, tensor=4) and degrees.world == 24


def test_parts_of_a_parameter_by_coordinates() -> None:
    program = run_passes(make_spec(), Degrees()).program
    plan = partition(program, Degrees(expert=2, tensor=4))
    param = plan.program.params()["model.layers.0.mlp.experts.down_proj"]
    place = plan.coordinates(6)
    assert (place["expert"], place["tensor"]) == (1, 2)
    assert param.slices(place) == (slice(3, 6), slice(None), slice(12, 18))
    keys = plan.program.params()["model.layers.0.self_attn.k_proj.weight"]
    assert keys.pieces(place) == keys.pieces(plan.coordinates(2)) == keys.pieces(plan.coordinates(3)) == (1,)
    assert plan.program.params()["model.norm.weight"].slices(place) == (slice(None),)

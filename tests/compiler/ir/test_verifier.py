"""Each rule of the verifier: a Program that breaks it is refused, at the block that breaks it."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from archwright.compiler.blocks import DecoderLayer, Linear, RMSNorm, SwiGLU
from archwright.compiler.ir import Block, Degrees, Program, Split
from archwright.compiler.ir.verifier import verify_plan, verify_program
from archwright.compiler.passes import lower, partition
from archwright.spec import ArchwrightError, load


@pytest.fixture(scope="module")
def program() -> Program:
    return lower(load("preset:tiny"))


def with_layer(program: Program, layer: Block) -> Program:
    """The Program with another first layer."""
    first, second, *rest = program.segments
    return replace(program, segments=(first, replace(second, block=layer), *rest))


def layer_of(program: Program) -> DecoderLayer:
    layer = program.segments[1].block
    assert isinstance(layer, DecoderLayer)
    return layer


def with_weight(program: Program, **changes: Any) -> Program:
    """The Program with a changed `mlp.up_proj.weight` in its first layer."""
    layer = layer_of(program)
    weight = replace(layer.mlp.up_proj.weight, **changes)
    mlp = replace(layer.mlp, up_proj=replace(layer.mlp.up_proj, weight=weight))
    return with_layer(program, replace(layer, mlp=mlp))


def refused(program: Program) -> ArchwrightError:
    with pytest.raises(ArchwrightError) as caught:
        verify_program(program)
    return caught.value


@pytest.mark.parametrize("preset", ["tiny", "llama3.2-1b", "llama3.1-8b"])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_presets_keep_every_rule(preset: str, degree: int) -> None:
    program = lower(load(f"preset:{preset}"))
    verify_program(program)
    verify_plan(partition(program, Degrees(tensor=degree)))


@pytest.mark.parametrize(
    "changes", [{"axes": ("ffn",)}, {"grain": (1,)}, {"shape": (0, 64)}, {"grain": (3, 1)}, {"shape": (176, 64, 1)}]
)
def test_shape_axes_and_grain_agree(program: Program, changes: dict[str, Any]) -> None:
    error = refused(with_weight(program, **changes))
    assert (error.code, error.where) == ("IR002", "model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    "split",
    [
        Split(mesh_axis="tensor", dim=2, degree=2, parts=2),
        Split(mesh_axis="tensor", dim=0, degree=3, parts=3),
        Split(mesh_axis="tensor", dim=0, degree=3, parts=2),
        Split(mesh_axis="tensor", dim=0, degree=4, parts=2),
    ],
)
def test_a_split_fits_its_parameter(program: Program, split: Split) -> None:
    assert refused(with_weight(program, split=split)).code == "IR003"


def test_shared_parameters_are_equal(program: Program) -> None:
    first, *rest = program.segments
    table = replace(first.block.weight, shape=(512, 65))  # type: ignore[attr-defined]
    error = refused(replace(program, segments=(replace(first, block=replace(first.block, weight=table)), *rest)))
    assert (error.code, error.where) == ("IR004", "lm_head.weight")


def test_paths_are_unique(program: Program) -> None:
    twice = replace(program, segments=(*program.segments[:2], *program.segments[1:]))
    assert (refused(twice).code, refused(twice).where) == ("IR005", "model.layers.0")


@dataclass(frozen=True, kw_only=True)
class Careless(SwiGLU):
    """Reads `m.gate`, which it does not have."""

    def forward(self, ops: Any, m: Any, x_BSD: Any) -> Any:
        return m.down_proj(m.gate(x_BSD))


@dataclass(frozen=True, kw_only=True)
class NumberThroughScope(RMSNorm):
    """Reads a plain field through `m`, where only parameters and children are."""

    def forward(self, ops: Any, m: Any, x_BSD: Any) -> Any:
        return ops.rms_norm(x_BSD, m.weight, m.eps)


@dataclass(frozen=True, kw_only=True)
class Lazy(SwiGLU):
    """Never calls its gate."""

    def forward(self, ops: Any, m: Any, x_BSD: Any) -> Any:
        return m.down_proj(ops.silu(m.up_proj(x_BSD)))


@dataclass(frozen=True, kw_only=True)
class Unweighted(RMSNorm):
    """Calls nothing with its weight."""

    def forward(self, ops: Any, m: Any, x_BSD: Any) -> Any:
        return x_BSD


def test_an_undeclared_read_is_an_error(program: Program) -> None:
    layer = layer_of(program)
    error = refused(with_layer(program, replace(layer, mlp=Careless(**vars(layer.mlp)))))
    assert (error.code, error.where) == ("IR006", "model.layers.0.mlp")
    assert "m.gate" in error.message
    careless = replace(layer, input_layernorm=NumberThroughScope(**vars(layer.input_layernorm)))
    assert refused(with_layer(program, careless)).code == "IR006"


def test_an_unread_child_or_parameter_is_an_error(program: Program) -> None:
    layer = layer_of(program)
    error = refused(with_layer(program, replace(layer, mlp=Lazy(**vars(layer.mlp)))))
    assert (error.code, error.where) == ("IR007", "model.layers.0.mlp")
    assert "gate_proj" in error.message
    error = refused(with_layer(program, replace(layer, input_layernorm=Unweighted(**vars(layer.input_layernorm)))))
    assert (error.code, error.where) == ("IR007", "model.layers.0.input_layernorm")


def test_shapes_agree(program: Program) -> None:
    assert refused(with_weight(program, shape=(176, 60))).code == "IR008"
    error = refused(with_weight(program, shape=(180, 64)))
    assert (error.code, error.where) == ("IR008", "model.layers.0.mlp")
    layer = layer_of(program)
    odd = replace(layer.self_attn, head_dim=15)
    assert refused(with_layer(program, replace(layer, self_attn=odd))).code == "IR008"


def test_a_state_has_the_heads_that_are_written(program: Program) -> None:
    layer = layer_of(program)
    keys = layer.self_attn.k_proj.weight
    values = Linear(weight=replace(keys, shape=(64, 64)))
    error = refused(with_layer(program, replace(layer, self_attn=replace(layer.self_attn, v_proj=values))))
    assert (error.code, error.where) == ("IR008", "model.layers.0.self_attn")


@pytest.mark.parametrize("degree", [2, 4])
def test_reduce_stands_exactly_where_a_split_axis_is_contracted(program: Program, degree: int) -> None:
    plan = partition(program, Degrees(tensor=degree))
    layer = layer_of(plan.program)
    down, up = layer.mlp.down_proj, layer.mlp.up_proj
    missing = replace(layer, mlp=replace(layer.mlp, down_proj=replace(down, reduce=None)))
    error = refused(with_layer(plan.program, missing))
    assert (error.code, error.where) == ("IR009", "model.layers.0.mlp.down_proj")
    surplus = replace(layer, mlp=replace(layer.mlp, up_proj=replace(up, reduce="tensor")))
    assert refused(with_layer(plan.program, surplus)).code == "IR009"
    unsplit = replace(layer_of(program), mlp=replace(layer_of(program).mlp, down_proj=replace(down, reduce="tensor")))
    assert refused(with_layer(program, unsplit)).code == "IR009"


def test_enter_stands_exactly_where_ranks_begin_to_differ(program: Program) -> None:
    layer = layer_of(partition(program, Degrees(tensor=2)).program)
    plan = partition(program, Degrees(tensor=2)).program
    assert refused(with_layer(plan, replace(layer, mlp=replace(layer.mlp, enter=None)))).code == "IR009"
    assert refused(with_layer(plan, replace(layer, enter="tensor"))).code == "IR009"
    norm = replace(layer.input_layernorm, enter="tensor")
    assert refused(with_layer(plan, replace(layer, input_layernorm=norm))).code == "IR009"


def test_one_split_matrix_among_whole_ones_is_refused(program: Program) -> None:
    plan = partition(program, Degrees(tensor=2)).program
    layer = layer_of(plan)
    whole = Linear(weight=replace(layer.mlp.gate_proj.weight, split=None))
    assert refused(with_layer(plan, replace(layer, mlp=replace(layer.mlp, gate_proj=whole)))).code == "IR009"


def test_the_local_program_is_the_global_one_cut(program: Program) -> None:
    plan = partition(program, Degrees(tensor=2))
    with pytest.raises(ArchwrightError, match="IR010"):
        verify_plan(replace(plan, local=program))
    with pytest.raises(ArchwrightError, match="IR010"):
        verify_plan(replace(plan, local=replace(plan.local, segments=plan.local.segments[:-1])))
    no_reduce = layer_of(plan.local)
    no_reduce = replace(no_reduce, mlp=replace(no_reduce.mlp, down_proj=replace(no_reduce.mlp.down_proj, reduce=None)))
    with pytest.raises(ArchwrightError, match="IR009"):
        verify_plan(replace(plan, local=with_layer(plan.local, no_reduce)))


def test_a_pipeline_stage_is_a_program(program: Program) -> None:
    verify_program(replace(program, segments=program.segments[:2]))
    verify_program(replace(program, segments=program.segments[1:3]))
    verify_program(replace(program, segments=program.segments[2:]))

"""Each rule of the verifier: a Program that breaks it is refused, at the block that breaks it."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from archwright.compiler.blocks import DecoderLayer, Linear, RMSNorm, SwiGLU
from archwright.compiler.ir import Block, Boundary, Degrees, Plan, Program, Split
from archwright.compiler.ir.verifier import verify_plan, verify_program
from archwright.compiler.passes import INFERENCE_TABLE, TRAINING_TABLE, lower, partition
from archwright.spec import ArchwrightError, load

TENSOR = Boundary(mesh_axis="tensor")
TOKENS = Boundary(mesh_axis="tensor", tokens=True)


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
    for table in (INFERENCE_TABLE, TRAINING_TABLE):
        verify_plan(partition(program, Degrees(tensor=degree), table))
    verify_plan(partition(program, Degrees(tensor=degree, sequence=True), TRAINING_TABLE))


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
    assert refused(with_weight(program, splits=(split,))).code == "IR003"


def test_only_the_rows_of_a_table_may_be_cut_unevenly(program: Program) -> None:
    verify_plan(partition(program, Degrees(tensor=4, sequence=True), TRAINING_TABLE))
    odd = lower(load("preset:tiny", {"model.vocab_size": 513, "tokenizer.vocab_size": 513}))
    verify_plan(partition(odd, Degrees(tensor=4), TRAINING_TABLE))
    uneven = Split(mesh_axis="tensor", dim=0, degree=3, parts=3)
    error = refused(with_weight(program, splits=(uneven,)))
    assert (error.code, error.where) == ("IR003", "model.layers.0.mlp.up_proj.weight")


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
    surplus = replace(layer, mlp=replace(layer.mlp, up_proj=replace(up, reduce=TENSOR)))
    assert refused(with_layer(plan.program, surplus)).code == "IR009"
    unsplit = replace(layer_of(program), mlp=replace(layer_of(program).mlp, down_proj=replace(down, reduce=TENSOR)))
    assert refused(with_layer(program, unsplit)).code == "IR009"


def test_enter_stands_exactly_where_ranks_begin_to_differ(program: Program) -> None:
    layer = layer_of(partition(program, Degrees(tensor=2)).program)
    plan = partition(program, Degrees(tensor=2)).program
    assert refused(with_layer(plan, replace(layer, mlp=replace(layer.mlp, enter=None)))).code == "IR009"
    assert refused(with_layer(plan, replace(layer, enter=TENSOR))).code == "IR009"
    norm = replace(layer.input_layernorm, enter=TENSOR)
    assert refused(with_layer(plan, replace(layer, input_layernorm=norm))).code == "IR009"


def test_one_split_matrix_among_whole_ones_is_refused(program: Program) -> None:
    plan = partition(program, Degrees(tensor=2)).program
    layer = layer_of(plan)
    whole = Linear(weight=replace(layer.mlp.gate_proj.weight, splits=()))
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
    plan = partition(program, Degrees(pipeline=2, tensor=2, sequence=True), TRAINING_TABLE)
    for number in range(2):
        verify_program(plan.stage(number))


class TestTraining:
    """Rules of Programs whose tables are cut, and whose tokens are spread between the matrices."""

    @pytest.fixture
    def whole(self, program: Program) -> Program:
        return partition(program, Degrees(tensor=2), TRAINING_TABLE).program

    @pytest.fixture
    def spread(self, program: Program) -> Program:
        return partition(program, Degrees(tensor=2, sequence=True), TRAINING_TABLE).program

    @staticmethod
    def with_end(program: Program, number: int, **changes: Any) -> Program:
        segments = list(program.segments)
        segments[number] = replace(segments[number], block=replace(segments[number].block, **changes))
        return replace(program, segments=tuple(segments))

    def with_head(self, program: Program, **changes: Any) -> Program:
        head: Any = program.segments[-1].block
        return self.with_end(program, -1, lm_head=replace(head.lm_head, **changes))

    @pytest.mark.parametrize("sequence", [False, True])
    def test_a_cut_table_is_reduced(self, whole: Program, spread: Program, sequence: bool) -> None:
        some, other = (spread, TENSOR) if sequence else (whole, TOKENS)
        assert refused(self.with_end(some, 0, reduce=None)).code == "IR009"
        assert refused(self.with_end(some, 0, reduce=other)).code == "IR009"

    def test_a_whole_table_is_not(self, program: Program) -> None:
        assert refused(self.with_end(program, 0, reduce=TENSOR)).code == "IR009"

    @pytest.mark.parametrize("sequence", [False, True])
    def test_the_head_enters_and_gathers(self, whole: Program, spread: Program, sequence: bool) -> None:
        some, other = (spread, TENSOR) if sequence else (whole, TOKENS)
        assert refused(self.with_head(some, gather=None)).code == "IR009"
        assert refused(self.with_head(some, enter=None)).code == "IR009"
        assert refused(self.with_head(some, enter=other)).code == "IR009"

    @pytest.mark.parametrize("sequence", [False, True])
    def test_boundaries_agree_on_the_tokens(self, whole: Program, spread: Program, sequence: bool) -> None:
        some, other = (spread, TENSOR) if sequence else (whole, TOKENS)
        layer = layer_of(some)
        entering = replace(layer, mlp=replace(layer.mlp, enter=other))
        assert refused(with_layer(some, entering)).code == "IR009"
        leaving = replace(layer, mlp=replace(layer.mlp, down_proj=replace(layer.mlp.down_proj, reduce=other)))
        assert refused(with_layer(some, leaving)).code == "IR009"

    def test_partial_stands_exactly_where_tokens_are_spread(self, whole: Program, spread: Program) -> None:
        for some, axis in ((whole, "tensor"), (spread, None)):
            layer = layer_of(some)
            norm = replace(layer.input_layernorm, weight=replace(layer.input_layernorm.weight, partial=axis))
            error = refused(with_layer(some, replace(layer, input_layernorm=norm)))
            assert (error.code, error.where) == ("IR009", "model.layers.0.input_layernorm")

    def test_a_bias_that_is_added_to_spread_tokens_is_partial(self) -> None:
        program = lower(load("preset:tiny", {"model.layer.attention.bias": "all"}))
        spread = partition(program, Degrees(tensor=2, sequence=True), TRAINING_TABLE).program
        verify_program(spread)
        layer = layer_of(spread)
        output = layer.self_attn.o_proj
        assert output.bias is not None
        forgotten = replace(output, bias=replace(output.bias, partial=None))
        error = refused(with_layer(spread, replace(layer, self_attn=replace(layer.self_attn, o_proj=forgotten))))
        assert (error.code, error.where) == ("IR009", "model.layers.0.self_attn.o_proj")

    def test_the_local_tables_are_filled_up(self) -> None:
        odd = lower(load("preset:tiny", {"model.vocab_size": 513, "tokenizer.vocab_size": 513}))
        plan: Plan = partition(odd, Degrees(tensor=4), TRAINING_TABLE)
        assert plan.local.params()["model.embed_tokens.weight"].shape == (129, 64)
        verify_plan(plan)

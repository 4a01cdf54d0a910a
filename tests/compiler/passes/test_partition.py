"""Program → Plan: what is cut, where, and what each rank then has."""

from pathlib import Path
from typing import Any

import pytest

from archwright.compiler.blocks import DecoderLayer, LanguageModelHead, Linear
from archwright.compiler.ir import Block, Boundary, Degrees, Plan, Program
from archwright.compiler.passes import INFERENCE_TABLE, PASSES, TRAINING_TABLE, degrees_of, lower, partition, run_passes
from archwright.compiler.passes import Pass as PassType
from archwright.spec import ArchwrightError, load
from archwright.spec.models import BuildParallel, Parallel, Spec
from tests.parity.strategies import legal_degrees, random_spec


def program_of(heads: int, kv_heads: int, inner: int = 48) -> Program:
    attention = {"kind": "gqa", "heads": heads, "kv_heads": kv_heads, "head_dim": 10}
    ffn = {"kind": "swiglu", "hidden_size": inner}
    return lower(load("preset:tiny", {"model.layer.attention": attention, "model.layer.ffn": ffn, "model.layers": 1}))


TABLES = {
    # degree, kv_heads → the number of pieces of (q, k, v, o, gate, up, down)
    (1, 2): (None,) * 7,
    (2, 2): (2, 2, 2, 2, 2, 2, 2),
    (2, 1): (2, 1, 1, 2, 2, 2, 2),
    (4, 4): (4, 4, 4, 4, 4, 4, 4),
    (4, 2): (4, 2, 2, 4, 4, 4, 4),
    (4, 1): (4, 1, 1, 4, 4, 4, 4),
}
MATRICES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(("degree", "kv_heads"), TABLES)
def test_the_table_of_pieces(degree: int, kv_heads: int) -> None:
    plan = partition(program_of(8, kv_heads), Degrees(tensor=degree))
    params = plan.program.params()
    splits = [params[f"model.layers.0.{name}.weight"].split for name in MATRICES]
    assert tuple(split.parts if split else None for split in splits) == TABLES[degree, kv_heads]
    for name, split in zip(MATRICES, splits, strict=True):
        if split is not None:
            assert (split.mesh_axis, split.degree) == ("tensor", degree)
            assert split.dim == (1 if name.endswith(("o_proj", "down_proj")) else 0)
    whole = {name for name, param in params.items() if param.split is None}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"} <= whole


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_global_sizes_stay_and_local_ones_are_cut(degree: int) -> None:
    program = program_of(8, 2)
    plan = partition(program, Degrees(tensor=degree))
    for name, param in program.params().items():
        assert plan.program.params()[name].shape == param.shape
    local = plan.local.params()
    assert local["model.layers.0.self_attn.q_proj.weight"].shape == (80 // degree, 64)
    assert local["model.layers.0.self_attn.o_proj.weight"].shape == (64, 80 // degree)
    assert local["model.layers.0.self_attn.v_proj.weight"].shape == (20 // min(degree, 2), 64)
    assert local["model.layers.0.mlp.down_proj.weight"].shape == (64, 48 // degree)
    kv_heads = plan.local.states()["model.layers.0.self_attn"]["key"].sizes[1]
    assert kv_heads == max(1, 2 // degree)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "inner", "degree", "axis"),
    [(6, 2, 48, 4, "heads"), (12, 3, 48, 2, "kv_heads"), (8, 2, 50, 4, "ffn")],
)
def test_what_cannot_be_cut_is_refused(heads: int, kv_heads: int, inner: int, degree: int, axis: str) -> None:
    with pytest.raises(ArchwrightError, match="IR001") as caught:
        partition(program_of(heads, kv_heads, inner), Degrees(tensor=degree))
    assert f" {axis} cannot be cut over {degree}" in caught.value.message


@pytest.mark.parametrize("table", [INFERENCE_TABLE, TRAINING_TABLE])
@pytest.mark.parametrize("degrees", [Degrees(), Degrees(sequence=True), Degrees(data_shard=8, context=4, pipeline=1)])
def test_degree_one_changes_nothing(table: Any, degrees: Degrees) -> None:
    program = program_of(8, 2)
    plan = partition(program, degrees, table)
    assert plan.program == program == plan.local


class TestTraining:
    """Tables are cut by rows, the loss over the vocabulary; tokens may be spread between the matrices."""

    TENSOR = Boundary(mesh_axis="tensor")

    @staticmethod
    def plan(sequence: bool, degree: int = 4, **changes: object) -> Plan:
        """A model with every kind of parameter: 91 tokens and 515 positions, which no degree divides."""
        settings: dict[str, object] = {
            "model.vocab_size": 91,
            "tokenizer.vocab_size": 91,
            "model.max_positions": 515,
            "model.positions": {"kind": "learned"},
            "model.layer.norm": {"kind": "layernorm"},
            "model.layer.attention": {"kind": "gqa", "heads": 8, "kv_heads": 2, "head_dim": 10, "bias": "all"},
            "model.layer.ffn": {"kind": "gelu", "hidden_size": 48, "bias": True},
            "model.tied_embeddings": False,
        }
        return partition(
            lower(load("preset:tiny", settings | changes)), Degrees(tensor=degree, sequence=sequence), TRAINING_TABLE
        )

    @pytest.mark.parametrize("degree", [2, 3, 4])
    def test_tables_are_cut_into_equal_pieces(self, degree: int) -> None:
        plan = self.plan(False, degree, **({"model.layer.attention.heads": 9, "model.layer.attention.kv_heads": 3}
                                            if degree == 3 else {}))  # fmt: skip
        for name in ("model.embed_tokens.weight", "model.embed_positions.weight", "lm_head.weight"):
            param = plan.program.params()[name]
            (split,) = param.splits
            assert (split.mesh_axis, split.dim, split.degree, split.parts) == ("tensor", 0, degree, degree)
            rows = 515 if "positions" in name else 91
            assert param.shape == (rows, 64)
            assert plan.local.params()[name].shape == (-(-rows // degree), 64)

    @pytest.mark.parametrize("sequence", [False, True])
    def test_boundaries(self, sequence: bool) -> None:
        plan = self.plan(sequence)
        outside = Boundary(mesh_axis="tensor", tokens=sequence)
        embedding: Any = plan.program.segments[0].block
        assert embedding.embed_tokens.reduce == embedding.embed_positions.reduce == outside
        layer, head = plan.program.segments[1].block, plan.program.segments[-1].block
        assert isinstance(layer, DecoderLayer) and isinstance(head, LanguageModelHead)
        mlp: Any = layer.mlp
        assert layer.self_attn.enter == mlp.enter == outside
        for _, block in plan.program.blocks():
            if isinstance(block, Linear) and block.weight.split is not None:
                assert block.reduce == (outside if block.weight.split.dim == 1 else None)
        assert {layer.self_attn.o_proj.reduce, mlp.fc2.reduce} == {outside}
        # The logits of all tokens are wanted on each rank, so `gather` does not speak of tokens.
        assert (head.lm_head.enter, head.lm_head.gather) == (outside, self.TENSOR)
        assert head.enter is None and head.norm.enter is None

    def test_what_meets_spread_tokens_is_partial(self) -> None:
        """Norms, and the biases that are added once the ranks' parts are summed."""
        found = {name for name, param in self.plan(True).program.params().items() if param.partial == "tensor"}
        layers = [f"model.layers.{number}." for number in range(2)]
        norms = [f"{layer}{norm}." for layer in layers for norm in ("input_layernorm", "post_attention_layernorm")]
        expected = {f"{norm}{leaf}" for norm in (*norms, "model.norm.") for leaf in ("weight", "bias")}
        expected |= {f"{layer}{matrix}.bias" for layer in layers for matrix in ("self_attn.o_proj", "mlp.fc2")}
        assert found == expected
        assert not any(param.partial for param in self.plan(False).program.params().values())

    def test_sequence_needs_several_tensor_ranks(self) -> None:
        assert self.plan(True, 1).program == self.plan(False, 1).program

    def test_inference_leaves_tables_whole(self) -> None:
        program = lower(load("preset:tiny"))
        plan = partition(program, Degrees(tensor=2))
        whole: Block = plan.program.segments[0].block
        assert whole == program.segments[0].block
        assert plan.program.segments[-1].block == program.segments[-1].block


def test_degrees_of_a_section() -> None:
    """The axis that is `auto` fills the world; where that is impossible the degrees multiply to another number."""
    assert degrees_of(Parallel(tensor=2), 8) == Degrees(tensor=2, data_shard=4)
    assert degrees_of(Parallel(tensor=2)) == Degrees(tensor=2)
    assert degrees_of(Parallel(tensor=3), 8).world == 6
    assert degrees_of(Parallel(data_shard=2, data_replicate="auto", context=2), 8) == Degrees(
        data_shard=2, data_replicate=2, context=2
    )
    assert degrees_of(BuildParallel(tensor=4), 8) == Degrees(tensor=4)
    interleaved = Parallel.model_validate({"pipeline": 2, "schedule": {"kind": "interleaved", "stages_per_rank": 3}})
    assert degrees_of(interleaved, 2).stages_per_rank == 3
    assert degrees_of(interleaved.model_copy(update={"pipeline": 1}), 2).stages_per_rank == 1
    assert degrees_of(Parallel(tensor=2, sequence=True, context=2), 4).token_pieces == 8
    assert degrees_of(Parallel(tensor=2, context=2), 4).token_pieces == 4
    assert degrees_of(Parallel(tensor=2, sequence=True), 4).token_pieces == 2


@pytest.mark.parametrize("seed", range(20))
def test_random_plans_keep_every_rule(seed: int, tmp_path: Path) -> None:
    spec = random_spec(seed, tmp_path)
    for degree in legal_degrees(spec):
        for table, sequence in ((INFERENCE_TABLE, False), (TRAINING_TABLE, False), (TRAINING_TABLE, True)):
            plan = run_passes(spec, Degrees(tensor=degree, sequence=sequence), table)
            assert plan.program.num_params() == lower(spec).num_params()


def test_passes_run_in_order_and_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [item.name for item in PASSES] == ["lower", "partition"]

    def spoil(spec: Spec, degrees: Degrees, table: object) -> Program:
        program = lower(spec)
        return Program(segments=program.segments * 2, vocab_size=1, max_positions=1)

    spoiled = (PassType(name="lower", run=spoil), *PASSES[1:])
    monkeypatch.setattr("archwright.compiler.passes.PASSES", spoiled)
    with pytest.raises(ArchwrightError, match="IR005"):
        run_passes(load("preset:tiny"), Degrees())


def test_a_missing_collective_is_found_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    module = import_module("archwright.compiler.passes.partition")
    monkeypatch.setattr(module, "_annotate", lambda block, *rest: block)
    for table in (INFERENCE_TABLE, TRAINING_TABLE):
        with pytest.raises(ArchwrightError, match="IR009"):
            run_passes(load("preset:tiny"), Degrees(tensor=2), table)


def test_the_program_can_be_dumped_after_each_pass() -> None:
    dumps: list[str] = []
    for item in PASSES:
        run_passes(load("preset:tiny"), Degrees(tensor=2), dump_after=item.name, write=dumps.append)
    assert len(dumps) == 2 and "over 2 tensor" not in dumps[0] and "over 2 tensor" in dumps[1]
    with pytest.raises(ArchwrightError, match="IR011"):
        run_passes(load("preset:tiny"), Degrees(), dump_after="fuse")

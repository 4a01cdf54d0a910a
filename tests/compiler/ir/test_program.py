"""Programs, blocks and tables as values."""

import math
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from inspect import isclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archwright.compiler import blocks
from archwright.compiler.ir import Block, Boundary, Degrees, Program, RopeTable, Split
from archwright.compiler.ir.dump import dump_program
from archwright.compiler.passes import TRAINING_TABLE, lower, partition
from archwright.spec import load

BLOCKS = [kind for name in blocks.__all__ if isclass(kind := getattr(blocks, name))]


@pytest.fixture(scope="module")
def program() -> Program:
    return lower(load("preset:tiny"))


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_frozen_keyword_only_values(kind: type[Block]) -> None:
    assert is_dataclass(kind) and issubclass(kind, Block)
    assert kind.__dataclass_params__.frozen and all(f.kw_only for f in fields(kind))  # type: ignore[attr-defined]


def test_a_program_cannot_be_changed_and_hashes(program: Program) -> None:
    for _, block in program.blocks():
        hash(block)
        for f in fields(block):
            with pytest.raises(FrozenInstanceError):
                setattr(block, f.name, None)


def test_a_block_holds_no_name_or_path(program: Program) -> None:
    """Only the names of mesh axes, in boundaries."""

    def fields_of(value: Any, kind: type) -> set[str]:
        return {f.name for f in fields(value) if isinstance(getattr(value, f.name), kind)}

    split = partition(program, Degrees(tensor=2, sequence=True), TRAINING_TABLE).program
    assert not {name for _, block in split.blocks() for name in fields_of(block, str)}
    found = {name for _, block in split.blocks() for name in fields_of(block, Boundary)}
    assert found == {"enter", "reduce", "gather"}


def test_equal_layers_are_equal_values(program: Program) -> None:
    inference = partition(program, Degrees(tensor=2))
    training = partition(program, Degrees(tensor=2, sequence=True), TRAINING_TABLE)
    for some in (program, inference.program, inference.local, training.program, training.local):
        assert some.segments[1].block == some.segments[2].block
        assert len({segment.block for segment in some.segments}) == 3


def test_names_are_those_of_hugging_face(program: Program) -> None:
    layer = ["input_layernorm", "post_attention_layernorm"]
    layer += [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    expected = {f"model.layers.{index}.{name}.weight" for index in range(2) for name in layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert set(program.params()) == expected
    assert program.sites()["lm_head.weight"].name == "model.embed_tokens.weight"
    untied = lower(load("preset:tiny", {"model.tied_embeddings": False}))
    assert set(untied.params()) == expected | {"lm_head.weight"}


def test_states_are_declared_by_layer(program: Program) -> None:
    states = program.states()
    assert list(states) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    key = states["model.layers.0.self_attn"]["key"]
    assert key.axes == ("batch", "kv_heads", "positions", "head_dim") and key.sizes == (0, 2, 0, 16)


def test_pieces_of_a_split_cover_the_tensor() -> None:
    for degree, parts in ((1, 1), (2, 2), (4, 4), (4, 2), (4, 1)):
        split = Split(mesh_axis="tensor", dim=1, degree=degree, parts=parts)
        ranges = [split.slices((3, 8), rank) for rank in range(degree)]
        assert all(first == slice(None) for first, _ in ranges)
        covered = [set(range(8)[second]) for _, second in ranges]
        assert set.union(*covered) == set(range(8))
        assert all(len(part) == 8 // parts for part in covered)
        # Neighbours share: rank r and r + 1 of one group of degree / parts ranks use the same piece.
        assert [split.piece(rank) for rank in range(degree)] == sorted(split.piece(rank) for rank in range(degree))
        assert split.local_shape((3, 8)) == (3, 8 // parts)


@given(rows=st.integers(1, 40), degree=st.integers(1, 12))
def test_pieces_of_a_table_are_equal_and_hold_each_row_once(rows: int, degree: int) -> None:
    """The last pieces may end past the table, or lie past it altogether."""
    split = Split(mesh_axis="tensor", dim=0, degree=degree, parts=degree)
    held = [list(range(rows)[split.slices((rows, 3), rank)[0]]) for rank in range(degree)]
    assert [row for piece in held for row in piece] == list(range(rows))
    size, width = split.local_shape((rows, 3))
    assert width == 3 and size * degree - rows < degree
    for rank, piece in enumerate(held):
        assert piece == [row for row in range(rank * size, (rank + 1) * size) if row < rows]


def test_rope_frequencies_fall_from_one_to_the_root_of_theta() -> None:
    frequencies = RopeTable(head_dim=8, theta=10_000.0, max_positions=16).frequencies()
    assert frequencies == pytest.approx([1, 0.1, 0.01, 0.001])


def test_llama3_scaling_keeps_short_waves_and_divides_long_ones() -> None:
    plain = RopeTable(head_dim=64, theta=500_000.0, max_positions=16)
    scaled = replace(plain, factor=8.0, low=1.0, high=4.0, original_positions=8192)
    for before, after in zip(plain.frequencies(), scaled.frequencies(), strict=True):
        turns = 8192 * before / (2 * math.pi)
        if turns > 4:
            assert after == before
        elif turns < 1:
            assert after == before / 8
        else:
            assert before / 8 < after < before
    ratios = [after / before for before, after in zip(plain.frequencies(), scaled.frequencies(), strict=True)]
    assert ratios == sorted(ratios, reverse=True), "the ramp is monotonic"


def test_tables_that_differ_have_keys_that_differ() -> None:
    table = RopeTable(head_dim=8, theta=500_000.0, max_positions=16)
    scaled = replace(table, factor=8.0)
    others = [
        replace(table, theta=500_000.1), replace(table, head_dim=10), replace(table, max_positions=17), scaled,
        replace(scaled, factor=8.0000001), replace(scaled, low=1.5), replace(scaled, high=4.5),
        replace(scaled, original_positions=4096),
    ]  # fmt: skip
    keys = [other.key for other in (table, *others)]
    assert len(set(keys)) == len(keys)
    assert replace(table).key == table.key


def test_a_dump_shows_equal_layers_once(program: Program) -> None:
    text = dump_program(partition(program, Degrees(tensor=4)).program)
    assert text.splitlines()[0].startswith(f"program: {program.num_params():,} parameters, vocab_size 512, ")
    assert text.count("model.layers.{0..1}: DecoderLayer") == 1 and "model.layers.0" not in text
    assert "weight: [kv_heads 32, embed 64] Normal(std=0.02), kv_heads in 2 parts over 4 tensor ranks" in text
    assert "o_proj: Linear reduce=tensor" in text and "mlp: SwiGLU enter=tensor" in text
    assert text.count("shared as embedding") == 2


def test_a_dump_of_training_shows_tables_boundaries_and_partial_parameters(program: Program) -> None:
    text = dump_program(partition(program, Degrees(tensor=4, sequence=True), TRAINING_TABLE).program)
    assert "weight: [vocab 512, embed 64] Normal(std=0.02), shared as embedding, vocab in 4 parts over 4 " in text
    assert text.count("read for other tokens by each tensor rank") == 3 and "lm_head: Head enter=tensor tokens" in text
    assert "o_proj: Linear reduce=tensor tokens" in text and "mlp: SwiGLU enter=tensor tokens" in text

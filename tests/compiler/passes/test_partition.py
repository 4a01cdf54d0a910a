"""Program → Plan: what is cut, where, and what each rank then has."""

from pathlib import Path

import pytest

from archwright.compiler.ir import Degrees, Program
from archwright.compiler.passes import PASSES, lower, partition, run_passes
from archwright.compiler.passes import Pass as PassType
from archwright.spec import ArchwrightError, load
from archwright.spec.models import Spec
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


def test_degree_one_changes_nothing() -> None:
    program = program_of(8, 2)
    plan = partition(program, Degrees())
    assert plan.program == program == plan.local


@pytest.mark.parametrize("seed", range(20))
def test_random_plans_keep_every_rule(seed: int, tmp_path: Path) -> None:
    spec = random_spec(seed, tmp_path)
    for degree in legal_degrees(spec):
        plan = run_passes(spec, Degrees(tensor=degree))
        assert plan.program.num_params() == lower(spec).num_params()


def test_passes_run_in_order_and_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [item.name for item in PASSES] == ["lower", "partition"]

    def spoil(spec: Spec, degrees: Degrees) -> Program:
        program = lower(spec)
        return Program(segments=program.segments * 2, vocab_size=1, max_positions=1)

    spoiled = (PassType(name="lower", run=spoil), *PASSES[1:])
    monkeypatch.setattr("archwright.compiler.passes.PASSES", spoiled)
    with pytest.raises(ArchwrightError, match="IR005"):
        run_passes(load("preset:tiny"), Degrees())


def test_a_missing_collective_is_found_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    module = import_module("archwright.compiler.passes.partition")
    monkeypatch.setattr(module, "_annotate", lambda block: block)
    with pytest.raises(ArchwrightError, match="IR009"):
        run_passes(load("preset:tiny"), Degrees(tensor=2))


def test_the_program_can_be_dumped_after_each_pass() -> None:
    dumps: list[str] = []
    for item in PASSES:
        run_passes(load("preset:tiny"), Degrees(tensor=2), dump_after=item.name, write=dumps.append)
    assert len(dumps) == 2 and "over 2 tensor" not in dumps[0] and "over 2 tensor" in dumps[1]
    with pytest.raises(ArchwrightError, match="IR011"):
        run_passes(load("preset:tiny"), Degrees(), dump_after="fuse")

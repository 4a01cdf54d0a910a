"""A spec made small keeps what decides how it is built and sharded."""

from pathlib import Path

import pytest

from archwright.compiler.passes import build_plan, degrees_of, lower, run_passes
from archwright.compiler.reduced import reduced
from archwright.spec import Spec, dump, load


def load_again(spec: Spec, folder: Path) -> Spec:
    (folder / "small.yaml").write_text(dump(spec))
    return load(folder / "small.yaml")


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", ["tiny", "llama3.2-1b", "llama3.1-8b", "mixtral-8x7b"])
def test_presets(tmp_path: Path, name: str, degree: int) -> None:
    spec = load(f"preset:{name}", {"build.parallel.tensor": degree})
    small = reduced(spec)
    plan = run_passes(small, degrees_of(small.build.parallel))
    assert plan.program.num_params() < 10_000_000
    assert plan.degrees.tensor == degree
    before, after = spec.model.runs[0].layer.attention, small.model.runs[0].layer.attention
    assert small.model.head_dim(after) == spec.model.head_dim(before)
    assert after.heads // (after.kv_heads or after.heads) == before.heads // (before.kv_heads or before.heads)
    assert small.model.tied_embeddings == spec.model.tied_embeddings
    assert (small.model.num_layers, small.model.hidden_size <= 512, small.model.vocab_size <= 1024) == (2, True, True)
    assert small == load_again(small, tmp_path), "it is a legal spec"


@pytest.mark.parametrize(("heads", "kv_heads", "degree"), [(4, 1, 4), (4, 2, 4), (8, 8, 2), (12, 4, 4), (6, 6, 2)])
def test_key_value_heads_meet_the_degree_as_before(heads: int, kv_heads: int, degree: int) -> None:
    """Split stays split and replicated stays replicated."""
    attention = {"model.layer.attention.heads": heads, "model.layer.attention.kv_heads": kv_heads}
    attention |= {"model.layer.attention.head_dim": 8, "model.layer.ffn.hidden_size": 4096}
    spec = load("preset:tiny", {**attention, "parallel.tensor": 1, "build.parallel.tensor": degree})
    parts = []
    for each in (spec, reduced(spec)):
        program = run_passes(each, degrees_of(each.build.parallel)).program
        split = program.params()["model.layers.0.self_attn.k_proj.weight"].split
        assert split is not None
        parts.append(split.parts == split.degree)
    assert parts[0] == parts[1]


def test_what_is_small_already_stays() -> None:
    spec = load(
        "preset:tiny",
        {"model.layers": 1, "model.vocab_size": 600, "model.max_positions": 200, "build.max_positions": 32},
    )
    small = reduced(spec)
    assert (small.model.num_layers, small.model.vocab_size, small.model.max_positions) == (1, 600, 200)
    assert small.build.max_positions == 32 and lower(small).num_params() <= lower(spec).num_params()


def test_a_mixed_stack_keeps_two_layers_of_each_kind() -> None:
    layer = {
        "norm": {"kind": "rmsnorm"},
        "attention": {"kind": "gqa", "heads": 8, "kv_heads": 4, "position": {"kind": "rope"}},
        "ffn": {"kind": "swiglu", "hidden_size": 4096},
    }
    wide = {**layer, "ffn": {"kind": "swiglu", "hidden_size": 256}}
    runs = [{"repeat": 3, "layer": layer}, {"layer": wide}, {"repeat": 4, "layer": layer}]
    model = {"vocab_size": 600, "hidden_size": 64, "max_positions": 64, "layers": runs}
    small = reduced(Spec.model_validate({"version": 1, "name": "mixed", "model": model}))
    assert [(run.repeat, run.layer.ffn.hidden_size) for run in small.model.runs] == [(2, 1024), (1, 256)]


def test_experts_are_few_and_routed_as_before() -> None:
    moe = {"kind": "moe", "experts": 64, "experts_per_token": 6, "hidden_size": 1408, "shared": {"hidden_size": 2816}}
    spec = load("preset:tiny", {"model.layer.ffn": {**moe, "router": {"score": "sigmoid", "scale": 2.5}}})
    before, after = spec.model.runs[0].layer.ffn, reduced(spec).model.runs[0].layer.ffn
    assert before.kind == after.kind == "moe" and after.shared is not None
    assert (after.experts, after.experts_per_token, after.hidden_size, after.shared.hidden_size) == (6, 6, 256, 1024)
    assert after.router == before.router
    few = reduced(load("preset:mixtral-8x7b")).model.runs[0].layer.ffn
    assert few.kind == "moe" and (few.experts, few.experts_per_token) == (4, 2)


def test_a_pipeline_keeps_a_layer_for_each_stage() -> None:
    settings = {"build.parallel.pipeline": 5, "build.parallel.tensor": 2}
    small = reduced(load("preset:llama3.1-8b", settings))
    assert small.model.num_layers == 5
    assert len(run_passes(small, degrees_of(small.build.parallel)).stages) == 5
    layer = load("preset:tiny").model.layer
    assert layer is not None
    other = layer.model_copy(update={"attention": layer.attention.model_copy(update={"kv_heads": 4})})
    runs = [{"repeat": 6, "layer": layer.model_dump()}, {"repeat": 1, "layer": other.model_dump()}]
    stack = load("preset:tiny", {"model.layer": None, "model.layers": runs, "build.parallel.pipeline": 4})
    assert [run.repeat for run in reduced(stack).model.runs] == [3, 1]


def test_experts_are_as_many_as_the_degree_divides() -> None:
    moe = {"kind": "moe", "experts": 12, "experts_per_token": 2, "hidden_size": 64}
    small = reduced(load("preset:tiny", {"model.layer.ffn": moe, "build.parallel.expert": 3}))
    ffn = small.model.runs[0].layer.ffn
    assert ffn.kind == "moe" and ffn.experts == 6


@pytest.mark.parametrize("degree", [1, 2])
def test_groups_stay_whole(tmp_path: Path, degree: int) -> None:
    """Heads of 64 in groups of 128: one key/value head a rank would be half a group."""
    attention = {"model.layer.attention.heads": 32, "model.layer.attention.kv_heads": 32}
    sizes = {"model.layer.attention.head_dim": 64, "model.layer.ffn.hidden_size": 8192, "model.hidden_size": 2048}
    rules = [{"kind": "int8", "match": "model.layers.9.*"}, {"kind": "int4", "group_size": 128}]
    spec = load(
        "preset:tiny",
        attention
        | sizes
        | {"model.layers": 12, "build.quantize": {"rules": rules}, "build.parallel.tensor": degree, "train": None},
    )
    small = reduced(spec)
    assert small == load_again(small, tmp_path)
    assert small.model.runs[0].layer.attention.heads == 2 * degree
    assert small.build.quantize is not None and len(small.build.quantize.rules) == 1
    scale = build_plan(small).local.params()["model.layers.0.self_attn.o_proj.weight_scale"]
    assert scale.shape == (512, 1)

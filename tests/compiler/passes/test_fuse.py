"""Fused matrices: what they are made of, and that nothing else changes. B batch, S sequence, D hidden, V vocabulary."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from archwright.compiler.blocks import DecoderLayer, FusedAttention, FusedSwiGLU, GroupedQueryAttention
from archwright.compiler.interpreters.numpy_ops import make_cache, run_numpy
from archwright.compiler.interpreters.onnx_dialects import ALL, dialect_of
from archwright.compiler.ir import Degrees, Program, Step
from archwright.compiler.passes import lower, run_passes
from archwright.compiler.passes.fuse import Fused, Part, fold_scale, fuse, fuse_gate_up, fuse_qkv, verify_fused
from archwright.compiler.weights.fused import FusedWeights
from archwright.spec import ArchwrightError, load
from archwright.spec.models import Build
from tests.parity.cases import make_case

ATTENTION = "model.layers.0.self_attn"


def program_of(head_dim: int = 16, **layer: Any) -> Program:
    attention = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": head_dim, "bias": "all"}
    overrides = {f"model.layer.{name}": value for name, value in {"attention": attention, **layer}.items()}
    return lower(load("preset:tiny", {"model.layers": 2, **overrides}))


def layer_of(fused: Fused) -> DecoderLayer:
    block = fused.program.segments[1].block
    assert isinstance(block, DecoderLayer)
    return block


def weights_of(fused: Fused, weights: Any) -> dict[str, np.ndarray[Any, Any]]:
    made = FusedWeights(weights=weights, params=fused.program.params(), parts=fused.weights)
    return {name: made.read(name) for name in made.names()}


def test_the_map_of_queries_keys_and_values() -> None:
    fused = fuse_qkv(program_of())
    attention = layer_of(fused).self_attn
    assert isinstance(attention, FusedAttention)
    assert (attention.num_heads, attention.num_kv_heads, attention.scale) == (4, 2, 0.25)
    assert attention.qkv_proj.weight.shape == (128, 64)
    for kind in ("weight", "bias"):
        parts = [Part(name=f"{ATTENTION}.{name}_proj.{kind}") for name in "qkv"]
        assert fused.weights[f"{ATTENTION}.qkv_proj.{kind}"] == tuple(parts)
    assert len(fused.weights) == 2 * 2
    assert fused.program.num_params() == program_of().num_params()


def test_only_a_power_of_two_is_folded() -> None:
    assert fold_scale(program_of(head_dim=32)).weights == {}
    fused = fold_scale(program_of(head_dim=16))
    attention = layer_of(fused).self_attn
    assert isinstance(attention, GroupedQueryAttention) and attention.scale == 1.0
    assert fused.weights[f"{ATTENTION}.q_proj.bias"] == (Part(name=f"{ATTENTION}.q_proj.bias", scale=0.25),)
    assert fold_scale(fused.program).weights == {}, "it is folded once"


def test_maps_of_passes_are_composed() -> None:
    fused = fuse(program_of(), ALL)
    first, *others = fused.weights[f"{ATTENTION}.qkv_proj.weight"]
    assert first == Part(name=f"{ATTENTION}.q_proj.weight", scale=0.25)
    assert [part.scale for part in others] == [1, 1]
    assert f"{ATTENTION}.q_proj.weight" not in fused.weights
    assert isinstance(layer_of(fused).mlp, FusedSwiGLU)
    assert isinstance(layer_of(fuse_gate_up(program_of())).self_attn, GroupedQueryAttention)
    other = fuse_gate_up(program_of(ffn={"kind": "gelu", "hidden_size": 48}))
    assert other.weights == {}


@pytest.mark.parametrize("fusions", [("scale",), ("qkv",), ("gate_up",), ALL])
def test_the_oracle_computes_the_same(fusions: Any) -> None:
    """Whole sequences and, through a cache, one more token in each row."""
    program = program_of()
    case, fused = make_case(program, 0), fuse(program, fusions)
    plain, joined = case.weights.tensors, weights_of(fused, case.weights)
    wide = {name: tensor.astype(np.float64) for name, tensor in joined.items()}
    expected_BSV = run_numpy(program, plain, case.ids_BS)
    largest = np.abs(expected_BSV).max()
    assert np.abs(run_numpy(fused.program, wide, case.ids_BS) - expected_BSV).max() < 1e-14 * largest
    batch, length = case.ids_BS.shape
    positions_BS = np.broadcast_to(np.arange(length), (batch, length))
    cache = make_cache(fused.program, batch=batch, positions=length)
    zeros_B = np.zeros(batch, np.int64)
    for start, stop in ((0, length - 1), (length - 1, length)):
        step = Step(
            positions_BS=positions_BS[:, start:stop], write_index_B=zeros_B + start, kv_positions_L=np.arange(stop)
        )
        found_BSV = run_numpy(fused.program, wide, case.ids_BS[:, start:stop], step=step, cache=cache)
        assert np.abs(found_BSV - expected_BSV[:, start:stop]).max() < 1e-14 * largest


@pytest.mark.parametrize("degree", [2, 4])
def test_a_rank_fuses_its_own_parts(degree: int) -> None:
    plan = run_passes(load("preset:tiny", {"model.layer.attention.kv_heads": 2}), Degrees(tensor=degree))
    fused = fuse(plan.local, ALL)
    splits = {name: site.param.splits for name, site in plan.program.sites().items()}
    verify_fused(fused, splits)
    attention = layer_of(fused).self_attn
    assert isinstance(attention, FusedAttention)
    assert (attention.num_heads, attention.num_kv_heads) == (4 // degree, 1)
    assert attention.enter == layer_of(Fused(program=plan.local, weights={})).self_attn.enter is not None
    broken = replace(attention, num_kv_heads=2)
    segment = fused.program.segments[1]
    layers = (replace(segment, block=replace(layer_of(fused), self_attn=broken)),)
    program = replace(fused.program, segments=(fused.program.segments[0], *layers, *fused.program.segments[2:]))
    with pytest.raises(ArchwrightError) as caught:
        verify_fused(Fused(program=program, weights=fused.weights), splits)
    assert caught.value.code == "IR008" and caught.value.where == ATTENTION


def test_what_a_build_fuses() -> None:
    def fusions(**build: Any) -> tuple[str, ...]:
        return dialect_of(Build.model_validate(build)).fusions

    assert fusions(fuse="none", target="tensorrt") == ()
    assert fusions(fuse="all") == ALL
    assert fusions(fuse="all", precision="float16") == ("qkv", "gate_up"), "a power of two may lose small numbers there"
    for kind, chosen in (({"kind": "int4"}, ("qkv", "gate_up")), ({"kind": "int8"}, ())):
        assert fusions(target="onnxruntime", quantize={"rules": [{"kind": "keep"}, kind]}) == chosen
        assert fusions(target="portable", quantize={"rules": [kind]}) == ()
        assert fusions(target="tensorrt", quantize={"rules": [kind]}) == ("scale",)
    assert fusions(target="onnxruntime") == ()
    assert "scale" in fusions(target="tensorrt") and "scale" not in fusions(target="tensorrt", precision="float16")

"""Fused matrices of few bits: each row with the bits and scales that it has by itself. D input channels."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_model

from archwright.compiler.blocks import DecoderLayer, FusedAttention, FusedSwiGLU, GroupedQueryAttention, SwiGLU
from archwright.compiler.blocks.quantized import QuantLinear
from archwright.compiler.interpreters.numpy_ops import run_numpy
from archwright.compiler.interpreters.onnx_dialects import ALL, Dialect
from archwright.compiler.interpreters.onnx_ops import NUMPY_DTYPES
from archwright.compiler.interpreters.onnx_quantization import OFFSET
from archwright.compiler.ir import Plan
from archwright.compiler.passes import build_plan, build_program, lower
from archwright.compiler.passes.fuse import Fused, Part, fuse, verify_fused
from archwright.compiler.targets.onnx_graph import export_graphs, graph_path
from archwright.compiler.targets.stages import GraphOptions
from archwright.compiler.weights.awq import folds
from archwright.compiler.weights.fused import FusedWeights
from archwright.compiler.weights.quantized import built_weights
from archwright.compiler.weights.streaming import Weights
from archwright.spec import Spec, load
from tests.parity.cases import make_case

LAYER = "model.layers.0"
JOINED = {
    f"{LAYER}.self_attn.qkv_proj": [f"{LAYER}.self_attn.{name}_proj" for name in "qkv"],
    f"{LAYER}.mlp.gate_up_proj": [f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up")],
}
KINDS: dict[str, dict[str, Any]] = {
    **{f"int4, groups of {size}": {"kind": "int4", "group_size": size} for size in (32, 64, 128)},
    "int8": {"kind": "int8"},
}


def spec_of(*rules: object, tensor: int = 1, **build: object) -> Spec:
    attention = {"kind": "gqa", "heads": 8, "kv_heads": 2, "head_dim": 64, "bias": "qkv"}
    model = {
        "hidden_size": 128,
        "layers": 1,
        "vocab_size": 65,
        "layer.attention": attention,
        "layer.ffn.hidden_size": 512,
    }
    quantized = {"build.quantize": {"rules": list(rules)}, "build.parallel.tensor": tensor}
    more = {f"build.{name}": value for name, value in build.items()}
    sections = {"train": None, "tokenizer": None}
    return load("preset:tiny", {f"model.{name}": value for name, value in model.items()} | sections | quantized | more)


def weights_of(spec: Spec) -> Weights:
    return built_weights(spec, make_case(lower(spec), 0).weights)


def layer_of(fused: Fused) -> DecoderLayer:
    block = fused.program.segments[1].block
    assert isinstance(block, DecoderLayer)
    return block


def parts_of(spec: Spec, plan: Plan, path: str, kind: str, rank: int) -> np.ndarray[Any, Any]:
    """What a rank has of each canonical matrix (or its scales), behind each other."""
    weights, params = weights_of(spec), plan.program.params()
    names = [f"{part}.{kind}" for part in JOINED[path]]
    return np.concatenate([weights.read(name)[params[name].slices({"tensor": rank})] for name in names])


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_their_scales(kind: str, tensor: int) -> None:
    plan = build_plan(spec_of(KINDS[kind], tensor=tensor))
    fused = fuse(plan.local, ALL)
    verify_fused(fused, {name: site.param.splits for name, site in plan.program.sites().items()})
    layer = layer_of(fused)
    assert isinstance(layer.self_attn, FusedAttention) and isinstance(layer.mlp, FusedSwiGLU)
    assert layer.self_attn.scale == 64**-0.5, "it is not folded into scales"
    groups = 128 // KINDS[kind].get("group_size", 128)
    for matrix, rows in ((layer.self_attn.qkv_proj, (8 // tensor + 2 * max(1, 2 // tensor)) * 64),
                         (layer.mlp.gate_up_proj, 2 * 512 // tensor)):  # fmt: skip
        assert isinstance(matrix, QuantLinear) and matrix.weight.storage == KINDS[kind]["kind"]
        assert matrix.weight.shape == (rows, 128) and matrix.weight_scale.shape == (rows, groups)
    for path, names in JOINED.items():
        for each in ("weight", "weight_scale"):
            assert fused.weights[f"{path}.{each}"] == tuple(Part(name=f"{name}.{each}") for name in names)
    assert fused.program.num_params() == plan.local.num_params() and fused.unfused == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_computes_the_same(kind: str) -> None:
    spec = spec_of(KINDS[kind])
    program, weights = build_program(spec), weights_of(spec)
    fused = fuse(program, ALL)
    joined = FusedWeights(weights=weights, params=fused.program.params(), parts=fused.weights)
    ids_BS = np.random.default_rng(0).integers(0, program.vocab_size, (2, 9))
    expected_BSV = run_numpy(program, {name: weights.read(name) for name in weights.names()}, ids_BS)
    found_BSV = run_numpy(fused.program, {name: joined.read(name) for name in joined.names()}, ids_BS)
    assert np.abs(found_BSV - expected_BSV).max() < 1e-14 * np.abs(expected_BSV).max()


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("kind", ["int4, groups of 32", "int8"])
def test_the_files_hold_the_parts_bit_for_bit(kind: str, tensor: int, target: str, tmp_path: Path) -> None:
    """Read by ONNX's own reader: none of the map that put the parts together."""
    spec = spec_of(KINDS[kind], tensor=tensor, precision="bfloat16")
    plan, options = build_plan(spec), GraphOptions(dialect=Dialect(target=target, fusions=ALL))
    export_graphs(plan, weights_of(spec), tmp_path, precision="bfloat16", capacity=16, options=options)
    for rank in range(tensor):
        path = graph_path(tmp_path, rank)
        model = onnx.load(path, load_external_data=False)
        load_external_data_for_model(model, str(path.parent))
        found = {tensor.name.removesuffix(".T"): as_written(tensor) for tensor in model.graph.initializer}
        for joined in JOINED:
            matrix, scale = (parts_of(spec, plan, joined, each, rank) for each in ("weight", "weight_scale"))
            rows, columns = matrix.shape
            turned = found[f"{joined}.weight"].shape == (columns, rows)
            assert turned is (target == "portable" or kind == "int8")
            for expected, each in ((matrix, "weight"), (scale, "weight_scale")):
                expected = expected.T if turned else expected
                assert found[f"{joined}.{each}"].tobytes() == np.ascontiguousarray(expected).tobytes(), each


def as_written(tensor: TensorProto) -> np.ndarray[Any, Any]:
    """The values of an initializer; those of MatMulNBits [out, groups, bytes] as [out, in] again."""
    array = onnx.numpy_helper.to_array(tensor)
    if tensor.data_type == TensorProto.UINT8:
        nibbles = np.stack([array & 15, array >> 4], axis=-1)
        return (nibbles.reshape(len(array), -1).astype(np.int8) - OFFSET).astype(np.int8)
    return array.astype(NUMPY_DTYPES[tensor.data_type]) if tensor.data_type == TensorProto.INT4 else array  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"kind": "keep", "match": "*.k_proj"}, "not stored alike"),
        ({"kind": "int8", "match": "*.k_proj"}, "not stored alike"),
        ({"kind": "int4", "group_size": 64, "match": "*.k_proj"}, "not stored alike"),
        ({"kind": "fp8", "match": "*.self_attn.*"}, "rounds its inputs"),
    ],
)
def test_what_is_not_alike_stays_as_it_is(rule: dict[str, Any], reason: str) -> None:
    program = build_program(spec_of(rule, KINDS["int4, groups of 32"]))
    fused = fuse(program, ALL)
    layer = layer_of(fused)
    assert isinstance(layer.self_attn, GroupedQueryAttention) and isinstance(layer.mlp, FusedSwiGLU)
    (path, why), *others = fused.unfused.items()
    assert path == f"{LAYER}.self_attn" and not others
    assert why.startswith("q_proj, k_proj, v_proj: ") and reason in why
    other = fuse(build_program(spec_of({"kind": "int8", "match": "*.up_proj"}, KINDS["int4, groups of 32"])), ALL)
    assert isinstance(layer_of(other).mlp, SwiGLU) and list(other.unfused) == [f"{LAYER}.mlp"]


def test_what_becomes_one_matrix_has_one_scaling_by_awq() -> None:
    """The multipliers of input channels are in the matrices before they are rounded: equal where one input is read."""
    rules = [{"kind": "int4", "group_size": 32, "method": "awq"}]
    spec = spec_of(*rules)
    assert spec.build.quantize is not None
    program = build_program(spec)
    readers = [set(fold.readers) for fold in folds(program, spec.build.quantize)]
    parts = fuse(program, ALL).weights
    for path, names in JOINED.items():
        assert {part.name.rpartition(".")[0] for part in parts[f"{path}.weight"]} == set(names)
        assert set(names) in readers
    half = spec_of({**KINDS["int4, groups of 32"], "match": "*.q_proj"}, *rules)
    assert half.build.quantize is not None
    assert set(JOINED[f"{LAYER}.self_attn.qkv_proj"]) in [
        set(fold.readers) for fold in folds(build_program(half), half.build.quantize)
    ], "also where only some of them ask for it"

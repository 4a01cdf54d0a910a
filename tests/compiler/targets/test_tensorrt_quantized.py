"""TensorRT for RTX builds graphs with matrices of few bits; it needs no GPU."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from archwright.compiler.passes import build_plan, lower
from archwright.compiler.targets.network_check import planned_network
from archwright.compiler.targets.onnx_graph import export_graphs
from archwright.compiler.targets.tensorrt_engine import build_engine, default_profiles
from archwright.compiler.weights.quantized import built_weights
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import Spec, load

SIZES = {
    "model.layers": 1,
    "model.hidden_size": 128,
    "model.layer.attention.head_dim": 64,
    "model.layer.ffn.hidden_size": 256,
    "model.max_positions": 64,
    "build.max_positions": 64,
    "model.tied_embeddings": False,
    "train": None,
    "tokenizer": None,
}
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "int4 32": ({"build.precision": "float16"}, [{"kind": "int4", "group_size": 32}]),
    "int4 64": ({"build.precision": "bfloat16"}, [{"kind": "int4", "group_size": 64, "match": "*"}]),
    "int4 128": ({"build.precision": "float16"}, [{"kind": "int4", "group_size": 128}]),
    "int8": ({"build.precision": "bfloat16"}, [{"kind": "int8", "match": "*"}]),
    "fp8": (
        {"build.precision": "float16"},
        [{"kind": "fp8", "match": "model.layers.*"}, {"kind": "fp8", "match": "lm_head"}],
    ),
    "experts": (
        {"build.precision": "float16", "model.layer.ffn": {"kind": "moe", "experts": 4, "hidden_size": 128}},
        [{"kind": "int8", "match": "*.experts"}, {"kind": "int4", "group_size": 64}],
    ),
    "tied": (
        {"build.precision": "float32", "model.tied_embeddings": True},
        [{"kind": "int8", "match": "model.embed_tokens"}, {"kind": "int4", "group_size": 64}],
    ),
}
MATRICES = 7
"""Of the layer."""


@pytest.fixture(scope="session")
def trt() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def graph_of(spec: Spec, folder: Path) -> Path:
    source = GeneratedWeights(params=lower(spec).params(), seed=0)
    export_graphs(build_plan(spec), built_weights(spec, source), folder, precision=spec.build.precision, capacity=64)
    return folder / "rank0" / "stage0.onnx"


def engine_of(trt: ModuleType, spec: Spec, graph: Path) -> Any:
    planned = planned_network(build_plan(spec), precision=spec.build.precision, capacity=64)
    return build_engine(graph, default_profiles(spec.build, 64), spec.build.engine, planned, library=trt)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_each_kind_builds(trt: ModuleType, tmp_path: Path, name: str, tensor: int) -> None:
    overrides, rules = CASES[name]
    spec = load(
        "preset:tiny", SIZES | overrides | {"build.quantize": {"rules": rules}, "build.parallel.tensor": tensor}
    )
    layers = engine_of(trt, spec, graph_of(spec, tmp_path)).layers
    if name == "fp8":
        assert (layers["QUANTIZE"], layers["DEQUANTIZE"]) == (MATRICES + 1, 2 * (MATRICES + 1))
    elif name in ("int4 32", "int4 128"):
        assert layers["DEQUANTIZE"] == MATRICES and "QUANTIZE" not in layers


@pytest.mark.parametrize("capability", [8.9, 12.0])
def test_fp8_builds_for_the_gpus_that_have_it(trt: ModuleType, tmp_path: Path, capability: float) -> None:
    overrides, rules = CASES["fp8"]
    chosen = {"build.quantize": {"rules": rules}, "build.engine.compute_capabilities": [capability]}
    spec = load("preset:tiny", SIZES | overrides | chosen)
    engine = engine_of(trt, spec, graph_of(spec, tmp_path))
    assert engine.num_bytes > 0 and engine.facts["compute_capabilities"] == [str(capability)]

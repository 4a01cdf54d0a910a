"""Graphs of target tensorrt: what TensorRT for RTX makes of them, and what the check of the network finds."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest

from archwright.compiler.passes import degrees_of, run_passes
from archwright.compiler.targets.network_check import planned_network
from archwright.compiler.targets.onnx_graph import export_graphs, graph_path
from archwright.compiler.targets.stages import graph_options
from archwright.compiler.targets.tensorrt_engine import build_engine, default_profiles
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import ArchwrightError, Spec
from tests.compiler.targets import covering

MASKED = {"llama3.1-8b": 0, "qkv biases, window": 2, "experts": 0}
"""Model → attentions that do not read lengths, but have a mask. The covering set builds many more."""


@pytest.fixture
def trt() -> Any:
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install archwright[tensorrt-rtx]")
    import tensorrt_rtx

    return tensorrt_rtx


def write(spec: Spec, folder: Path) -> tuple[Path, Any]:
    """The last rank's graph, and what is planned of its network."""
    plan = run_passes(spec, degrees_of(spec.build.parallel))
    weights = GeneratedWeights(params=plan.program.params(), seed=0)
    form: dict[str, Any] = {
        "precision": spec.build.precision, "capacity": spec.model.max_positions, "options": graph_options(spec.build)
    }  # fmt: skip
    export_graphs(plan, weights, folder, **form)
    return graph_path(folder, plan.degrees.world - 1), planned_network(plan, **form)


def spec_of(name: str, weights: str, tensor: int, fuse: str) -> Spec:
    return covering.spec_of((name, weights, "tensorrt", str(tensor), "1", "1", "dense", fuse, "all"))


@pytest.mark.heavy
@pytest.mark.parametrize("name", MASKED)
def test_it_is_built(trt: Any, tmp_path: Path, name: str) -> None:
    spec = spec_of(name, "bfloat16", 2, "all")
    graph, planned = write(spec, tmp_path)
    assert planned.attentions - planned.with_lengths == MASKED[name]
    profiles = default_profiles(spec.build, spec.model.max_positions)
    layers = build_engine(graph, profiles, spec.build.engine, planned, library=trt).layers
    assert layers["ATTENTION_INPUT"] == spec.model.num_layers
    assert layers["KV_CACHE_UPDATE"] == 2 * spec.model.num_layers


def lengths_too_late(node: onnx.NodeProto) -> None:
    """At the place where the layer has them, which is not where the operator does."""
    node.input.insert(5, "")


def no_lengths(node: onnx.NodeProto) -> None:
    del node.input[5:]


@pytest.mark.parametrize("change", [lengths_too_late, no_lengths])
def test_lengths_that_the_parser_drops_are_noticed(trt: Any, tmp_path: Path, change: Any) -> None:
    spec = spec_of("llama3.2-1b", "float16", 1, "none")
    graph, planned = write(spec, tmp_path)
    model = onnx.load(graph, load_external_data=False)
    change(next(node for node in model.graph.node if node.op_type == "TRT_Attention"))
    graph.write_bytes(model.SerializeToString())
    profiles = default_profiles(spec.build, spec.model.max_positions)
    with pytest.raises(ArchwrightError) as caught:
        build_engine(graph, profiles, spec.build.engine, planned, library=trt)
    assert caught.value.code == "BUILD031"
    assert "1 attentions read the lengths of their rows, planned are 2" in caught.value.message

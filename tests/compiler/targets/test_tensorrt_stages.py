"""TensorRT for RTX parses and builds every stage of a pipeline, and ranks that share experts, on specs made small."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from archwright.compiler.passes import degrees_of, run_passes
from archwright.compiler.reduced import reduced
from archwright.compiler.targets.network_check import planned_network
from archwright.compiler.targets.onnx_graph import export_graphs, graph_path
from archwright.compiler.targets.stages import gathered_values, graph_options
from archwright.compiler.targets.tensorrt_engine import build_engine, default_profiles
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import load

CASES = [
    ("llama3.2-1b", {"precision": "bfloat16", "parallel": {"pipeline": 2}, "logits": "last"}, [0, 0]),
    ("llama3.1-8b", {"precision": "float16", "parallel": {"pipeline": 3, "tensor": 2}}, [2, 2, 2]),
    ("mixtral-8x7b", {"precision": "bfloat16", "parallel": {"expert": 2}}, [2]),
    (
        "mixtral-8x7b",
        {"precision": "float16", "parallel": {"expert": 2, "tensor": 2}, "moe": {"kind": "gathered"}},
        [4],
    ),
    ("mixtral-8x7b", {"precision": "float32", "parallel": {"pipeline": 2}, "moe": {"kind": "gathered"}}, [0, 0]),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("preset", "build", "collectives"), CASES)
def test_every_stage_is_built(preset: str, build: dict[str, object], collectives: list[int], tmp_path: Path) -> None:
    """The last rank of each stage; collectives: of each stage, attention's and the feed-forward's or the experts'."""
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install archwright[tensorrt-rtx]")
    import tensorrt_rtx  # where the wheel is installed and broken, this is a failure and no skip

    settings = {f"build.{name}": value for name, value in build.items()}
    spec = reduced(load(f"preset:{preset}", {**settings, "build.max_batch": 2}))
    plan, options = run_passes(spec, degrees_of(spec.build.parallel)), graph_options(spec.build)
    weights = GeneratedWeights(params=plan.program.params(), seed=0)
    precision, capacity = spec.build.precision, spec.model.max_positions
    export_graphs(plan, weights, tmp_path, precision=precision, capacity=capacity, options=options)
    profiles = default_profiles(spec.build, capacity, token_bytes=4 * gathered_values(spec))
    found = []
    for stage in range(len(plan.stages)):
        rank = plan.stage_ranks(stage)[-1]
        planned = planned_network(plan, precision=precision, capacity=capacity, stage=stage, options=options)
        graph = graph_path(tmp_path, rank, stage)
        layers = build_engine(graph, profiles, spec.build.engine, planned, library=tensorrt_rtx).layers
        found.append(layers.get("DIST_COLLECTIVE", 0))
        assert layers["ATTENTION_INPUT"] * 2 == layers["KV_CACHE_UPDATE"] == len(planned.caches)
    assert found == collectives

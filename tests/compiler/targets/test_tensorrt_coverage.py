"""TensorRT for RTX builds every kind of block in every precision at degrees 1, 2 and 4, on specs made small.

It needs no GPU. Where its wheel installs, this test lists what was built and fails unless that is everything; elsewhere
it is a visible skip.
"""

from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest

from archwright.compiler.passes import degrees_of, run_passes
from archwright.compiler.reduced import reduced
from archwright.compiler.targets.network_check import planned_network
from archwright.compiler.targets.onnx_graph import export_graphs, graph_path
from archwright.compiler.targets.tensorrt_engine import build_engine, default_profiles
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import ArchwrightError, Spec, load

PRECISIONS = ("float32", "float16", "bfloat16")
DEGREES = (1, 2, 4)
SIZES = {"vocab_size": 2000, "hidden_size": 768, "max_positions": 2048}
ROPE: dict[str, Any] = {"kind": "rope", "theta": 500_000.0}
WINDOW = {"kind": "window", "size": 256}


BARE_LAYERNORM = {"kind": "layernorm", "bias": False}
GPT2_FFN = {"kind": "gelu", "bias": True, "approximation": "tanh"}


def layer(ffn: str | dict[str, Any], norm: str | dict[str, Any], **attention: Any) -> dict[str, Any]:
    return {
        "norm": {"kind": norm} if isinstance(norm, str) else norm,
        "attention": {"kind": "gqa", "heads": 12, "head_dim": 64, "position": ROPE, **attention},
        "ffn": {"hidden_size": 3072, **({"kind": ffn} if isinstance(ffn, str) else ffn)},
    }


MOE = {"kind": "moe", "experts": 16, "experts_per_token": 3, "shared": {"hidden_size": 3072}}
SIGMOID = {"score": "sigmoid", "scale": 2.5}

MODELS: dict[str, dict[str, Any]] = {
    "gpt-2": {
        "layers": 12,
        "layer": layer(GPT2_FFN, "layernorm", bias="all", position={"kind": "none"}),
        "positions": {"kind": "learned"},
        "tied_embeddings": True,
    },
    "qkv biases, window": {"layers": 4, "layer": layer("swiglu", "rmsnorm", kv_heads=4, bias="qkv", mask=WINDOW)},
    "one key/value head": {"layers": 4, "layer": layer("swiglu", BARE_LAYERNORM, kv_heads=1)},
    "experts": {"layers": 4, "layer": layer({**MOE, "router": SIGMOID}, "rmsnorm", kv_heads=4)},
    "mixed stack": {
        "layers": [
            {"repeat": 5, "layer": layer("swiglu", "rmsnorm", kv_heads=4, mask=WINDOW)},
            {"repeat": 1, "layer": layer("gelu", "rmsnorm", kv_heads=4, position={"kind": "none"})},
        ]
    },
}
PRESETS = ("preset:llama3.1-8b", "preset:llama3.2-1b", "preset:mixtral-8x7b")
LISTED = "listed: what TensorRT for RTX built, with attention/cache/collective layers"
COVERING = [*PRESETS, *MODELS]


def small(name: str, precision: str, degree: int) -> Spec:
    """The reduced spec of one member of the covering set."""
    if name in PRESETS:
        return reduced(load(name, {"build.precision": precision, "build.parallel.tensor": degree}))
    fields = {"version": 1, "name": "covering", "model": SIZES | MODELS[name]}
    build = {"precision": precision, "parallel": {"tensor": degree}}
    return reduced(Spec.model_validate(fields | {"build": build}))


def build_small(trt: Any, spec: Spec, folder: Any) -> dict[str, int]:
    """Layers of the last rank's network, which was checked against its plan and built."""
    plan = run_passes(spec, degrees_of(spec.build.parallel))
    weights = GeneratedWeights(params=plan.program.params(), seed=0)
    capacity = spec.model.max_positions
    export_graphs(plan, weights, folder, precision=spec.build.precision, capacity=capacity)
    graph = graph_path(folder, plan.degrees.world - 1)
    planned = planned_network(plan, precision=spec.build.precision, capacity=capacity)
    profiles = default_profiles(spec.build, capacity)
    return dict(build_engine(graph, profiles, spec.build.engine, planned, library=trt).layers)


@pytest.mark.heavy
def test_the_covering_set_is_built(tmp_path, record_property):
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install archwright[tensorrt-rtx]")
    import tensorrt_rtx  # where the wheel is installed and broken, this is a failure and no skip

    built: dict[str, list[str]] = {}
    failed = []
    for number, (name, precision, degree) in enumerate(product(COVERING, PRECISIONS, DEGREES)):
        try:
            layers = build_small(tensorrt_rtx, small(name, precision, degree), tmp_path / str(number))
        except ArchwrightError as error:
            failed.append(f"{name}, {precision}, degree {degree}: {error}")
        else:
            counts = f"{layers['ATTENTION_INPUT']}/{layers['KV_CACHE_UPDATE']}/{layers.get('DIST_COLLECTIVE', 0)}"
            built.setdefault(f"{name}, {precision}", []).append(f"{degree} ({counts})")
    lines = [f"{title}: degree {', '.join(each)}" for title, each in built.items()]
    record_property(LISTED, "\n".join(lines))
    assert not failed, "\n".join(failed)
    assert sum(map(len, built.values())) == len(COVERING) * len(PRECISIONS) * len(DEGREES) > 0

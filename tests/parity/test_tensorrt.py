"""TensorRT for RTX parses and builds graphs of random specs, at the largest degree that each can be split into.

The covering set stands in tests/compiler/targets; here are the odd sizes: heads of 3 and of 18, widths of 17, windows
of one token, 8 ranks.
"""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from archwright.compiler.ir import Degrees
from archwright.compiler.passes import run_passes
from archwright.compiler.targets.network_check import planned_network
from archwright.compiler.targets.onnx_graph import export_graphs, graph_path
from archwright.compiler.targets.tensorrt_engine import build_engine, default_profiles
from archwright.spec import Spec
from tests.parity.cases import make_case
from tests.parity.conftest import Record
from tests.parity.strategies import features, legal_degrees, random_spec
from tests.parity.test_differential import NUM_SPECS

NUM_BUILDS = 3
PRECISIONS = ("float32", "float16", "bfloat16")
WANTED = {
    "odd head_dim", "odd hidden size", "window inside the sequences", "window of one token", "learned positions",
    "gelu", "gelu by tanh", "layernorm", "layernorm with bias", "biases on q, k, v, o", "mixed stack", "8 ranks",
}  # fmt: skip


def chosen(folder: Path) -> list[Spec]:
    """The first specs that each show something new, then others. Of two layers and more: on one layer in half precision
    the compiler of TensorRT for RTX 1.7.1 fails with heads of 20."""
    specs = [random_spec(seed, folder) for seed in range(NUM_SPECS)]
    specs = [spec for spec in specs if spec.model.num_layers > 1]
    picked: list[Spec] = []
    missing = set(WANTED)
    for spec in sorted(specs, key=lambda spec: -sum(features(spec)[name] for name in WANTED)):
        if len(picked) < NUM_BUILDS and (missing & shown(spec) or not missing):
            picked.append(spec)
            missing -= shown(spec)
    return picked


def shown(spec: Spec) -> set[str]:
    return {name for name, has in features(spec).items() if has}


@pytest.mark.heavy
def test_random_specs_are_built(tmp_path: Path, record: Record) -> None:
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install archwright[tensorrt-rtx]")
    import tensorrt_rtx  # where the wheel is installed and broken, this is a failure and no skip

    built = Counter[str]()
    specs = chosen(tmp_path)
    for number, spec in enumerate(specs):
        degree, precision = legal_degrees(spec)[-1], PRECISIONS[number % len(PRECISIONS)]
        plan, capacity = run_passes(spec, Degrees(tensor=degree)), spec.model.max_positions
        folder = tmp_path / str(number)
        export_graphs(plan, make_case(plan.program, 0).weights, folder, precision=precision, capacity=capacity)
        planned = planned_network(plan, precision=precision, capacity=capacity)
        profiles = default_profiles(spec.build, capacity)
        graph = graph_path(folder, degree - 1)
        summary = build_engine(graph, profiles, spec.build.engine, planned, library=tensorrt_rtx)
        assert summary.layers["ATTENTION_INPUT"] == spec.model.num_layers
        built[precision] += 1
    assert built == dict.fromkeys(PRECISIONS, NUM_BUILDS // len(PRECISIONS))
    assert set.union(*map(shown, specs)) >= WANTED

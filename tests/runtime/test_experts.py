"""Models with experts are built, verified and bisected like any other."""

from pathlib import Path

import onnx
import pytest

from archwright.compiler.passes import lower
from archwright.compiler.weights.folder import weight_tensors, write_model_folder
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.runtime.bisection import bisect
from archwright.spec import dump, load
from archwright.spec.cli import main

MOE = {"kind": "moe", "experts": 5, "experts_per_token": 2, "hidden_size": 48, "shared": {"hidden_size": 32}}
LAYER = {"attention": {"kind": "gqa", "heads": 4, "kv_heads": 2}, "ffn": {"kind": "gelu", "hidden_size": 64}}
STACK = [{"layer": {**LAYER, "ffn": MOE}}, {"layer": LAYER}]
MODEL: dict[str, object] = {"model.layer": None, "model.layers": STACK, "build.max_positions": 64}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    build = {"build.precision": request.param, "build.parallel.tensor": 2, "build.weights": {"kind": "generated"}}
    (folder / "spec.yaml").write_text(dump(load("preset:tiny", {**MODEL, **build})))
    assert main(["build", str(folder / "spec.yaml"), "--to", "onnx", "-o", str(folder / "artifact")]) == 0
    return folder / "artifact"


def test_an_artifact_is_verified_and_inspected(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifact)]) == 0
    assert main(["inspect", str(artifact)]) == 0
    assert "model.layers.0.mlp.experts.down_proj  [5, 64, 24]" in capsys.readouterr().out
    found = bisect(artifact)
    assert found.ok and 0 < found.largest_error < found.tolerance


def test_a_broken_graph_is_traced_to_its_experts(artifact: Path) -> None:
    """The experts' numbers in another order, as a slip in the exporter would have it; undone at the end."""
    path = artifact / "rank0" / "stage0.onnx"
    good = path.read_bytes()
    model = onnx.load_from_string(good)
    numbers = next(tensor for tensor in model.graph.initializer if tensor.name == "experts/5")
    numbers.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(numbers)[::-1].copy(), "experts/5"))
    path.write_bytes(model.SerializeToString())
    try:
        first = bisect(artifact).first
    finally:
        path.write_bytes(good)
    assert first is not None and first.name == "model.layers.0.mlp.experts/all_reduce"
    assert (first.block, first.spec_path) == ("Experts", "model.layers[0].layer.ffn.experts")


def test_a_model_folder_is_bisected_in_torch(tmp_path: Path) -> None:
    spec = load("preset:tiny", MODEL)
    program = lower(spec)
    weights = GeneratedWeights(params=program.params(), seed=0)
    folder = tmp_path / "model"
    write_model_folder(folder, spec, weight_tensors(program, weights, "float32"), [], details={})
    assert not (folder / "config.json").exists(), "of no family whose files we write"
    found = bisect(folder)
    assert found.ok and found.target.startswith("PyTorch")

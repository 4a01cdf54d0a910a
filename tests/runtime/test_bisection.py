"""`verify --bisect` names the operation that was broken, and where it comes from; with nothing broken it finds nothing.

B batch, S sequence, N heads, H head_dim.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from archwright.compiler.interpreters.numpy_ops import NumpyOps
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.module import compile_module
from archwright.runtime import verification
from archwright.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from archwright.runtime.bisection import Difference, bisect
from archwright.spec import ArchwrightError
from archwright.spec.cli import main
from archwright.spec.manifest import write_manifest


def edit(folder: Path, change: Callable[[onnx.GraphProto], None], *, rank: int = 0) -> None:
    path = folder / f"rank{rank}" / "stage0.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(each for each in graph.node if each.name == name)


def first(path: Path) -> Difference:
    found = bisect(path).first
    assert found is not None
    return found


def written(difference: Difference) -> str:
    """The line of YAML that a difference points at."""
    file, _, line = difference.spec_line.rpartition(":")
    return Path(file).read_text().splitlines()[int(line) - 1].strip()


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda source: Path(shutil.copytree(source, tmp_path / "copy"))


def test_a_good_artifact(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifact), "--bisect", "--output-format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["first"]) == (True, None)
    assert found["calls"] == ["prefill", *(f"decode step {n}" for n in (1, 2, 3, 4)), "end of the cache"]
    # Embedding, 22 a layer, norm and head, and the logits; in 6 calls.
    assert (found["num_operations"], found["num_compared"]) == (48, 288)
    assert 0 < found["largest_error"] < found["tolerance"] == 2e-5
    assert main(["verify", str(artifact), "--bisect"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("no difference: 288 results of 48 operations agree") and "ONNX Runtime" in printed


@pytest.mark.parametrize(("precision", "degree"), [("float32", 2), ("bfloat16", 4), ("float16", 2)])
def test_good_artifacts_on_several_ranks(
    build_artifact: Callable[..., Path], model_folder: Path, precision: str, degree: int
) -> None:
    """Four ranks share two key/value heads; values that a sum gave to all ranks are compared once."""
    path = build_artifact(model_folder, {"build.precision": precision, "build.parallel.tensor": degree})
    found = bisect(path)
    assert found.ok and found.largest_error > 0
    assert found.num_compared == 6 * ((48 - 4 - 1) * degree + 4 + 1)


def test_a_good_model_and_a_good_run(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    step = run / "checkpoints" / "step-00000009"
    step.mkdir(parents=True)
    shutil.copy(model_folder / "spec.yaml", run / "spec.yaml")
    shutil.copy(model_folder / "model.safetensors", step / "model.safetensors")
    write_manifest(step, kind="run", spec=None, details={})
    for path in (model_folder, run):
        assert main(["verify", str(path), "--bisect"]) == 0
        assert "288 results of 48 operations" in capsys.readouterr().out
    assert bisect(run).target.startswith("PyTorch")


def test_operations_are_called_alike_everywhere(two_ranks: Path, model_folder: Path) -> None:
    """The name of an operation is that of its ONNX node, and its path is the torch module's."""
    from archwright.compiler.ir import Degrees
    from archwright.compiler.passes import run_passes
    from archwright.compiler.targets.stages import DEFAULT_OPTIONS
    from archwright.runtime.recorded_runs import LOGITS, operation_names
    from archwright.spec import load

    spec = load(two_ranks / "spec.yaml")
    (stage,) = operation_names(run_passes(spec, Degrees(tensor=2)), spec, DEFAULT_OPTIONS)
    names = (*stage, LOGITS)
    assert names[:4] == (
        "model.embed_tokens/embed",
        "model.layers.0.input_layernorm/rms_norm",
        "model.layers.0.self_attn.q_proj/linear",
        "model.layers.0.self_attn/split_heads",
    )
    assert "model.layers.1.mlp.down_proj/all_reduce" in names and "model.layers.1/add_2" in names
    graph = onnx.load(two_ranks / "rank1" / "stage0.onnx", load_external_data=False).graph
    assert set(names) <= {each.name for each in graph.node}
    modules = {path for path, _ in compile_module(model_folder).named_modules()}
    assert {name.rpartition("/")[0] for name in names} <= modules


def test_a_changed_attention_scale(artifact: Path, copy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def enlarge(graph: onnx.GraphProto) -> None:
        (scale,) = (a for a in node(graph, "model.layers.0.self_attn/attention").attribute if a.name == "scale")
        scale.f *= 1.01

    path = copy(artifact)
    edit(path, enlarge)
    assert main(["verify", str(path), "--bisect"]) == 1
    printed = capsys.readouterr()
    assert "rank0/stage0.onnx: its SHA-256 differs" in printed.err
    assert "VERIFY007 `model.layers.0.self_attn/attention` is the first" in printed.err
    line = (path / "spec.yaml").read_text().splitlines().index("    attention:") + 1
    for text in (
        "first difference: model.layers.0.self_attn/attention\n",
        "call     prefill\n",
        "shape    [3, 4, 24, 8]\n",
        "block    GroupedQueryAttention, ",
        "blocks/attention.py:",
        f"spec     {path}/spec.yaml:{line}: model.layer.attention\n",
        "before   model.layers.0.self_attn/value_visible agrees\n",
    ):
        assert text in printed.out


def test_the_rank_that_differs(two_ranks: Path, copy: Any) -> None:
    """Rank 1 rotates by the wrong tables; its four query heads are compared with the oracle's last four."""

    def swap(graph: onnx.GraphProto) -> None:
        inputs = node(graph, "model.layers.1.self_attn.position/rope_2").input
        inputs[1], inputs[2] = inputs[2], inputs[1]

    path = copy(two_ranks)
    edit(path, swap, rank=1)
    found = first(path)
    assert (found.name, found.rank) == ("model.layers.1.self_attn.position/rope_2", 1)
    assert found.shape == found.found == (3, 1, 24, 8)
    assert found.spec_path == "model.layer.attention.position" and written(found).startswith("position:")
    assert found.block == "Rope" and "position.py" in found.source


def test_a_value_that_the_graph_lacks(artifact: Path, copy: Any) -> None:
    def rename(graph: onnx.GraphProto) -> None:
        gate = node(graph, "model.layers.0.mlp/silu")
        gate.output[0] = node(graph, "model.layers.0.mlp/mul").input[0] = "gated"

    path = copy(artifact)
    edit(path, rename)
    found = bisect(path)
    assert found.first is not None
    assert (found.first.name, found.first.found) == ("model.layers.0.mlp/silu", None)
    assert found.first.spec_path == "model.layer.ffn" and written(found.first) == "ffn:"
    assert "found no such value" in found.as_text()
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["first"]["error"] is None


def test_a_graph_that_does_not_run(artifact: Path, copy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Its operators fit together when the session is opened, and fail on the first step."""

    def reshape(graph: onnx.GraphProto) -> None:
        sizes = next(each for each in graph.initializer if each.name == "int64/0_0_-1_8")
        sizes.CopyFrom(onnx.numpy_helper.from_array(np.array([7, 0, -1, 8]), sizes.name))

    path = copy(artifact)
    edit(path, reshape)
    assert main(["verify", str(path), "--bisect"]) == 1
    assert f"{path}: VERIFY007 the graphs cannot be run: " in capsys.readouterr().err


def without_eps(ops: Any, x_BSD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    return x_BSD * torch.rsqrt(x_BSD.square().mean(-1, keepdim=True) + 2 * eps) * weight_D


def test_a_norm_with_another_eps(write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model({"model.layer.norm.eps": 1e-3})
    monkeypatch.setattr(TorchOps, "rms_norm", without_eps)
    found = first(path)
    assert found.name == "model.layers.0.input_layernorm/rms_norm"
    assert (found.block, found.spec_path, written(found)) == ("RMSNorm", "model.layer.norm", "norm:")
    assert found.agreed == "model.embed_tokens/embed"


def test_a_rotation_the_other_way_round(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the oracle this time: which of the two is wrong no comparison can tell."""
    rope = NumpyOps.rope
    monkeypatch.setattr(
        NumpyOps, "rope", lambda ops, x_BNSH, table, step: rope(ops, x_BNSH[..., ::-1], table, step)[..., ::-1]
    )
    found = first(model_folder)
    assert (found.name, found.call) == ("model.layers.0.self_attn.position/rope", "prefill")


def test_a_cache_row_that_is_not_written_in_decode(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = TorchOps.kv_update

    def forget(ops: Any, m: Any, name: str, x_BKSH: torch.Tensor, step: Any) -> torch.Tensor:
        if name == "value" and x_BKSH.shape[2] == 1:
            return m.cache[name][:, :, : step.kv_positions_L.shape[0]]
        return update(ops, m, name, x_BKSH, step)

    monkeypatch.setattr(TorchOps, "kv_update", forget)
    found = first(model_folder)
    assert (found.name, found.call) == ("model.layers.0.self_attn/value_visible", "decode step 1")
    assert found.agreed == "model.layers.0.self_attn/key_visible"


def test_an_embedding_has_nothing_before_it(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = TorchOps.embed
    monkeypatch.setattr(TorchOps, "embed", lambda *args, **rest: embed(*args, **rest) + 1e-2)
    found = bisect(model_folder)
    assert found.first is not None and found.first.agreed is None
    assert (found.first.spec_path, written(found.first)) == ("model.vocab_size", "vocab_size: 400")
    assert "nothing: this is the first operation" in found.as_text()


def test_what_only_the_optimised_graph_does(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = OnnxRuntimeBackend.forward
    monkeypatch.setattr(OnnxRuntimeBackend, "forward", lambda *args: forward(*args) * 1.001)
    found = first(artifact)
    assert (found.name, found.block, found.spec_path) == ("logits", "LanguageModelHead", "model")
    assert "every operation agrees by itself" in found.note


def test_large_models_are_compared_in_small(
    artifact: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "LARGE", 1000)
    for path in (artifact, model_folder):
        told: list[str] = []
        assert bisect(path, told.append).ok
        assert "on its spec made small" in told[0]


def test_files_outside_the_artifact_are_not_read(artifact: Path, copy: Any, tmp_path: Path) -> None:
    path = copy(artifact)
    data = path / "rank0" / "stage0.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArchwrightError, match=r"VERIFY002 rank0/stage0\.data is a symbolic link"):
        bisect(path)
    data.unlink()
    shutil.copy(tmp_path / "elsewhere", data)

    def point_outside(graph: onnx.GraphProto) -> None:
        for entry in graph.initializer[-1].external_data:
            if entry.key == "location":
                entry.value = "../../elsewhere"

    edit(path, point_outside)
    with pytest.raises(ArchwrightError, match=r"VERIFY003 rank0/stage0\.onnx: names"):
        bisect(path)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    assert main(["verify", str(tmp_path), "--bisect"]) == 1

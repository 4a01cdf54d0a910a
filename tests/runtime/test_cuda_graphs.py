"""Graphs of artifacts on a GPU through ONNX Runtime's CUDA provider; what is said where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from archwright.compiler.tolerances import largest_error
from archwright.runtime import open_model, verify
from archwright.runtime.artifact import open_artifact
from archwright.runtime.backends.onnxruntime_backend import open_onnxruntime
from archwright.runtime.backends.onnxruntime_sessions import CUDA, cuda_problem
from archwright.runtime.verification import Report
from archwright.spec import ArchwrightError
from tests.runtime.pieces import pieces

HEADS = {"model.layer.attention.head_dim": 64}
BUILDS: dict[str, dict[str, Any]] = {
    "portable, float32": {},
    "portable, bfloat16, two ranks joined": {"build.precision": "bfloat16", "build.parallel.tensor": 2},
    "portable, float16, two stages": {"build.precision": "float16", "build.parallel.pipeline": 2},
    "tensorrt, bfloat16": {"build.target": "tensorrt", "build.precision": "bfloat16"},
    "onnxruntime, bfloat16": {"build.target": "onnxruntime", "build.precision": "bfloat16"},
    "onnxruntime, float16, last token": {
        "build.target": "onnxruntime",
        "build.precision": "float16",
        "build.logits": "last",
    },
}

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="CPU build")]


@pytest.fixture(scope="module")
def built(write_model: Callable[..., Path], build_artifact: Callable[..., Path]) -> Callable[[str], Path]:
    model = write_model(HEADS, tokenizer=False)
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = build_artifact(model, BUILDS[name])
        return made[name]

    return get


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA")
def test_without_cuda(artifact: Path) -> None:
    """Asked for, it is refused with the reason; by itself, the CPU is used, and `verify` compares there alone."""
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ArchwrightError, match=r"RUN021 .*built without CUDA; onnxruntime-gpu"):
            open_model(artifact, device=device)
    assert "CPU" in open_model(artifact).describe()
    assert not any("GPU" in check.name for check in verify(artifact).checks)


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "gpu", "cuda:-1"])
def test_no_such_device(artifact: Path, device: str) -> None:
    with pytest.raises(ArchwrightError, match="RUN021") as caught:
        open_model(artifact, device=device)
    assert caught.value.help == "use auto, cpu, cuda or cuda:N"


def allowed(report: Report) -> float:
    """What two runs that each may be off by the tolerance of the whole sequences may differ by."""
    (tolerance,) = (check.tolerance for check in report.checks if check.name == "GPU, whole sequences")
    assert tolerance is not None
    return 2 * tolerance


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("name", BUILDS)
    def test_the_gpu_agrees_with_the_oracle_and_the_cpu(self, built: Callable[[str], Path], name: str) -> None:
        path = built(name)
        report = verify(path)
        assert report.ok, report.as_text()
        gpu = [check for check in report.checks if check.name.startswith("GPU, ")]
        assert [check.result for check in gpu] == ["ok"] * 3
        model = open_model(path)
        assert "cuda:0" in model.describe() and "computed in float32" not in model.describe()
        ids_BS = np.random.default_rng(0).integers(0, 400, (3, 40))
        error = largest_error(model.logits(ids_BS), open_model(path, device="cpu").logits(ids_BS).astype(np.float64))
        assert error < allowed(report)

    @pytest.mark.parametrize("name", ["portable, float32", "onnxruntime, bfloat16"])
    def test_prompts_in_pieces_at_uneven_places(self, built: Callable[[str], Path], name: str) -> None:
        backend = open_onnxruntime(open_artifact(built(name)), "cuda", "auto")
        most = allowed(verify(built(name)))
        for actual_BSV, wanted_BSV, _ in pieces(backend, (1, 7, 1, 5)):
            assert largest_error(actual_BSV, wanted_BSV) < most

    def test_a_graph_that_would_run_on_the_cpu_in_part_is_refused(
        self, write_model: Callable[..., Path], build_artifact: Callable[..., Path]
    ) -> None:
        """GroupQueryAttention has no CUDA kernel in float32: named, and the CPU taken where the device is open."""
        path = build_artifact(write_model(HEADS, tokenizer=False), {"build.target": "onnxruntime"})
        with pytest.raises(ArchwrightError, match=r"RUN025 .*GroupQueryAttention"):
            open_model(path, device="cuda")
        assert "CPU" in open_model(path).describe() and "GroupQueryAttention" in open_model(path).describe()
        report = verify(path)
        assert report.ok and [check.result for check in report.checks if check.name == "GPU"] == ["skipped"]

    def test_no_such_gpu(self, artifact: Path) -> None:
        assert cuda_problem(0) is None
        with pytest.raises(ArchwrightError, match="RUN021"):
            open_model(artifact, device="cuda:7")

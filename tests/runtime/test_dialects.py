"""Artifacts in every dialect are built, verified, opened and bisected alike, with fused matrices and without.

B batch, S sequence.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archwright.compiler.weights.streaming import SafetensorsWeights
from archwright.runtime import build, open_model
from archwright.runtime.artifact import open_artifact
from archwright.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from archwright.runtime.bisection import bisect
from archwright.runtime.rank_weights import RankWeights, not_finite
from archwright.spec import ArchwrightError
from archwright.spec.cli import main
from archwright.spec.manifest import read_manifest
from tests.runtime.pieces import pieces

ROPE = {"kind": "rope"}
FFN = {"kind": "swiglu", "hidden_size": 64}


def attention(head_dim: int, **more: Any) -> dict[str, Any]:
    return {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": head_dim, "position": ROPE, **more}


# Heads that each dialect has its own operator for, a window, no position, biases, and heads that are no multiple of 8.
STACK = [
    {"layer": {"attention": attention(16, bias="all"), "ffn": FFN}},
    {"layer": {"attention": attention(16, mask={"kind": "window", "size": 5}), "ffn": FFN}},
    {"layer": {"attention": attention(8, position={"kind": "none"}), "ffn": FFN, "norm": {"kind": "layernorm"}}},
    {"layer": {"attention": attention(12), "ffn": FFN}},
]
MIXED = {"model.layers": STACK, "model.layer": None}
ONE = {}
TWO = {"build.parallel.tensor": 2, "build.precision": "bfloat16", "build.fuse": "all"}
FOUR = {"build.parallel.tensor": 4, "build.precision": "float16", "build.fuse": "all"}
BUILDS: dict[str, dict[str, Any]] = {
    "portable, two ranks, bfloat16, fused": TWO,
    "tensorrt, one rank, float32": ONE,
    "tensorrt, four ranks, float16, fused": FOUR,
    "onnxruntime, one rank, float32": ONE,
    "onnxruntime, two ranks, bfloat16, fused": TWO,
}
SINGLE, HALF = ("tensorrt, one rank, float32", "onnxruntime, one rank, float32"), "tensorrt, four ranks, float16, fused"
OWN_HALF = "onnxruntime, two ranks, bfloat16, fused"


@pytest.fixture(scope="module")
def mixed(write_model: Callable[..., Path]) -> Path:
    return write_model(MIXED, tokenizer=False)


@pytest.fixture(scope="module")
def built(mixed: Path, build_artifact: Callable[..., Path]) -> Callable[[str], Path]:
    """One of BUILDS → an artifact, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = build_artifact(mixed, {"build.target": name.partition(",")[0]} | BUILDS[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", BUILDS)
def test_an_artifact_is_verified_and_bisected(
    built: Callable[[str], Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = built(name)
    assert main(["verify", str(path), "--output-format", "json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    details = [check["detail"] for check in checks if check["code"] == "VERIFY007"]
    assert len(details) == 3
    assert all(("in portable form" in detail) is name.startswith("tensorrt") for detail in details)
    found = bisect(path)
    assert found.ok, found.as_text()
    assert found.num_compared > found.num_operations


@pytest.mark.parametrize("name", BUILDS)
def test_the_ranks_hold_the_models_weights_under_their_canonical_names(
    built: Callable[[str], Path], mixed: Path, name: str
) -> None:
    held, source = RankWeights(open_artifact(built(name))), SafetensorsWeights(mixed)
    assert set(held.names()) == set(source.names())
    for each in held.names():
        whole = held.read(each)
        assert whole.tobytes() == source.read(each).astype(whole.dtype).tobytes(), each


def test_a_changed_fused_weight_is_found(built: Callable[[str], Path]) -> None:
    weights = RankWeights(open_artifact(built(OWN_HALF)))
    name = "model.layers.0.self_attn.v_proj.weight"
    place = weights._places[1][name]
    with place.file.open("r+b") as file:
        file.seek(place.offset + place.rows[0] * place.stored.dtype.itemsize)  # of the first column, in which rows lie
        before = file.read(2)
        file.seek(-2, 1)
        file.write(b"\xc0\x7f")  # NaN
        file.flush()
        found = list(not_finite(weights, sample="all"))
        file.seek(-2, 1)
        file.write(before)
    assert found == [f"rank1: its part of `{name}` is not finite"]


def test_dialects_answer_alike(built: Callable[[str], Path], mixed: Path) -> None:
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    expected = [answer.tokens for answer in open_model(mixed).generate(prompts, max_tokens=12)]
    for name in SINGLE:
        model = open_model(built(name))
        assert [answer.tokens for answer in model.generate(prompts, max_tokens=12)] == expected, name


@pytest.mark.parametrize("name", BUILDS)
def test_prompts_in_pieces_at_uneven_places(built: Callable[[str], Path], name: str) -> None:
    """Each row's pieces of 1, 7, 3 and 5 tokens behind its own prompt give what whole sequences give."""
    backend = open_model(built(name)).backend
    assert isinstance(backend, OnnxRuntimeBackend)
    for actual_BSV, wanted_BSV, largest in pieces(backend, (1, 7, 3, 5)):
        assert np.abs(actual_BSV - wanted_BSV).max() < 2e-5 * largest


def test_inspect_says_which_layers_are_portable(
    built: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def layers(name: str) -> dict[str, str]:
        assert main(["inspect", str(built(name)), "--output-format", "json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["target"] == name.partition(",")[0]
        assert facts["portable_layers"] == read_manifest(built(name)).details["portable_layers"]
        return {path.split(".")[2]: reason for path, reason in facts["portable_layers"].items()}

    assert layers("portable, two ranks, bfloat16, fused") == {}
    assert {number: reason.split()[1] for number, reason in layers(SINGLE[0]).items()} == {"1": "window"}
    assert set(layers(HALF)) == {"1", "3"}
    assert "not 12" in layers(OWN_HALF)["3"] and len(layers(OWN_HALF)) == 1


def test_tensorrt_gets_no_graph_that_only_onnx_runtime_reads(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchwrightError) as caught:
        build(mixed, tmp_path / "out", "engine", {"build.target": "onnxruntime"})
    assert caught.value.code == "BUILD007" and "build.target" in (caught.value.help or "")
    assert list(tmp_path.iterdir()) == []

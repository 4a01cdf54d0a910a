"""Artifacts of several pipeline stages and expert groups, as users meet them: built, verified, opened, inspected."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from archwright.runtime import build, open_model, verify
from archwright.runtime.artifact import open_artifact
from archwright.runtime.bisection import bisect
from archwright.runtime.inspection import inspect_folder
from archwright.runtime.rank_weights import RankWeights, differing_ranks
from archwright.runtime.verification import content_checks
from archwright.spec.cli import main

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], [11] * 20]
MOE = {"kind": "moe", "experts": 6, "experts_per_token": 2, "hidden_size": 24, "shared": {"hidden_size": 16}}
STAGES = {"build.parallel.pipeline": 2, "build.parallel.tensor": 2, "build.logits": "last"}
EXPERTS = {"build.parallel": {"pipeline": 2, "expert": 2, "tensor": 2}, "build.moe": {"kind": "gathered"}}


@pytest.fixture(scope="module")
def deep_model(write_model: Callable[..., Path]) -> Path:
    """Of four layers, three of which are as much work as the last one and the head."""
    return write_model({"model.layers": 4})


@pytest.fixture(scope="module")
def staged(build_artifact: Callable[..., Path], deep_model: Path) -> Path:
    """Two stages of two ranks. Shared: copy it before changing it."""
    return build_artifact(deep_model, STAGES)


@pytest.fixture(scope="module")
def moe_model(write_model: Callable[..., Path]) -> Path:
    return write_model({"model.layers": 4, "model.layer.ffn": MOE, "model.tied_embeddings": True})


@pytest.fixture(scope="module")
def shared_experts(build_artifact: Callable[..., Path], moe_model: Path) -> Path:
    return build_artifact(moe_model, EXPERTS)


def answers(path: Path) -> list[list[int]]:
    return [answer.tokens for answer in open_model(path).generate(PROMPTS, max_tokens=12)]


def test_stages_give_the_tokens_of_one_rank(
    deep_model: Path, staged: Path, build_artifact: Callable[..., Path]
) -> None:
    whole = build_artifact(deep_model)
    assert answers(staged) == answers(whole)
    ids_BS = np.array(PROMPTS[2])[None]
    one, two = open_model(whole).logits(ids_BS), open_model(staged).logits(ids_BS)
    assert one.shape == two.shape and np.abs(one - two).max() < 1e-4 * np.abs(one).max()
    assert open_model(staged).describe().endswith("CPU, 4 ranks in 2 stages joined, float32")


def test_expert_groups_give_the_tokens_of_one_rank(
    moe_model: Path, shared_experts: Path, build_artifact: Callable[..., Path]
) -> None:
    assert answers(shared_experts) == answers(build_artifact(moe_model))


def test_an_artifact_of_stages_is_verified_and_inspected(staged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = verify(staged)
    assert report.ok and {"linter", "weights", "whole sequences"} <= {check.name for check in report.checks}
    manifest = json.loads((staged / "manifest.json").read_text())
    assert manifest["details"]["degrees"] == {"tensor": 2, "pipeline": 2, "expert": 1}
    assert manifest["details"]["logits"] == "last" and "rank3/stage1.onnx" in manifest["files"]
    assert main(["inspect", str(staged)]) == 0
    assert "model.layers.0..3.mlp.down_proj.weight  [32, 32]" in capsys.readouterr().out
    facts = inspect_folder(staged)
    assert facts["ranks"] == 4 and facts["tensors"]["lm_head.weight"] == [400, 32]


def test_a_large_artifact_of_stages_is_compared_in_small(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its spec made small is cut into the same stages."""
    monkeypatch.setattr("archwright.runtime.verification.LARGE", 0)
    checks = list(content_checks(open_artifact(staged)))
    compared = [check for check in checks if check.error is not None]
    assert all(check.result == "ok" for check in checks) and len(compared) == 3
    assert all(check.detail.endswith("reduced spec") for check in compared)


@pytest.mark.parametrize("name", ["staged", "shared_experts"])
def test_every_operation_of_every_stage_is_bisected(name: str, request: pytest.FixtureRequest) -> None:
    found = bisect(request.getfixturevalue(name))
    assert found.ok and 0 < found.largest_error < found.tolerance


def copied(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def test_a_fault_in_a_later_stage_is_traced_with_its_rank(staged: Path, tmp_path: Path) -> None:
    path = copied(staged, tmp_path)
    graph = path / "rank3" / "stage1.onnx"
    model = onnx.load(graph, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    next(a for a in node.attribute if a.name == "scale").f *= 1.1
    graph.write_bytes(model.SerializeToString())
    first = bisect(path).first
    assert first is not None and first.name == "model.layers.3.self_attn/attention" and first.rank == 3
    assert not verify(path).ok


def test_every_part_is_stored_where_it_is_read(shared_experts: Path, tmp_path: Path) -> None:
    """The tied table at both ends, an expert on the tensor ranks of one expert rank; a copy that differs is named."""
    path = copied(shared_experts, tmp_path)
    weights = RankWeights(open_artifact(path))
    assert weights.holders("model.embed_tokens.weight") == list(range(8))
    assert weights.holders("model.layers.0.mlp.experts.up_proj") == [0, 1, 2, 3]
    assert weights.holders("model.layers.3.mlp.experts.up_proj") == [4, 5, 6, 7]
    assert weights.part("model.layers.3.mlp.experts.up_proj", 7).shape == (3, 12, 32)
    assert not list(differing_ranks(weights, sample="all"))
    part = weights.part("model.embed_tokens.weight", 5)
    data, start = path / "rank5" / "stage1.data", _offset(path / "rank5" / "stage1.onnx", "model.embed_tokens.weight")
    content = bytearray(data.read_bytes())
    content[start : start + 4] = np.float32(part[0, 0] + 1).tobytes()
    data.write_bytes(content)
    (problem,) = differing_ranks(RankWeights(open_artifact(path)), sample="all")
    assert problem == "rank5: its part of `model.embed_tokens.weight` differs from rank0's, of which it is a copy"


def _offset(graph: Path, name: str) -> int:
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    (tensor,) = (tensor for tensor in tensors if tensor.name == name)
    return int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))


def test_a_rebuild_is_byte_equal(moe_model: Path, shared_experts: Path, tmp_path: Path) -> None:
    assert build(moe_model, tmp_path / "again", overrides=EXPERTS).ok
    for file in sorted(shared_experts.rglob("stage*")):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(shared_experts)).read_bytes(), file.name


def test_a_graph_in_the_place_of_another_stage_is_found(staged: Path, tmp_path: Path) -> None:
    path = copied(staged, tmp_path)
    (path / "rank2" / "stage1.onnx").rename(path / "rank2" / "stage0.onnx")
    problems = " ".join(verify(path).problems())
    assert "rank2/stage1.onnx" in problems and not verify(path).ok


@pytest.mark.heavy
def test_every_rank_gets_the_engine_of_its_stage(deep_model: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install archwright[tensorrt-rtx]"
    )
    assert build(deep_model, tmp_path / "out", "engine", STAGES).ok
    engines = {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("*.engine")}
    assert engines == {f"rank{rank}/stage{rank // 2}.engine" for rank in range(4)}
    layers = json.loads((tmp_path / "out" / "manifest.json").read_text())["details"]["engines"]
    assert [layers[name]["layers"]["ATTENTION_INPUT"] for name in sorted(layers)] == [3, 3, 1, 1]

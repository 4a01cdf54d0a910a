"""Graphs of mixtures of experts: where the weights of a rank lie, and what the graph does with them."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from archwright.compiler.ir import Degrees
from archwright.compiler.passes import run_passes
from archwright.compiler.targets.linter import lint
from archwright.compiler.targets.onnx_graph import export_graphs
from archwright.compiler.weights.streaming import PRECISIONS, GeneratedWeights
from archwright.runtime.backends.onnxruntime_backend import open_graphs
from archwright.spec import Spec, load

MOE = {"kind": "moe", "experts": 5, "experts_per_token": 2, "hidden_size": 48}


def make_spec(**ffn: object) -> Spec:
    return load("preset:tiny", {"model.layer.ffn": {**MOE, **ffn}, "model.layers": 2})


def exported(spec: Spec, folder: Path, tensor: int, precision: str = "float32") -> GeneratedWeights:
    plan = run_passes(spec, Degrees(tensor=tensor))
    weights = GeneratedWeights(params=plan.program.params(), seed=0)
    export_graphs(plan, weights, folder, precision=precision, capacity=64)
    return weights


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_every_rank_holds_its_part_of_each_expert(tensor: int, precision: str, tmp_path: Path) -> None:
    """gate and up as [D, E · F], down as [E · F, D]: the experts side by side, each with the rank's part of F."""
    weights = exported(make_spec(), tmp_path, tensor, precision)
    width = 48 // tensor
    for rank in range(tensor):
        path = tmp_path / f"rank{rank}" / "stage0.onnx"
        stored = {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
        for name in ("gate_proj", "up_proj", "down_proj"):
            full = weights.read(f"model.layers.1.mlp.experts.{name}")
            part = slice(rank * width, (rank + 1) * width)
            own = full[:, :, part].swapaxes(1, 2) if name == "down_proj" else full[:, part]
            expected = own.reshape(5 * width, 64) if name == "down_proj" else own.reshape(5 * width, 64).T
            tensor_proto = stored[f"model.layers.1.mlp.experts.{name}.T"]
            place = {entry.key: entry.value for entry in tensor_proto.external_data}
            start, length = int(place["offset"]), int(place["length"])
            data = path.with_suffix(".data").read_bytes()[start : start + length]
            found = np.frombuffer(data, PRECISIONS[precision]).reshape(tuple(tensor_proto.dims))
            np.testing.assert_array_equal(found, expected.astype(PRECISIONS[precision]))


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_checker_and_linter_accept_the_graphs(precision: str, tmp_path: Path) -> None:
    exported(make_spec(shared={"hidden_size": 16}), tmp_path, 2, precision)
    for rank in range(2):
        path = tmp_path / f"rank{rank}" / "stage0.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        assert not lint(onnx.load(path, load_external_data=False), path.parent)


@pytest.mark.parametrize(("ffn", "sums"), [({}, 2), ({"shared": {"hidden_size": 16}}, 3)])
def test_one_all_reduce_for_the_experts_and_none_of_the_penalties(
    ffn: dict[str, object], sums: int, tmp_path: Path
) -> None:
    exported(make_spec(**ffn), tmp_path, 2)
    graph = onnx.load(tmp_path / "rank0" / "stage0.onnx", load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["DistCollective"] == 2 * sums, "attention, experts, shared expert"
    assert operators["TopK"] == operators["Softmax"] == 2
    assert not {"Log", "ReduceLogSumExp", "ReduceMean"} & operators.keys()


def test_what_nobody_chose_may_be_infinite(tmp_path: Path) -> None:
    """An expert that overflows is not seen by tokens that do not go through it."""
    spec = make_spec()
    plan = run_passes(spec, Degrees())
    weights = GeneratedWeights(params=plan.program.params(), seed=0)

    class Overflowing(GeneratedWeights):
        def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
            value = np.array(weights.read(name))
            if name.endswith("experts.up_proj"):
                value[-1] = 1e38
            if name.endswith("mlp.gate.weight"):
                value *= 0  # equal logits: the first two experts
            return value if slices is None else value[slices]

    export_graphs(plan, Overflowing(params=weights.params, seed=0), tmp_path, precision="float32", capacity=64)
    backend = open_graphs(tmp_path, ranks=1, precision="float32")
    positions = np.arange(9)[None]
    logits = backend.forward(backend.new_cache(1, 64), positions + 3, positions, np.zeros(1, np.int64), 9)
    assert np.isfinite(logits).all()

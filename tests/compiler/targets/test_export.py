"""Files: bytes, layout, names, metadata."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest

from archwright.compiler import export_graphs
from archwright.compiler.ir import Degrees
from archwright.compiler.passes import lower, partition, run_passes
from archwright.compiler.targets import onnx_graph
from archwright.compiler.weights.folder import weight_tensors, write_model_folder
from archwright.compiler.weights.streaming import PRECISIONS, GeneratedWeights
from archwright.spec import ArchwrightError, spec_digest

EIGHT_BILLION = """
import json, sys
from pathlib import Path
from archwright.compiler import export_graphs
from archwright.spec import Spec
spec = Spec.model_validate(json.loads(sys.argv[1]))
paths = export_graphs(spec, Path(sys.argv[2]), write_weights=False)
heavy = sorted({"torch", "onnxruntime", "transformers"} & sys.modules.keys())
print(json.dumps({"paths": [str(path) for path in paths], "heavy": heavy}))
"""


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_the_checker_accepts_every_rank(make_spec, export, precision):
    model = export(make_spec(), tensor=2, precision=precision)
    for rank in range(2):
        onnx.checker.check_model(str(model.folder / f"rank{rank}" / "stage0.onnx"), full_check=True)


def test_rebuilding_gives_the_same_bytes(make_spec, export):
    first, second = (export(make_spec(), tensor=2, precision="bfloat16") for _ in range(2))
    files = contents(first.folder)
    assert sorted(files) == ["rank0/stage0.data", "rank0/stage0.onnx", "rank1/stage0.data", "rank1/stage0.onnx"]
    assert files == contents(second.folder)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_rank_holds_its_slices(make_spec, export, tensor, precision):
    """Wide enough that matrices are transposed in several pieces, the last ones narrower."""
    model = export(make_spec(layers=1, hidden_size=272), tensor=tensor, precision=precision)
    params = model.plan.program.params()
    for rank in range(tensor):
        path = model.folder / f"rank{rank}" / "stage0.onnx"
        data = path.with_suffix(".data").read_bytes()
        stored = {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
        for name, param in params.items():
            part = model.arrays[name][param.split.slices(param.shape, rank)] if param.split else model.arrays[name]
            expected = part.T if f"{name}.T" in stored else part
            tensor_proto = stored.get(name) or stored[f"{name}.T"]
            place = {entry.key: entry.value for entry in tensor_proto.external_data}
            start, length = int(place["offset"]), int(place["length"])
            found = np.frombuffer(data[start : start + length], PRECISIONS[precision]).reshape(tuple(tensor_proto.dims))
            assert place["location"] == "stage0.data"
            assert start % onnx_graph.ALIGNMENT == 0
            np.testing.assert_array_equal(found, expected)


def test_ranks_differ_in_their_rank_alone(make_spec, export):
    model = export(make_spec(), tensor=2)
    graphs = [onnx.load(model.folder / f"rank{rank}" / "stage0.onnx", load_external_data=False) for rank in range(2)]
    facts = [{p.key.removeprefix("archwright."): p.value for p in graph.metadata_props} for graph in graphs]
    assert [fact.pop("rank") for fact in facts] == ["0", "1"]
    assert facts[0] == facts[1]
    assert facts[0]["precision"] == "float32"
    assert facts[0]["capacity"] == "32"
    assert facts[0]["degrees.tensor"] == "2"
    assert graphs[0].graph == graphs[1].graph


def test_inputs_and_outputs_have_the_agreed_names(make_spec, export):
    graph = onnx.load(export(make_spec()).graph, load_external_data=False).graph
    caches = [f"{layer}.{state}" for layer in range(2) for state in ("key", "value")]
    indices = ["input_ids", "position_ids", "write_index", "kv_positions"]
    assert [value.name for value in graph.input] == indices + [f"past.{name}" for name in caches]
    assert [value.name for value in graph.output] == ["logits"] + [f"present.{name}" for name in caches]


@pytest.mark.parametrize("capacity", [0, 65])
def test_a_cache_out_of_range_is_refused(make_spec, tmp_path, capacity):
    plan = run_passes(make_spec(), Degrees())
    with pytest.raises(ArchwrightError, match="BUILD010"):
        onnx_graph.export_graphs(plan, None, tmp_path, precision="float32", capacity=capacity)
    assert not list(tmp_path.iterdir())


def test_eight_billion_parameters_are_emitted_without_torch_or_weights(make_spec, tmp_path):
    position = {"kind": "rope", "theta": 500000.0, "scaling": {"kind": "llama3"}}
    layer = {
        "attention": {"kind": "gqa", "heads": 32, "kv_heads": 8, "position": position},
        "ffn": {"kind": "swiglu", "hidden_size": 14336},
    }
    model = {"vocab_size": 128256, "hidden_size": 4096, "max_positions": 8192, "layers": 32, "layer": layer}
    build = {"precision": "bfloat16", "parallel": {"tensor": 2}}
    spec = {"version": 1, "name": "llama3.1-8b", "model": model, "build": build}
    command = [sys.executable, "-c", EIGHT_BILLION, json.dumps(spec), str(tmp_path)]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert answer["heavy"] == []
    assert [path.name for path in tmp_path.rglob("*.data")] == []
    graph = onnx.load(answer["paths"][1], load_external_data=False).graph
    length = {
        t.name: int(next(e.value for e in t.external_data if e.key == "length"))
        for t in graph.initializer
        if t.external_data
    }
    # Half of the layers' matrices, all of the embedding, the head and the norms, two bytes each; and the rotary tables.
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert sum(length.values()) == matrices + 2 * (2 * 128256 * 4096 + 65 * 4096) + 4 * 2 * 8192 * 64


def test_a_spec_is_exported_as_its_build_section_says(make_spec, tmp_path):
    fields = make_spec().model_dump()
    build = {"precision": "float16", "max_positions": 16, "parallel": {"tensor": 2}}
    spec = make_spec().model_validate(fields | {"build": build | {"weights": {"kind": "generated", "seed": 3}}})
    paths = export_graphs(spec, tmp_path / "out")
    model = onnx.load(paths[1], load_external_data=False)
    facts = {p.key.removeprefix("archwright."): p.value for p in model.metadata_props}
    assert (facts["precision"], facts["capacity"], facts["rank"]) == ("float16", "16", "1")
    assert facts["spec_digest"] == spec_digest(spec)
    with pytest.raises(ArchwrightError, match="BUILD006"):
        export_graphs(make_spec(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_model_folder_is_exported_with_its_weights(make_spec, tmp_path):
    spec = make_spec()
    program = lower(spec)
    weights = GeneratedWeights(params=program.params(), seed=5)
    write_model_folder(tmp_path / "model", spec, weight_tensors(program, weights, "float32"), [], details={})
    export_graphs(tmp_path / "model", tmp_path / "out")
    digest = spec_digest(spec)
    plan = partition(program, Degrees())
    onnx_graph.export_graphs(plan, weights, tmp_path / "direct", precision="float32", capacity=64, spec_digest=digest)
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")

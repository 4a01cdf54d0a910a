"""Artifacts: complete, verified and byte-equal, or absent."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archwright.compiler.targets.onnx_graph import Export
from archwright.compiler.weights.streaming import SafetensorsWeights
from archwright.runtime import build, building, open_model, rank_weights, verify
from archwright.runtime.artifact import Artifact, open_artifact
from archwright.runtime.inspection import inspect_folder
from archwright.runtime.rank_weights import RankWeights, Sample
from archwright.spec import ArchwrightError, load
from archwright.spec.manifest import read_manifest

GENERATED = {"build.weights.kind": "generated"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_an_artifact_holds(two_ranks: Path, model_folder: Path) -> None:
    files = contents(two_ranks)
    ranks = [f"rank{rank}/stage0.{kind}" for rank in range(2) for kind in ("onnx", "data")]
    assert set(files) == {"manifest.json", "spec.yaml", "tokenizer.model", *ranks}
    manifest = read_manifest(two_ranks)
    assert (manifest.kind, manifest.spec_digest) == ("artifact", read_manifest(model_folder).spec_digest)
    facts = {"precision": "float32", "capacity": 96, "max_batch": 8, "target": "portable", "num_parameters": 44192}
    assert manifest.details.items() >= facts.items()
    assert manifest.details["degrees"] == {"tensor": 2, "pipeline": 1, "expert": 1}
    assert manifest.details["toolchain"].keys() >= {"archwright", "onnx", "onnx-ir", "onnxruntime"}
    assert manifest.measured is not None
    assert set(manifest.measured["errors"]) == {"whole sequences", "prefill and decode", "end of the cache"}
    assert 0 < max(manifest.measured["errors"].values()) < 2e-5


def test_its_spec_says_what_was_built_and_nothing_of_this_machine(two_ranks: Path) -> None:
    spec = load(two_ranks / "spec.yaml")
    assert (spec.build.parallel.tensor, spec.build.max_positions, spec.build.weights.kind) == (2, 96, "model")
    assert spec.train is spec.data is spec.tokenizer is None
    assert str(Path.home()) not in (two_ranks / "spec.yaml").read_text()


@pytest.mark.parametrize("generated", [False, True])
def test_everything_is_byte_equal_when_built_again(
    tmp_path: Path, model_folder: Path, write_spec: Callable[..., Path], generated: bool
) -> None:
    source, more = (write_spec(), GENERATED) if generated else (model_folder, {})
    for name in ("first", "second"):
        build(source, tmp_path / name, overrides={"build.parallel.tensor": 2, "build.precision": "bfloat16", **more})
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    manifests = [json.loads(files.pop("manifest.json")) for files in (first, second)]
    assert first == second
    for manifest in manifests:
        del manifest["measured"]
    assert manifests[0] == manifests[1], "only measurements may differ"


@pytest.mark.parametrize(("precision", "degree"), [("float32", 1), ("bfloat16", 2), ("float16", 4)])
def test_the_ranks_hold_the_models_weights_rounded_once(
    model_folder: Path, build_artifact: Callable[..., Path], precision: str, degree: int
) -> None:
    path = build_artifact(model_folder, {"build.precision": precision, "build.parallel.tensor": degree})
    held, source = RankWeights(open_artifact(path)), SafetensorsWeights(model_folder)
    assert set(held.names()) == set(source.names())
    for name in held.names():
        whole = held.read(name)
        assert whole.tobytes() == source.read(name).astype(whole.dtype).tobytes()
        assert str(whole.dtype) == precision


def test_from_a_spec_with_generated_weights(tmp_path: Path, write_spec: Callable[..., Path]) -> None:
    spec = write_spec()
    first, second = (tmp_path / name for name in ("a", "b"))
    assert build(spec, first, overrides=GENERATED).ok
    assert build(spec, second, overrides={"build.weights": {"kind": "generated", "seed": 1}}).ok
    assert verify(first).ok
    ids_BS = np.array([[5, 6, 7]])
    assert not np.allclose(open_model(first).logits(ids_BS), open_model(second).logits(ids_BS))


def test_a_capacity_below_the_models(tmp_path: Path, model_folder: Path) -> None:
    build(model_folder, tmp_path / "small", overrides={"build.max_positions": 10, "build.max_batch": 2})
    model = open_model(tmp_path / "small")
    assert (model.capacity, model.backend.max_batch) == (10, 2)
    assert [len(a.tokens) for a in model.generate([[5] * 8, [6], [7] * 10], max_tokens=5)] == [3, 5, 1]


@pytest.mark.parametrize("to", ["onnx", "engine"])
def test_whatever_is_missing_is_said_first(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, to: Any
) -> None:
    library = {"onnx": ["onnxruntime"], "engine": ["tensorrt", "tensorrt_rtx"]}[to]
    for name in library:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(building, "export_graphs", lambda *_, **__: pytest.fail("work before the check"))
    with pytest.raises(ArchwrightError) as caught:
        build(model_folder, tmp_path / "out", to=to)
    assert caught.value.code == {"onnx": "RUN023", "engine": "BUILD001"}[to]
    assert "archwright[" in (caught.value.help or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.heavy
def test_engines(tmp_path: Path, model_folder: Path) -> None:
    """TensorRT builds one beside each graph, and the manifest has their hashes. Elsewhere: a visible skip."""
    try:
        building.load_tensorrt()
    except ArchwrightError as error:
        pytest.skip(str(error))
    out = tmp_path / "engines"
    seen: list[str] = []
    options = {"build.precision": "float16", "build.engine.timing_cache": str(tmp_path / "timings.bin")}
    build(model_folder, out, "engine", {"build.parallel.tensor": 2, **options}, seen.append)
    manifest = read_manifest(out)
    engines = [f"rank{rank}/stage0.engine" for rank in range(2)]
    logs = {name.replace(".engine", ".log") for name in engines}
    assert list(manifest.details["engines"]) == engines
    assert {*engines, *logs, "probe.safetensors"} < set(manifest.files)
    facts = manifest.details["engines"][engines[0]]
    assert facts["layers"]["DIST_COLLECTIVE"] == 4 and len(facts["profiles"]) == 2
    assert facts["structural_hash"] == manifest.details["engines"][engines[1]]["structural_hash"]
    assert "TensorRT" in manifest.details["toolchain"]["tensorrt"]
    assert set(manifest.measured["engine_s"]) == set(engines)
    assert "timing_cache" not in (out / "spec.yaml").read_text(), "an artifact names no path"
    assert any("engine 2 of 2" in message for message in seen)
    assert "2 engines to build, of 1 structure" in seen
    assert verify(out).ok
    assert inspect_folder(out)["engines"][engines[1]]["structural_hash"] == facts["structural_hash"]


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        ({"model.vocab_size": 401}, "BUILD005"),
        ({"model.layer.norm.eps": 1e-6}, "BUILD005"),
        (GENERATED, "BUILD004"),
        ({"build.parallel.tensor": 3}, None),
        ({"build.max_positions": 97}, None),
        ({"build.precision": "float8"}, None),
    ],
)
def test_overrides_that_do_not_fit(
    tmp_path: Path, model_folder: Path, overrides: Mapping[str, object], code: str | None
) -> None:
    with pytest.raises(ArchwrightError) as caught:
        build(model_folder, tmp_path / "out", overrides=overrides)
    assert caught.value.code == code or (code is None and caught.value.code.startswith("SPEC"))
    assert list(tmp_path.iterdir()) == []


def test_sources_that_do_not_fit(tmp_path: Path, artifact: Path, write_spec: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    for source, code in ((artifact, "BUILD003"), (write_spec(), "BUILD006"), (tmp_path / "empty", "RUN011")):
        with pytest.raises(ArchwrightError, match=code) as caught:
            build(source, tmp_path / "out")
        assert caught.value.help
    assert "build.weights.kind=generated" in str(_error(lambda: build(write_spec(), tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def _error(call: Callable[[], object]) -> ArchwrightError:
    with pytest.raises(ArchwrightError) as caught:
        call()
    return caught.value


def test_an_existing_folder_is_left_alone(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert _error(lambda: build(model_folder, tmp_path / "out")).code == "SPEC090"
    assert contents(tmp_path) == {"out/mine.txt": b"mine"}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("where", ["export_graphs", "content_checks", "write_manifest"])
def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, interruption: type[BaseException]
) -> None:
    original = getattr(building, where)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        result = original(*args, **kwargs)
        list(result if where == "content_checks" else [])
        raise interruption

    monkeypatch.setattr(building, where, interrupted)
    with pytest.raises(interruption):
        build(model_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["weights", "numbers", "linter"])
def test_an_artifact_whose_check_fails_is_not_written(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    original = building.export_graphs

    def faulty(plan: Any, weights: Any, folder: Path, **options: Any) -> Export:
        export = original(plan, weights, folder, **options)
        graphs = export.graphs
        if fault == "weights":  # one element of rank 1 is off by one bit
            content = bytearray(graphs[1].with_suffix(".data").read_bytes())
            content[0] ^= 1
            graphs[1].with_suffix(".data").write_bytes(content)
        else:
            replace_in_graphs(graphs, "scale" if fault == "linter" else "epsilon")
        return export

    monkeypatch.setattr(building, "export_graphs", faulty)
    error = _error(lambda: build(model_folder, tmp_path / "out", overrides={"build.parallel.tensor": 2}))
    assert error.code == "VERIFY010"
    assert {"weights": "VERIFY006 rank1", "numbers": "VERIFY007", "linter": "LINT006"}[fault] in str(error)
    assert list(tmp_path.iterdir()) == []


def replace_in_graphs(graphs: Sequence[Path], attribute: str) -> None:
    """Remove `scale` from every Attention, or enlarge the norms' epsilon."""
    import onnx

    for graph in graphs:
        model = onnx.load(graph, load_external_data=False)
        for node in model.graph.node:
            for item in list(node.attribute):
                if item.name == attribute == "scale":
                    node.attribute.remove(item)
                elif item.name == attribute == "epsilon":
                    item.f = 0.5
        graph.write_bytes(model.SerializeToString(deterministic=True))


class Changed:
    """Weights of an artifact, with one row or value of one tensor changed."""

    def __init__(self, held: RankWeights, name: str, place: int | tuple[int, int]) -> None:
        self.held, self.name = held, name
        self.array = held.read(name).copy()
        self.array[place] += 1

    def read(self, other: str, slices: Any = None) -> np.ndarray:
        return (self.array if other == self.name else self.held.read(other))[slices]


def num_differing(held: RankWeights, name: str, place: int | tuple[int, int], sample: Sample) -> int:
    source: Any = Changed(held, name, place)
    return len(list(rank_weights.differing_source(held, source, sample=sample)))


@pytest.mark.parametrize("sample", ["rows", "windows"])
def test_sampled_comparison_sees_the_sampled_rows_only(model_folder: Path, artifact: Path, sample: Sample) -> None:
    """First and last row are always among them."""
    held, name = RankWeights(Artifact(artifact, load(artifact / "spec.yaml"))), "model.embed_tokens.weight"
    sampled = [num_differing(held, name, row, sample) for row in range(400)]
    assert sampled[0] == sampled[399] == 1 and sum(sampled) == rank_weights.SAMPLED_ROWS
    assert all(num_differing(held, name, row, "all") for row in (1, 2, 200))


def test_of_rows_that_are_stored_as_columns_windows_are_compared(artifact: Path) -> None:
    """The first, middle and last values: few pages of the file."""
    held, name = RankWeights(Artifact(artifact, load(artifact / "spec.yaml"))), "model.layers.0.mlp.down_proj.weight"
    last = held.shape(name)[1] - 1
    sampled = [num_differing(held, name, (0, column), "windows") for column in range(last + 1)]
    assert sampled[0] == sampled[last // 2] == sampled[last] == 1
    assert sum(sampled) == 3 * rank_weights.WINDOW_COLUMNS < last
    assert all(num_differing(held, name, (0, column), "rows") for column in (20, last - 20))

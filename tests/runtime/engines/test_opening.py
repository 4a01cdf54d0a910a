"""An engine is loaded where it was built for, as it was built, or not at all; `auto` says which back end it took."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from archwright.compiler.targets.gpus import Gpu
from archwright.runtime import open_model, verify
from archwright.runtime.artifact import Artifact, open_artifact
from archwright.runtime.backends import tensorrt_backend
from archwright.runtime.engines.cuda import CudaDevice
from archwright.runtime.engines.opening import Engines, carries_host_code, check_machine, find_engines, read_engine
from archwright.runtime.inspection import inspect_folder
from archwright.spec import ArchwrightError, load
from archwright.spec.cli import main
from archwright.spec.manifest import MANIFEST, read_manifest
from tests.runtime.engines.conftest import engines_of_weights, in_threads, rewrite

ADA = Gpu(name="NVIDIA RTX 4090", capability="8.9")
H100 = Gpu(name="NVIDIA H100", capability="9.0")
H200 = Gpu(name="NVIDIA H200", capability="9.0")
ON_H100 = {
    "library": "tensorrt",
    "version": "11.2.0",
    "compute_capabilities": ["9.0"],
    "gpu": {"name": "NVIDIA H100", "compute_capability": "9.0"},
}


def library(name: str = "tensorrt_rtx", version: str = "1.7.1") -> ModuleType:
    module = ModuleType(name)
    module.__dict__["__version__"] = version
    return module


def found(folder: Path) -> Engines:
    return find_engines(open_artifact(folder))


def error_of(call: Callable[[], object]) -> ArchwrightError:
    with pytest.raises(ArchwrightError) as caught:
        call()
    return caught.value


def test_what_was_built_for_this_machine_is_accepted(engines_of: Callable[..., Path]) -> None:
    engines = found(engines_of())
    assert (len(engines.files), engines.stages, engines.per_stage) == (2, 1, 2)
    check_machine(engines, library(), (ADA, ADA))
    file = engines.files[1]
    assert read_engine(file.path, file.sha256, "") == b"engine 1"


@pytest.mark.parametrize(
    ("facts", "here", "gpus", "code", "words"),
    [
        ({}, library(), (), "RUN041", "need 2 NVIDIA GPUs, and none is here"),
        ({}, library(), (ADA,), "RUN041", "need 2 NVIDIA GPUs, and 1 is here"),
        ({}, library(), (ADA, Gpu(name="RTX 3090", capability="8.6")), "RUN042", "rank 1 would run on RTX 3090"),
        ({}, library(), (H100, H100), "RUN042", "TensorRT for RTX does not run on SM 9.0"),
        ({"compute_capabilities": ["7.5"]}, library(), (Gpu(name="T4", capability="7.5"),) * 2, "RUN042", "SM 8.0"),
        ({}, library(version="1.8.0"), (ADA, ADA), "RUN043", "built by tensorrt_rtx 1.7.1, and TensorRT for RTX 1.8.0"),
        ({}, library("tensorrt", "11.2"), (ADA, ADA), "RUN043", "TensorRT 11.2"),
        ({"flags": ["VERSION_COMPATIBLE"]}, library(version="1.6.9"), (ADA, ADA), "RUN043", "1.6.9"),
        ({"flags": ["VERSION_COMPATIBLE"]}, library(version="2.0"), (ADA, ADA), "RUN043", "2.0"),
        (ON_H100, library("tensorrt", "11.2.0"), (H200, H200), "RUN042", "built for NVIDIA H100 (SM 9.0)"),
        (ON_H100 | {"hardware_compatibility": "same_compute_capability"}, library("tensorrt", "11.2.0"), (ADA, ADA),
         "RUN042", "built for SM 9.0"),
    ],
)  # fmt: skip
def test_another_machine_is_refused_with_the_reason(
    engines_of: Callable[..., Path], facts: Any, here: ModuleType, gpus: Any, code: str, words: str
) -> None:
    engines = found(engines_of(**facts))
    error = error_of(lambda: check_machine(engines, here, gpus))
    assert error.code == code and words in error.message
    wanted = "SM 8.9" if code == "RUN041" else "archwright build MODEL_OR_RUN --to engine -o OUT --set build.parallel.t"
    assert wanted in (error.help or "")


@pytest.mark.parametrize(
    ("facts", "here", "gpus"),
    [
        ({"flags": ["VERSION_COMPATIBLE"]}, library(version="1.9.0"), (ADA, ADA)),
        (ON_H100 | {"hardware_compatibility": "same_compute_capability"}, library("tensorrt", "11.2.0"), (H200, H200)),
        (ON_H100 | {"hardware_compatibility": "ampere_plus"}, library("tensorrt", "11.2.0"), (ADA, H100)),
    ],
)
def test_what_was_built_to_be_compatible_runs_elsewhere(
    engines_of: Callable[..., Path], facts: Any, here: ModuleType, gpus: Any
) -> None:
    check_machine(found(engines_of(**facts)), here, gpus)


def test_only_a_lean_runtime_is_code_for_the_host() -> None:
    flags = (["VERSION_COMPATIBLE"], ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"], [])
    assert [carries_host_code({"flags": each}) for each in flags] == [True, False, False]


def test_a_changed_byte_is_never_deserialized(engines_of: Callable[..., Path]) -> None:
    folder = engines_of()
    (file, _) = found(folder).files
    file.path.write_bytes(b"engine X")  # of the same size, which opening an artifact does not see
    error = error_of(lambda: read_engine(file.path, file.sha256, "build it"))
    assert (error.code, error.where, error.help) == ("RUN044", "rank0/stage0.engine", "build it")


def test_what_tensorrt_refuses_is_told_in_its_words() -> None:
    """TensorRT for RTX without a GPU loads no engine; with one, not this one."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    device = SimpleNamespace()
    error = error_of(lambda: CudaDevice.deserialize(device, b"no engine", library="tensorrt_rtx", host_code=False))
    assert error.code == "RUN045" and "refuses the engine: " in error.message
    assert "gave no reason" not in error.message


def _remove(folder: Path) -> None:
    (folder / "rank1/stage0.engine").unlink()


def _link(folder: Path) -> None:
    outside = folder.parent / "outside.engine"
    (folder / "rank1/stage0.engine").rename(outside)
    (folder / "rank1/stage0.engine").symlink_to(outside)


def _hard_link(folder: Path) -> None:
    (folder.parent / "other.engine").hardlink_to(folder / "rank1/stage0.engine")


def _unlisted(folder: Path) -> None:
    entries = read_manifest(folder).details["engines"]
    rewrite(folder, {"rank0/stage0.engine": entries["rank0/stage0.engine"]})


def _outside(folder: Path) -> None:
    graph = folder / "rank1/stage0.onnx"
    model = onnx.load(graph, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    tensor.external_data[0].value = "../rank0/stage0.data"
    graph.write_bytes(model.SerializeToString())
    rewrite(folder, read_manifest(folder).details["engines"])


def _other_graph(folder: Path) -> None:
    """Both graphs of another build, which fit together, and the engines of this one."""
    for graph in sorted(folder.glob("rank*/stage0.onnx")):
        model = onnx.load(graph, load_external_data=False)
        model.graph.node[5].name += "_2"
        graph.write_bytes(model.SerializeToString())
    rewrite(folder, read_manifest(folder).details["engines"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove, "rank1/stage0.engine is missing"),
        (_link, "rank1/stage0.engine is a symbolic link"),
        (_hard_link, "rank1/stage0.engine is a hard link"),
        (_unlisted, "rank1/stage0.engine is missing"),
        (_other_graph, "rank0/stage0.engine was not built from stage0.onnx: their structural hashes differ"),
        (_outside, "names `../rank0/stage0.data`, which is not beside it"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    engines_of: Callable[..., Path], damage: Callable[[Path], None], words: str
) -> None:
    folder = engines_of()
    damage(folder)
    error = error_of(lambda: find_engines(Artifact(folder, load(folder / "spec.yaml"))))
    assert error.code == "RUN044" and words in error.message
    assert "--to engine" in (error.help or "")
    assert not verify(folder).ok, "verify sees it too, without a GPU"


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: 1,
        lambda entries: "engines",
        lambda entries: {name: None for name in entries},
        lambda entries: {name: {} for name in entries},
        lambda entries: {name: facts | {"profiles": []} for name, facts in entries.items()},
        lambda entries: {name: facts | {"profiles": [{"batch": 1}]} for name, facts in entries.items()},
        lambda entries: {name: facts | {"gpu": ["H100"]} for name, facts in entries.items()},
        lambda entries: {name: facts | {"compute_capabilities": [8.9]} for name, facts in entries.items()},
        *(
            lambda entries, key=key: {name: {k: v for k, v in e.items() if k != key} for name, e in entries.items()}
            for key in ("library", "flags", "layers", "structural_hash")
        ),
    ],
)
def test_facts_that_no_build_wrote_are_refused(
    engines_of: Callable[..., Path], change: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = engines_of()
    entries = change(read_manifest(folder).details["engines"])
    rewrite(folder, entries)
    for command in (["verify", str(folder)], ["verify", "--on-target", str(folder)], ["inspect", str(folder)]):
        assert main(command) == 1
        said = capsys.readouterr()
        assert "is not what `build` wrote" in said.out + said.err and "internal error" not in said.err


def test_an_artifact_of_graphs_has_no_engines(two_ranks: Path) -> None:
    error = error_of(lambda: open_model(two_ranks, backend="tensorrt"))
    assert error.code == "RUN040" and "--to engine -o OUT --set build.parallel.tensor=2" in (error.help or "")
    assert "engines" not in open_model(two_ranks).describe()


def test_auto_takes_onnx_runtime_and_says_why(
    engines_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, two_ranks: Path
) -> None:
    folder = engines_of()
    monkeypatch.setattr(tensorrt_backend, "load_tensorrt", lambda prefer: library(prefer))
    monkeypatch.setattr(tensorrt_backend, "visible_gpus", lambda: ())
    model = open_model(folder)
    assert model.describe().startswith("ONNX Runtime ")
    assert model.describe().endswith("; its engines are not used: the engines need 2 NVIDIA GPUs, and none is here")
    np.testing.assert_array_equal(model.logits([[3, 4]]), open_model(two_ranks).logits([[3, 4]]))
    assert "engines" not in open_model(folder, device="cpu").describe()
    assert error_of(lambda: open_model(folder, backend="tensorrt")).code == "RUN041"
    assert error_of(lambda: open_model(folder, backend="tensorrt", device="cpu")).code == "RUN021"
    assert error_of(lambda: open_model(folder, backend="tensorrt", precision="float16")).code == "RUN022"


def test_auto_takes_the_engines_where_they_run_and_hides_no_damage(
    engines_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, two_ranks: Path
) -> None:
    """The binding tables are those of the real graphs."""
    folder = engines_of()
    monkeypatch.setattr(tensorrt_backend, "load_tensorrt", lambda prefer: library(prefer))
    monkeypatch.setattr(tensorrt_backend, "visible_gpus", lambda: (ADA, ADA))
    monkeypatch.setattr("archwright.runtime.engines.processes.start_ranks", in_threads(engines_of_weights(folder)))
    model = open_model(folder)
    assert model.describe() == "TensorRT for RTX 1.7.1, float32, 2 ranks on host memory"
    prompts = ["the model writes", "naïve"]
    answers, wanted = (each.generate(prompts, max_tokens=6, temperature=0) for each in (model, open_model(two_ranks)))
    assert [a.tokens for a in answers] == [a.tokens for a in wanted]
    (folder / "rank1/stage0.engine").write_bytes(b"engine X")
    assert error_of(lambda: open_model(folder)).code == "RUN044"


def test_inspect_shows_where_engines_run(engines_of: Callable[..., Path]) -> None:
    facts = inspect_folder(engines_of())["engines"]["rank1/stage0.engine"]
    assert facts["library"] == "tensorrt_rtx 1.7.1" and facts["built_for"] == "SM 8.9, 12.0"
    assert (
        facts["profiles"]
        == {"0": "batch 1..8, sequence 1..96, positions 1..96", "1": "batch 1..8, sequence 1..1, positions 1..96"}
        and facts["layers"] == 13
    )
    assert json.dumps(facts)


def test_the_manifest_is_still_whole(engines_of: Callable[..., Path]) -> None:
    folder = engines_of()
    listed = json.loads((folder / MANIFEST).read_text())
    assert {"rank0/stage0.engine", "rank1/stage0.engine"} < set(listed["files"])

"""`archwright doctor`: the verdict, the fixes, and every kind of absence (made by hiding what this machine has)."""

import json
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from archwright.compiler.targets.gpus import Gpu
from archwright.compiler.targets.tensorrt_loader import load_tensorrt, tensorrt_flavor, tensorrt_title
from archwright.runtime import doctor as doctor_module
from archwright.runtime.backends import onnxruntime_sessions
from archwright.runtime.doctor import Finding, doctor
from archwright.spec.errors import ArchwrightError


def set_versions(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """Pretend that each named distribution has this version; None: that it is absent."""
    real_version = metadata.version

    def version(name: str) -> str:
        found = versions[name] if name in versions else real_version(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)


def write_library(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


H100 = Gpu(name="NVIDIA H100", capability="9.0")


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """`None` in sys.modules is Python's own way to say that a module is not to be had."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)


@pytest.fixture
def library_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder whose modules come before the installed ones; neither flavor is loaded yet, or afterwards."""
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)  # so that the end of the test restores or removes the entry
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def find(findings: list[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding


def test_this_environment_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor([]) == 0
    text = capsys.readouterr().out
    assert "Archwright can work here." in text
    for name in ("python", "torch build", "onnxruntime", "gloo", "C++ compiler", "tensorrt", "disk", "sentencepiece"):
        assert name in text


def test_json_holds_the_same_findings(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(["--output-format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["works"] is True
    names = [finding["name"] for finding in report["findings"]]
    assert len(names) == len(set(names))
    assert {"python", "cores", "memory", "disk", "torch", "numpy", "pydantic"} <= set(names)
    for finding in report["findings"]:
        assert set(finding) == {"name", "status", "found", "fix"}
        assert finding["status"] == "ok" or finding["fix"] or finding["name"] == "gpu"


def test_an_absent_requirement_breaks_the_base(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_versions(monkeypatch, {"safetensors": None, "jinja2": "3.0"})
    assert doctor([]) == 1
    text = capsys.readouterr().out
    assert "broken   safetensors" in text and 'pip install "safetensors>=' in text
    assert "3.0, older than" in text
    assert text.rstrip().endswith("Archwright cannot work here: safetensors, jinja2")


def test_a_requirement_that_does_not_import_is_broken(library_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "safetensors", raising=False)
    write_library(library_folder, "safetensors", "raise OSError('libc is too old')")
    finding = find(doctor_module.check_base(), "safetensors")
    assert finding.status == "broken" and "libc is too old" in finding.found


def test_the_base_is_read_from_the_package() -> None:
    names = [name for name, _ in doctor_module.base_requirements(metadata.requires("archwright") or [])]
    assert {"torch", "onnx", "onnx-ir", "ruamel.yaml"} <= set(names)
    assert not {"onnxruntime", "pytest", "tensorrt"} & set(names)


@pytest.mark.parametrize(
    ("version", "key"), [("2.13.0+cpu", (2, 13, 0)), ("0.1.12", (0, 1, 12)), ("3.0rc1", (3, 0)), ("unknown", ())]
)
def test_version_key(version: str, key: tuple[int, ...]) -> None:
    assert doctor_module.version_key(version) == key


def test_no_runtime_is_missing_and_not_broken(monkeypatch: pytest.MonkeyPatch, no_tensorrt: None) -> None:
    set_versions(monkeypatch, {"onnxruntime": None, "onnxruntime-gpu": None, "transformers": None})
    findings = [finding for check in doctor_module.CHECKS for finding in check()]
    for name in ("onnxruntime", "tensorrt", "transformers"):
        assert find(findings, name).status == "missing"
    assert not [finding for finding in findings if finding.status == "broken"]
    assert "archwright[cpu]" in find(findings, "onnxruntime").fix


def test_two_runtimes_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    set_versions(monkeypatch, {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"})
    (finding,) = doctor_module.check_onnxruntime()
    assert finding.status == "warning" and "uninstall" in finding.fix


@pytest.mark.parametrize(("problem", "status"), [(None, "ok"), ("no driver", "warning")])
def test_whether_graphs_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch, problem: str | None, status: str) -> None:
    set_versions(monkeypatch, {"onnxruntime": None, "onnxruntime-gpu": "1.31.1"})
    monkeypatch.setattr(onnxruntime_sessions, "cuda_problem", lambda: problem)
    finding = find(doctor_module.check_onnxruntime(), "onnxruntime gpu")
    assert finding.status == status and (problem or "on the GPU") in finding.found
    assert bool(finding.fix) is bool(problem)


def test_no_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module.shutil, "which", lambda name: None)
    (finding,) = doctor_module.check_compiler()
    assert finding.status == "warning" and "torch.compile stays off" in finding.found


def test_little_room_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "free_memory_bytes", lambda: 2**30)
    finding = find(doctor_module.check_machine(), "memory")
    assert finding == Finding(name="memory", status="warning", found="1.0 GiB free", fix=finding.fix)
    assert finding.fix


def test_an_absent_tensorrt_names_the_extras(no_tensorrt: None) -> None:
    with pytest.raises(ArchwrightError) as caught:
        load_tensorrt()
    assert caught.value.code == "BUILD001"
    for word in ("archwright[gpu]", "archwright[tensorrt-rtx]", "NVIDIA", "SM 9.0"):
        assert word in str(caught.value)


@pytest.mark.parametrize("code", ["raise OSError('libcuda.so.1: no such file')", "import a_part_that_it_lacks"])
def test_a_tensorrt_that_does_not_load_says_why(
    library_folder: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    write_library(library_folder, "tensorrt", code)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ArchwrightError, match=r"tensorrt is installed and does not load: .*(libcuda|a_part)"):
        load_tensorrt()


def test_the_full_library_comes_first(library_folder: Path) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        write_library(library_folder, name, "__version__ = '11.0'")
    module = load_tensorrt()
    assert tensorrt_flavor(module) == "tensorrt"
    assert tensorrt_title(module) == "TensorRT 11.0"


def test_of_two_libraries_the_one_that_is_asked_for_is_taken(library_folder: Path) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        write_library(library_folder, name, "__version__ = '11.0'")
    assert load_tensorrt().__name__ == "tensorrt"
    assert load_tensorrt("tensorrt_rtx").__name__ == "tensorrt_rtx"


def test_rtx_serves_where_it_is_alone(library_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    write_library(library_folder, "tensorrt_rtx", "__version__ = '1.7.1'")
    assert tensorrt_title(load_tensorrt()) == "TensorRT for RTX 1.7.1"
    (finding,) = doctor_module.check_tensorrt()
    assert finding.status == "ok"


def test_rtx_does_not_serve_hopper(library_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    write_library(library_folder, "tensorrt_rtx", "__version__ = '1.7.1'")
    monkeypatch.setattr(doctor_module, "visible_gpus", lambda: (H100,))
    (finding,) = doctor_module.check_tensorrt()
    assert finding.status == "warning" and "SM 9.0" in finding.found and "archwright[gpu]" in finding.fix


def test_the_full_library_needs_a_gpu(library_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_library(library_folder, "tensorrt", "__version__ = '11.0'")
    monkeypatch.setattr(doctor_module, "visible_gpus", lambda: ())
    (finding,) = doctor_module.check_tensorrt()
    assert finding.status == "warning" and "needs a GPU" in finding.found
    monkeypatch.setattr(doctor_module, "visible_gpus", lambda: (H100,))
    (finding,) = doctor_module.check_tensorrt()
    assert finding.status == "ok"


def test_a_module_that_the_loader_did_not_give_is_a_programming_error() -> None:
    with pytest.raises(AssertionError):
        tensorrt_flavor(ModuleType("onnxruntime"))

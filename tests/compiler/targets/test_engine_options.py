"""What `build.engine` and the machine decide about an engine: flags, GPUs, timings, progress, interruption."""

import ctypes
import signal
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest

from archwright.compiler.targets import gpus, tensorrt_config
from archwright.compiler.targets.gpus import Gpu, visible_gpus
from archwright.compiler.targets.structural_hash import by_structure, structural_hash
from archwright.compiler.targets.tensorrt_config import TimingCache, built_for, default_profiles, flags_of
from archwright.compiler.targets.tensorrt_engine import EngineBuilder
from archwright.compiler.targets.tensorrt_progress import BuildLog, Phase, interruptible
from archwright.spec import ArchwrightError
from archwright.spec.models import Build
from archwright.spec.models.deployment import Engine


@pytest.fixture(scope="session")
def trt():
    return pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install archwright[tensorrt-rtx]"
    )


def builder_for(trt: Any, engine: Engine, watch: Any = lambda phase: None) -> EngineBuilder:
    return EngineBuilder(profiles=default_profiles(Build(max_batch=4), 32), engine=engine, library=trt, watch=watch)


def full(**members: Any) -> ModuleType:
    """A stand-in for full TensorRT, which this machine cannot install."""
    library = ModuleType("tensorrt")
    library.__dict__.update({"__version__": "11.2"} | members)
    return library


def test_the_ranks_of_a_plan_share_a_structure_and_nothing_else_does(make_spec, export):
    two = export(make_spec(), tensor=2)
    ranks = [two.folder / f"rank{rank}" / "stage0.onnx" for rank in range(2)]
    (group,) = by_structure(ranks).values()
    assert group == ranks
    first, second = (onnx.load(path, load_external_data=False) for path in ranks)
    assert first.SerializeToString() != second.SerializeToString(), "the rank stands in the metadata"
    found = {structural_hash(first), structural_hash(second, {"level": 3}), structural_hash(second, {"level": 4})}
    for spec, options in ((make_spec(), {"tensor": 2, "precision": "float16"}), (make_spec(layers=1), {"tensor": 2})):
        found.add(structural_hash(onnx.load(export(spec, **options).graph, load_external_data=False)))
    assert len(found) == 5
    tensor = next(each for each in second.graph.initializer if each.external_data)
    tensor.dims[0] += 1
    assert structural_hash(second) not in found


def test_an_engine_for_named_gpus_says_so_and_the_check_is_shared(trt, make_spec, export, monkeypatch):
    """Version-compatible, both ranks by one builder."""
    model = export(make_spec(layers=1), tensor=2, precision="float16")
    options = {"version_compatible": True, "compute_capabilities": (8.9, 12.0)}
    phases: list[Phase] = []
    checked: list[Any] = []
    check = tensorrt_engine_check()
    monkeypatch.setattr(f"{EngineBuilder.__module__}.check_network", lambda *a: checked.append(a) or check(*a))
    builder = builder_for(trt, Engine(**options), phases.append)
    summaries = [builder.build(model.folder / f"rank{rank}" / "stage0.onnx", model.planned) for rank in range(2)]
    assert len(checked) == 1, "two ranks of one structure are checked once"
    assert summaries[0].structure == summaries[1].structure
    assert summaries[0].path.read_bytes() != summaries[1].path.read_bytes()
    facts = summaries[1].facts
    assert facts["compute_capabilities"] == ["8.9", "12.0"] and facts["gpu"] is None
    assert facts["flags"] == ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "REQUIRE_USER_ALLOCATION"]
    assert facts["library"] == "tensorrt_rtx" and facts["version"] == trt.__version__
    assert facts["layers"] == dict(summaries[0].layers) and len(facts["profiles"]) == 2
    assert phases[0].done == 0 and phases[-1].steps is None
    assert {phase.done for phase in phases} > {0, 1, 2}


def tensorrt_engine_check() -> Any:
    from archwright.compiler.targets.network_check import check_network

    return check_network


def test_ctrl_c_stops_tensorrt_and_leaves_nothing(trt, make_spec, export):
    model = export(make_spec(), precision="float16")
    before = sorted(model.graph.parent.iterdir())

    def interrupt(phase: Phase) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        builder_for(trt, Engine(), interrupt).build(model.graph, model.planned)
    assert sorted(model.graph.parent.iterdir()) == before


def test_an_interrupted_call_is_told_and_waited_for():
    stop, ended = threading.Event(), threading.Event()

    def call() -> None:
        signal.raise_signal(signal.SIGINT)
        assert stop.wait(30)
        time.sleep(0.05)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        interruptible(call, stop)
    assert ended.is_set()
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0, threading.Event())


class Config:
    """A builder configuration of full TensorRT, as far as timings go."""

    def __init__(self, accepts: bool = True) -> None:
        self.accepts = accepts
        self.cache: Any = None

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: content + b"+", content=content)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if not self.accepts and cache.content:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


def test_timings_go_from_rank_to_rank_through_the_file(tmp_path):
    path, log = tmp_path / "timings.bin", BuildLog()
    for _ in range(2):  # two builds, each of two ranks
        timings = TimingCache(full(), str(path))
        for _ in range(2):
            config = Config()
            timings.attach(config, log)
            timings.keep(config)
    assert path.read_bytes() == b"++++"
    timings.attach(Config(accepts=False), log)
    assert log.lines == ["warning  the timings in timings.bin are another GPU's or version's: they begin anew"]


def test_a_library_that_times_nothing_says_so_in_the_log(trt, tmp_path, make_spec, export):
    model = export(make_spec(layers=1), precision="float16")
    path = tmp_path / "timings.bin"
    builder_for(trt, Engine(timing_cache=str(path))).build(model.graph, model.planned)
    assert not path.exists()
    log = model.graph.with_suffix(".log").read_text()
    assert "times no kernels: build.engine.timing_cache is not used" in log
    assert "rank0/stage0.onnx" in log and str(tmp_path) not in log, "where it was built is nobody's business"


def test_what_rtx_cannot_promise_is_refused():
    rtx = ModuleType("tensorrt_rtx")
    rtx.__dict__["__version__"] = "1.7.1"
    with pytest.raises(ArchwrightError, match=r"BUILD034 .* does not know `build\.engine\.hardware_compatibility`"):
        built_for(rtx, Engine(hardware_compatibility="ampere_plus"))
    assert built_for(rtx, Engine()).capabilities == ("8.0", "8.6", "8.9", "12.0", "12.1")


H100 = Gpu(name="NVIDIA H100", capability="9.0")


def test_full_tensorrt_builds_for_the_gpu_that_is_here(monkeypatch):
    monkeypatch.setattr(tensorrt_config, "visible_gpus", lambda: (H100,))
    assert built_for(full(), Engine()).gpu == H100
    assert built_for(full(), Engine(compute_capabilities=(9.0,))).capabilities == ("9.0",)
    with pytest.raises(ArchwrightError, match=r"BUILD034 TensorRT 11\.2 builds for .*NVIDIA H100 \(SM 9\.0\)"):
        built_for(full(), Engine(compute_capabilities=(8.9,)))
    assert flags_of(full(), Engine(version_compatible=True)) == ("VERSION_COMPATIBLE",)
    assert flags_of(full(), Engine()) == ()


class Driver:
    """Two GPUs, as `libcuda` answers."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index + 40
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        name.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: ctypes.c_int) -> int:
        number._obj.value = {75: device.value - 32, 76: 9}[attribute]
        return 0


def test_the_driver_names_the_gpus(monkeypatch):
    assert [str(gpu) for gpu in visible_gpus(Driver())] == ["GPU 40 (SM 8.9)", "GPU 41 (SM 9.9)"]
    broken = SimpleNamespace(cuInit=lambda flags: 100)
    assert visible_gpus(broken) == ()

    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(gpus.ctypes, "CDLL", absent)
    assert visible_gpus() == ()

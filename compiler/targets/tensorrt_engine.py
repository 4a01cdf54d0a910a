"""ONNX rank graph → TensorRT network, checked against graph and plan (`targets.network_check`) → engine file.

Works with TensorRT and with TensorRT for RTX (`targets.tensorrt_loader`). The latter parses and builds without a GPU.

    rank0/stage0.engine   the engine. Equal inputs give engines that differ in some thousand bytes: TensorRT's own doing
    rank0/stage0.log      what TensorRT said meanwhile
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from archwright.compiler.targets.network_check import Planned, check_network, layer_types, layers_of
from archwright.compiler.targets.structural_hash import structural_hash
from archwright.compiler.targets.tensorrt_config import (
    BuiltFor,
    TimingCache,
    built_for,
    configure,
    default_profiles,
    flags_of,
)
from archwright.compiler.targets.tensorrt_loader import load_tensorrt, tensorrt_flavor, tensorrt_title
from archwright.compiler.targets.tensorrt_progress import BuildLog, Watch, interruptible, monitor, shared_logger
from archwright.spec import ArchwrightError
from archwright.spec.files import atomic_write
from archwright.spec.models import Profile
from archwright.spec.models.deployment import Engine

__all__ = ["EngineBuilder", "EngineSummary", "allow_decomposition", "build_engine", "default_profiles", "parse_graph"]


@dataclass(frozen=True, kw_only=True)
class EngineSummary:
    """What was built. layers: of the parsed network, by type. seconds: parsing and building.

    structure: structural hash of graph and configuration. facts: for the manifest, what says where the engine runs.
    """

    path: Path
    library: str
    layers: Mapping[str, int]
    seconds: float
    num_bytes: int
    structure: str
    facts: Mapping[str, Any]


@dataclass(kw_only=True)
class EngineBuilder:
    """Builds the engines of an artifact's ranks, one after the other.

    Engines share the timings of kernels, and ranks of equal structure the check of the network against the plan.
    library: `tensorrt` or `tensorrt_rtx`. watch: is told of TensorRT's phases.
    """

    profiles: Sequence[Profile]
    engine: Engine
    library: ModuleType
    watch: Watch = lambda phase: None
    _layers: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])

    def __post_init__(self) -> None:
        """Raises ArchwrightError BUILD034 where this library cannot build for what the spec names."""
        self.target: BuiltFor = built_for(self.library, self.engine)
        self._timings = TimingCache(self.library, self.engine.timing_cache)

    def facts(self) -> dict[str, Any]:
        """What is the same for all engines, as plain JSON values."""
        gpu, engine = self.target.gpu, self.engine
        return {
            "library": tensorrt_flavor(self.library),
            "version": self.library.__version__,
            "compute_capabilities": list(self.target.capabilities),
            "gpu": None if gpu is None else {"name": gpu.name, "compute_capability": gpu.capability},
            "profiles": [profile.model_dump(mode="json") for profile in self.profiles],
            "flags": list(flags_of(self.library, engine)),
            "hardware_compatibility": engine.hardware_compatibility,
            "optimization_level": engine.optimization_level,
            "workspace_gib": engine.workspace_gib,
        }

    def structure(self, graph: onnx.ModelProto) -> str:
        """The structural hash of a graph under this configuration."""
        return structural_hash(graph, self.facts())

    def build(self, graph: Path, planned: Planned) -> EngineSummary:
        """Write engine and log beside the graph, each whole or not at all. planned: what the plan says of the network.

        Raises ArchwrightError BUILD030 where TensorRT cannot parse the graph, BUILD031 where the parsed network is not
        what the graph and the plan say, BUILD032 where it cannot build, BUILD033 where it does not start. Interrupted,
        TensorRT stops within a step, and nothing is written.
        """
        trt, start = self.library, time.monotonic()
        log, logger = BuildLog(folder=graph.parent.parent), shared_logger(trt)
        logger.messages.clear()
        logger.log_to = log
        try:
            builder = _builder(trt, logger)
            network = parse_graph(trt, builder, graph)
            structure = self._checked(network, graph, planned)
            allow_decomposition(trt, network)
            config = configure(trt, builder, network, self.profiles, self.engine)
            self._timings.attach(config, log)
            stop = threading.Event()
            config.progress_monitor = watcher = monitor(trt, self.watch, stop)
            serialized = interruptible(lambda: builder.build_serialized_network(network, config), stop)
            del watcher  # lives as long as the build
        finally:
            logger.log_to = None
        if serialized is None:
            reasons = "; ".join(logger.messages) or "TensorRT gave no reason"
            message = f"{tensorrt_title(trt)} cannot build the engine: {reasons}"
            raise ArchwrightError("BUILD032", message, where=str(graph))
        self._timings.keep(config)
        path, content = graph.with_suffix(".engine"), memoryview(serialized)
        atomic_write(path, content)
        log.write(graph.with_suffix(".log"))
        return EngineSummary(
            path=path,
            library=tensorrt_title(trt),
            layers=self._layers[structure],
            seconds=time.monotonic() - start,
            num_bytes=content.nbytes,
            structure=structure,
            facts=self.facts() | {"structural_hash": structure, "layers": self._layers[structure]},
        )

    def _checked(self, network: Any, graph: Path, planned: Planned) -> str:
        """The structure of a graph whose network is as planned; looked at once for ranks that share it."""
        model = onnx.load(graph, load_external_data=False)
        structure = self.structure(model)
        if structure not in self._layers:
            if problems := check_network(network, model.graph, planned):
                help = "this is a fault of the exporter or of TensorRT; please report it with the graph"
                raise ArchwrightError("BUILD031", "; ".join(problems), where=str(graph), help=help)
            self._layers[structure] = layer_types(network)
        return structure


def build_engine(
    graph: Path, profiles: Sequence[Profile], engine: Engine, planned: Planned, *, library: ModuleType | None = None
) -> EngineSummary:
    """Build the engine of a single graph (`EngineBuilder.build`).

    library: by default the one that is installed. Raises ArchwrightError BUILD001 without TensorRT, BUILD030 to
    BUILD034.
    """
    library = load_tensorrt() if library is None else library
    return EngineBuilder(profiles=profiles, engine=engine, library=library).build(graph, planned)


def _builder(trt: ModuleType, logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the bindings' way of saying that the library gave no object
        reasons = "; ".join(logger.messages) or str(error)
        help = "TensorRT needs a GPU and its driver to build; TensorRT for RTX (archwright[tensorrt-rtx]) needs neither"
        raise ArchwrightError("BUILD033", f"{tensorrt_title(trt)} does not start: {reasons}", help=help) from error


def parse_graph(trt: ModuleType, builder: Any, graph: Path) -> Any:
    """The network of a graph file; its types are those of the graph."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if parser.parse_from_file(str(graph)):
        return network
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    reasons = [f"`{e.node_name()}` ({e.node_operator()}): {e.desc()}" for e in errors] or ["the parser gave no reason"]
    raise ArchwrightError(
        "BUILD030",
        f"{tensorrt_title(trt)} cannot parse the graph: " + "; ".join(reasons),
        where=str(graph),
        help="`archwright verify` checks the graph; this version of TensorRT may be too old for it",
    )


def allow_decomposition(trt: ModuleType, network: Any) -> None:
    """Let TensorRT take attention apart where it has no fused kernel: float32, unusual head sizes, many on SM 9.0.

    The ONNX attribute for this makes ONNX Runtime refuse the graph, so it is set on the parsed network.
    """
    for layer in layers_of(network):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # Layers come back as the base class, which hides the attention that this one belongs to.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True

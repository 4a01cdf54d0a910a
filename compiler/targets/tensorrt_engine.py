"""ONNX rank graph → TensorRT network, checked against graph and plan (`targets.network_check`) → engine file.

Works with TensorRT and with TensorRT for RTX (`targets.tensorrt_loader`). The latter parses and builds without a GPU;
there is no timing cache then, since nothing is timed.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from archwright.compiler.targets.network_check import Planned, check_network, layer_types, layers_of
from archwright.compiler.targets.tensorrt_loader import load_tensorrt, tensorrt_title
from archwright.spec import ArchwrightError
from archwright.spec.files import atomic_write
from archwright.spec.models import Build, Profile
from archwright.spec.models.deployment import Engine, Range

PREFILL_TOKENS = 2048
"""Longest piece of a prompt in one step of the default profiles. The memory of a context grows with it (the logits of
every position are an output); longer prompts run in pieces, which the cache makes exact."""


@dataclass(frozen=True, kw_only=True)
class EngineSummary:
    """What was built. layers: of the parsed network, by type. seconds: parsing and building."""

    path: Path
    library: str
    layers: Mapping[str, int]
    seconds: float
    num_bytes: int


CALL_BYTES = 1 << 30
"""Most that a prefill step may copy of experts' weights."""


def default_profiles(build: Build, capacity: int, *, token_bytes: int = 0) -> tuple[Profile, ...]:
    """The spec's profiles, or one for prefill and one for decode from its limits.

    Two, since one profile over both gives poor kernels for single tokens. token_bytes: what a rank's graph copies of
    experts' weights for each token, see `stages.gathered_values`: the pieces of a prefill are shorter then.
    """
    if build.profiles:
        return build.profiles
    piece = min(PREFILL_TOKENS, capacity)
    if token_bytes:
        piece = min(piece, max(1, CALL_BYTES // (build.max_batch * token_bytes)))
    positions = Range(min=1, opt=max(1, capacity // 2), max=capacity)
    prefill = Profile(
        batch=Range(min=1, opt=1, max=build.max_batch),
        sequence=Range(min=1, opt=max(1, piece // 4), max=piece),
        positions=positions,
    )
    decode = Profile(
        batch=Range(min=1, opt=build.max_batch, max=build.max_batch),
        sequence=Range(min=1, opt=1, max=1),
        positions=positions,
    )
    return prefill, decode


def build_engine(
    graph: Path, profiles: Sequence[Profile], engine: Engine, planned: Planned, *, library: ModuleType | None = None
) -> EngineSummary:
    """Build the engine of a rank graph and write it beside the graph, whole or not at all (`stage0.engine`).

    planned: what the plan says of the network. library: `tensorrt` or `tensorrt_rtx`; by default the one that is
    installed. Raises ArchwrightError BUILD001 without TensorRT, BUILD030 where it cannot parse the graph, BUILD031
    where the parsed network is not what the graph and the plan say, BUILD032 where it cannot build, BUILD033 where it
    does not start.
    """
    trt = load_tensorrt() if library is None else library
    start = time.monotonic()
    logger = _logger(trt)
    logger.messages.clear()
    builder = _builder(trt, logger)
    network = parse_graph(trt, builder, graph)
    model = onnx.load(graph, load_external_data=False)
    if problems := check_network(network, model.graph, planned):
        help = "this is a fault of the exporter or of TensorRT; please report it with the graph"
        raise ArchwrightError("BUILD031", "; ".join(problems), where=str(graph), help=help)
    allow_decomposition(trt, network)
    config = _configure(trt, builder, network, profiles, engine)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        reasons = "; ".join(logger.messages) or "TensorRT gave no reason"
        raise ArchwrightError("BUILD032", f"{tensorrt_title(trt)} cannot build the engine: {reasons}", where=str(graph))
    path = graph.with_suffix(".engine")
    content = memoryview(serialized)
    atomic_write(path, content)
    return EngineSummary(
        path=path,
        library=tensorrt_title(trt),
        layers=layer_types(network),
        seconds=time.monotonic() - start,
        num_bytes=content.nbytes,
    )


def _builder(trt: ModuleType, logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the bindings' way of saying that the library gave no object
        reasons = "; ".join(logger.messages) or str(error)
        help = "TensorRT needs a GPU and its driver to build; TensorRT for RTX (archwright[tensorrt-rtx]) needs neither"
        raise ArchwrightError("BUILD033", f"{tensorrt_title(trt)} does not start: {reasons}", help=help) from error


@cache
def _logger(trt: ModuleType) -> Any:
    """One logger a process: TensorRT keeps the first it sees and complains about others. It collects errors."""

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages.append(msg.strip())

    return Collector()


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


def _configure(trt: ModuleType, builder: Any, network: Any, profiles: Sequence[Profile], engine: Engine) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = engine.optimization_level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(engine.workspace_gib * (1 << 30)))
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 in the spec means float32
    for profile in profiles:
        limits = builder.create_optimization_profile()
        ranges = {"batch": profile.batch, "sequence": profile.sequence, "positions": profile.positions}
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            sizes = [ranges.get(tensor.get_dimension_name(dim), size) for dim, size in enumerate(tensor.shape)]
            shapes = [
                [getattr(size, bound) if isinstance(size, Range) else size for size in sizes]
                for bound in ("min", "opt", "max")
            ]
            limits.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(limits)
    return config

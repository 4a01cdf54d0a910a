"""ONNX rank graph → TensorRT network, checked against the graph → engine file.

Works with TensorRT and with TensorRT for RTX (`targets.tensorrt_loader`). The latter parses and builds without a GPU;
there is no timing cache then, since nothing is timed.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from onnx import TensorProto

from archwright.compiler.targets.merge import COLLECTIVE
from archwright.compiler.targets.tensorrt_loader import load_tensorrt, tensorrt_title
from archwright.spec import ArchwrightError
from archwright.spec.files import atomic_write
from archwright.spec.models import Build, Profile
from archwright.spec.models.deployment import Engine, Range

PREFILL_TOKENS = 2048
"""Longest piece of a prompt in one step of the default profiles. The memory of a context grows with it (the logits of
every position are an output); longer prompts run in pieces, which the cache makes exact."""

TYPES: Mapping[int, str] = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT64: "INT64",
}
"""ONNX → TensorRT, for the inputs and outputs of our graphs."""

LAYERS: Mapping[str, str] = {
    "Attention": "ATTENTION_INPUT",
    "TensorScatter": "KV_CACHE_UPDATE",
    "RotaryEmbedding": "ROTARY_EMBEDDING",
    COLLECTIVE: "DIST_COLLECTIVE",
}
"""Operators that must arrive in the network one to one."""


@dataclass(frozen=True, kw_only=True)
class EngineSummary:
    """What was built. layers: of the parsed network, by type. seconds: parsing and building."""

    path: Path
    library: str
    layers: Mapping[str, int]
    seconds: float
    num_bytes: int


def default_profiles(build: Build, capacity: int) -> tuple[Profile, ...]:
    """The spec's profiles, or one for prefill and one for decode from its limits.

    Two, since one profile over both gives poor kernels for single tokens.
    """
    if build.profiles:
        return build.profiles
    piece = min(PREFILL_TOKENS, capacity)
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
    graph: Path, profiles: Sequence[Profile], engine: Engine, *, library: ModuleType | None = None
) -> EngineSummary:
    """Build the engine of a rank graph and write it beside the graph, whole or not at all (`stage0.engine`).

    library: `tensorrt` or `tensorrt_rtx`; the one that is installed by default.
    Raises ArchwrightError BUILD001 without TensorRT, BUILD030 where it cannot parse the graph, BUILD031 where the
    parsed network is not what the graph says, BUILD032 where it cannot build, BUILD033 where it does not start.
    """
    trt = load_tensorrt() if library is None else library
    start = time.monotonic()
    logger = _logger(trt)
    logger.messages.clear()
    builder = _builder(trt, logger)
    network = parse_graph(trt, builder, graph)
    model = onnx.load(graph, load_external_data=False)
    if problems := check_network(network, model.graph):
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


def layers_of(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def layer_types(network: Any) -> dict[str, int]:
    return dict(sorted(Counter(layer.type.name for layer in layers_of(network)).items()))


def allow_decomposition(trt: ModuleType, network: Any) -> None:
    """Let TensorRT take attention apart where it has no fused kernel: float32, unusual head sizes, many on SM 9.0.

    The ONNX attribute for this makes ONNX Runtime refuse the graph, so it is set on the parsed network.
    """
    for layer in layers_of(network):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # Layers come back as the base class, which hides the attention that this one belongs to.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def check_network(network: Any, graph: onnx.GraphProto) -> list[str]:
    """Where the parsed network differs from its graph: the parser accepts some inputs and then ignores them."""
    inputs = {t.name: t for t in (network.get_input(index) for index in range(network.num_inputs))}
    outputs = {t.name: t for t in (network.get_output(index) for index in range(network.num_outputs))}
    problems: list[str] = []
    used = _used(network, outputs)
    for kind, values, tensors in (("input", graph.input, inputs), ("output", graph.output, outputs)):
        for value in values:
            expected = TYPES.get(value.type.tensor_type.elem_type, "another type than our graphs have")
            if value.name not in tensors:
                problems.append(f"{kind} `{value.name}` is not in the network")
            elif (found := tensors[value.name].dtype.name) != expected:
                problems.append(f"{kind} `{value.name}` is {found}, not {expected}")
            elif value.name not in used:
                problems.append(f"{kind} `{value.name}` has no effect on any output")
    operators, types = Counter(node.op_type for node in graph.node), layer_types(network)
    problems += [
        f"{operators[op]} {op} became {types.get(layer, 0)} {layer} layers"
        for op, layer in LAYERS.items()
        if operators[op] != types.get(layer, 0)
    ]
    for layer in layers_of(network):
        if layer.type.name == LAYERS["TensorScatter"]:
            past, present = layer.get_input(0).name, layer.get_output(0).name
            if past not in inputs or present not in outputs or past.replace("past.", "present.") != present:
                problems.append(f"cache `{past}` is not updated in place (its result is `{present}`)")
    return problems


def _used(network: Any, outputs: Mapping[str, Any]) -> set[str]:
    """Names of the tensors that an output depends on."""
    makers: dict[str, list[str]] = {}
    for layer in layers_of(network):
        tensors = [layer.get_input(index) for index in range(layer.num_inputs)]
        names = [tensor.name for tensor in tensors if tensor is not None]
        makers |= {layer.get_output(index).name: names for index in range(layer.num_outputs)}
    found: set[str] = set()
    waiting = list(outputs)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += makers.get(name, [])
    return found


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

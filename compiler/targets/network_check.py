"""Whether the network that TensorRT parsed is the Program that was planned.

The parser accepts inputs that it then ignores, and a graph may differ from its plan: the network is compared with both.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto

from archwright.compiler.interpreters.cost_ops import run_cost
from archwright.compiler.ir import Plan
from archwright.compiler.targets.merge import COLLECTIVE
from archwright.compiler.targets.stages import DEFAULT_OPTIONS, GraphOptions, stage_of

TYPES: Mapping[int, str] = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT64: "INT64",
}
"""ONNX → TensorRT, for the inputs and outputs of our graphs."""

ATTENTION, CACHE = "ATTENTION_INPUT", "KV_CACHE_UPDATE"
LAYERS: Mapping[str, tuple[str, ...]] = {
    ATTENTION: ("Attention", "TRT_Attention"),
    CACHE: ("TensorScatter", "TRT_KVCacheUpdate"),
    "ROTARY_EMBEDDING": ("RotaryEmbedding",),
    "DIST_COLLECTIVE": (COLLECTIVE,),
}
"""Layers, and the operators that must arrive in the network as such one to one."""
LENGTHS_INPUT = 6
"""Of an attention layer: the lengths of keys and values. The parser drops them where they stand at a wrong input."""


PLANNED_TYPES: Mapping[str, str] = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a plan says of a rank's network, read off the Program and not off any graph.

    caches: name (`0.key`) → the sizes of past and present, None for those that a call decides.
    with_lengths: of the attentions, those that read how many keys each row has, in place of a mask.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    caches: Mapping[str, tuple[int | None, ...]]
    collectives: int
    attentions: int
    with_lengths: int = 0


def planned_network(
    plan: Plan, *, precision: str, capacity: int, stage: int = 0, options: GraphOptions = DEFAULT_OPTIONS
) -> Planned:
    """Inputs and outputs of a stage with their TensorRT types, caches, and how many layers of which kind there must
    be."""
    part = stage_of(plan, stage)
    splits = {name: site.param.splits for name, site in plan.program.sites().items()}
    costs = run_cost(part.program, batch=1, sequence=1, visible=1, last=part.takes_index(options), splits=splits).costs
    inputs = part.inputs(precision=precision, capacity=capacity, options=options)
    outputs = part.outputs(precision=precision, capacity=capacity, options=options)
    caches = {
        name: tuple(size if isinstance(size, int) else None for size in inputs[f"past.{name}"].shape)
        for name in part.caches.values()
    }
    attentions = sum(cost.op == "attention" for cost in costs)
    dialect = options.dialect
    masked = len(dialect.portable_layers(part.program, precision)) if dialect.target == "tensorrt" else attentions
    return Planned(
        inputs={name: PLANNED_TYPES[spec.dtype] for name, spec in inputs.items()},
        outputs={name: PLANNED_TYPES[spec.dtype] for name, spec in outputs.items()},
        caches=caches,
        collectives=sum(any(not each.backward for each in cost.collectives) for cost in costs),
        attentions=attentions,
        with_lengths=attentions - masked,
    )


def layers_of(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def layer_types(network: Any) -> dict[str, int]:
    return dict(sorted(Counter(layer.type.name for layer in layers_of(network)).items()))


def check_network(network: Any, graph: onnx.GraphProto, planned: Planned) -> list[str]:
    """Where the parsed network differs from its graph or from the plan, a sentence each."""
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
        f"{sum(operators[op] for op in ops)} {' and '.join(ops)} became {types.get(layer, 0)} {layer} layers"
        for layer, ops in LAYERS.items()
        if sum(operators[op] for op in ops) != types.get(layer, 0)
    ]
    for layer in layers_of(network):
        if layer.type.name == CACHE:
            past, present = layer.get_input(0).name, layer.get_output(0).name
            if past not in inputs or present not in outputs or past.replace("past.", "present.") != present:
                problems.append(f"cache `{past}` is not updated in place (its result is `{present}`)")
    problems += _against_plan(inputs, outputs, types, planned)
    found = sum(_has_lengths(layer) for layer in layers_of(network) if layer.type.name == ATTENTION)
    if found != planned.with_lengths:
        problems.append(f"{found} attentions read the lengths of their rows, planned are {planned.with_lengths}")
    return problems


def _has_lengths(layer: Any) -> bool:
    return layer.num_inputs > LENGTHS_INPUT and layer.get_input(LENGTHS_INPUT) is not None


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


def _against_plan(
    inputs: Mapping[str, Any], outputs: Mapping[str, Any], types: Mapping[str, int], planned: Planned
) -> Iterator[str]:
    for kind, expected, tensors in (("input", planned.inputs, inputs), ("output", planned.outputs, outputs)):
        found = {name: tensor.dtype.name for name, tensor in tensors.items()}
        for name in sorted(expected.keys() ^ found.keys()):
            yield f"{kind} `{name}` is " + ("planned and missing" if name in expected else "not planned")
        for name in sorted(expected.keys() & found.keys()):
            if found[name] != expected[name]:
                yield f"{kind} `{name}` is {found[name]}, planned is {expected[name]}"
    for name, sizes in planned.caches.items():
        shape = [-1 if size is None else size for size in sizes]  # TensorRT writes -1 for a size that a call decides
        for tensor in (inputs.get(f"past.{name}"), outputs.get(f"present.{name}")):
            if tensor is not None and list(tensor.shape) != shape:
                yield f"`{tensor.name}` is {list(tensor.shape)}, planned is {shape}"
    for layer, number in (
        ("DIST_COLLECTIVE", planned.collectives),
        (CACHE, len(planned.caches)),
        (ATTENTION, planned.attentions),
    ):
        if types.get(layer, 0) != number:
            yield f"there are {types.get(layer, 0)} {layer} layers, planned are {number}"

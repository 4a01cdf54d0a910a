"""Plan → one ONNX graph a rank, with its weights as external data beside it.

    folder/rank0/stage0.onnx   the graph: no torch and no weights are needed to write it
    folder/rank0/stage0.data   the rank's slices, streamed from the model's weights one tensor at a time

All ranks of a tensor group have the same graph, but for the rank in its metadata; their data differ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from archwright.compiler.interpreters.onnx_ops import (
    DTYPES,
    OPSET,
    External,
    OnnxOps,
    Size,
    Tensor,
)
from archwright.compiler.interpreters.recording import Recording, plain
from archwright.compiler.ir import Plan, Program, State, Step
from archwright.compiler.ir.program import instance_of
from archwright.compiler.targets.rank_data import Placed, write_rank_data
from archwright.compiler.weights.streaming import Weights
from archwright.spec import ArchwrightError
from archwright.spec.manifest import FileEntry

IR_VERSION = 12
ALIGNMENT = 4096
"""Of every tensor in the data file: a page, so that each can be mapped by itself."""


@dataclass(frozen=True, kw_only=True)
class RankGraph:
    """The graph of any rank of a tensor group, and the layout of its data file.

    operations: name of the value (and node) that each operation of the Program gave, in program order.
    """

    model: onnx.ModelProto
    layout: tuple[Placed, ...]
    operations: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Export:
    """The graph of each rank. data: hash and size of the data file beside each, by its path, where it was written."""

    graphs: tuple[Path, ...]
    data: Mapping[Path, FileEntry]


def graph_path(folder: Path, rank: int, stage: int = 0) -> Path:
    """Where the graph of a rank lies in an artifact; its data and its engine differ in the suffix."""
    return folder / f"rank{rank}" / f"stage{stage}.onnx"


def export_graphs(
    plan: Plan,
    weights: Weights | None,
    folder: Path,
    *,
    precision: str,
    capacity: int,
    spec_digest: str = "",
) -> Export:
    """Write `rank{r}/stage0.onnx` and `rank{r}/stage0.data` of every rank into `folder`.

    weights: None writes the graphs alone, which is enough to look at shapes and layers.
    precision: float32, float16 or bfloat16, of weights, activations and caches; logits are float32 in each.
    capacity: rows of the KV caches, at most the model's positions.
    The bytes depend on the arguments alone. Raises ArchwrightError BUILD010 where the capacity is out of range.
    """
    if not 1 <= capacity <= plan.program.max_positions:
        raise ArchwrightError(
            "BUILD010",
            f"a cache of {capacity} positions does not fit a model of {plan.program.max_positions}",
            help=f"set build.max_positions to 1..{plan.program.max_positions}",
        )
    degrees = {"tensor": plan.degrees.tensor}
    graph = emit_graph(plan.local, precision=precision, capacity=capacity, degrees=degrees)
    paths: list[Path] = []
    for rank in range(plan.degrees.world):
        path = graph_path(folder, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"spec_digest": spec_digest, "precision": precision, "capacity": capacity, "rank": rank, "stage": 0}
        facts |= {f"degrees.{axis}": degree for axis, degree in degrees.items()}
        onnx.helper.set_model_props(graph.model, {f"archwright.{key}": str(value) for key, value in facts.items()})
        path.write_bytes(graph.model.SerializeToString(deterministic=True))
        paths.append(path)
    data: dict[Path, FileEntry] = {}
    if weights is not None:
        files = [path.with_suffix(".data") for path in paths]
        data = dict(zip(files, write_rank_data(files, graph.layout, plan.program, weights), strict=True))
    return Export(graphs=tuple(paths), data=data)


def emit_graph(program: Program, *, precision: str, capacity: int, degrees: Mapping[str, int]) -> RankGraph:
    """The graph of a rank's Program (of local sizes); its initializers point into `stage0.data`."""
    dtype = DTYPES[precision]
    ids_BS = _input("input_ids", ir.DataType.INT64, ("batch", "sequence"))
    index = {
        name: _input(name, ir.DataType.INT64, shape)
        for name, shape in (
            ("position_ids", ("batch", "sequence")),
            ("write_index", ("batch",)),
            ("kv_positions", ("positions",)),
        )
    }
    names = cache_names(program)
    states = {(path, state): s for path, block in program.states().items() for state, s in block.items()}
    past = {key: _input(f"past.{name}", dtype, _cache_shape(states[key], capacity)) for key, name in names.items()}
    ops = OnnxOps(precision=precision, capacity=capacity, degrees=degrees, caches={})
    ops.caches = {key: Tensor(value, ops) for key, value in past.items()}
    step = Step(
        positions_BS=Tensor(index["position_ids"], ops),
        write_index_B=Tensor(index["write_index"], ops),
        kv_positions_L=Tensor(index["kv_positions"], ops),
    )
    recording: Any = Recording(ops)
    logits = plain(program.run(instance_of(program, recording), Tensor(ids_BS, ops), step))
    logits = ops.cast(logits, ir.DataType.FLOAT, name="logits")
    for key, name in names.items():
        ops.updated[key].value.name = f"present.{name}"
    outputs = [logits.value, *(ops.updated[key].value for key in names)]
    layout = _place(ops.externals.values())
    graph = ir.Graph(
        [ids_BS, *index.values(), *past.values()],
        outputs,
        nodes=ops.nodes,
        initializers=[*ops.constants.values(), *(p.external.value for p in layout)],
        opset_imports={"": OPSET} | {node.domain: 1 for node in ops.nodes if node.domain},
        name="stage0",
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="archwright")
    operations = tuple(str(result.value.name) for result in recording.results)
    return RankGraph(model=ir.to_proto(model), layout=layout, operations=operations)


def cache_names(program: Program) -> dict[tuple[str, str], str]:
    """(path, state) → `{layer}.{state}`: the caches in the order in which graphs take and give them."""
    return {
        (path, state): f"{layer}.{state}"
        for layer, (path, states) in enumerate(program.states().items())
        for state in states
    }


def _input(name: str, dtype: ir.DataType, shape: tuple[Size, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _cache_shape(state: State, capacity: int) -> tuple[Size, ...]:
    known: dict[str, Size] = {"batch": "batch", "positions": capacity}
    return tuple(known.get(axis, size) for axis, size in zip(state.axes, state.sizes, strict=True))


def _place(externals: Iterable[External]) -> tuple[Placed, ...]:
    """Give each initializer its offset, and the graph a reference to it."""
    layout: list[Placed] = []
    end = 0
    for external in externals:
        placed = Placed(external=external, offset=-(-end // ALIGNMENT) * ALIGNMENT)
        end = placed.offset + placed.num_bytes
        value = external.value
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(
            "stage0.data", placed.offset, placed.num_bytes, value.dtype, shape=value.shape, name=placed.name
        )
        layout.append(placed)
    return tuple(layout)

"""Plan → one ONNX graph a rank, with its weights as external data beside it.

    folder/rank0/stage0.onnx   the graph: no torch and no weights are needed to write it
    folder/rank0/stage0.data   the rank's slices, streamed from the model's weights one tensor at a time
    folder/rank2/stage1.onnx   of two stages of two ranks: rank r belongs to stage r // (expert · tensor)

All ranks of a tensor group have the same graph, but for the rank in its metadata; their data differ. Ranks that stand
elsewhere on the expert axis have the same but for the numbers of their experts and of the ranks that they add up with.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from archwright.compiler.interpreters.onnx_ops import (
    DTYPES,
    OPSET,
    External,
    OnnxOps,
    Tensor,
)
from archwright.compiler.interpreters.recording import Recording, plain
from archwright.compiler.ir import Plan, Program, Step
from archwright.compiler.ir.program import instance_of
from archwright.compiler.passes.fuse import WeightMap, fuse, verify_fused
from archwright.compiler.targets.rank_data import Placed, write_rank_data
from archwright.compiler.targets.stages import (
    DEFAULT_OPTIONS,
    LOGIT_INDEX,
    LOGITS,
    GraphOptions,
    Stage,
    TensorSpec,
    cache_names,
    stages_of,
)
from archwright.compiler.weights.streaming import Weights
from archwright.spec import ArchwrightError
from archwright.spec.manifest import FileEntry

__all__ = ["Export", "RankGraph", "cache_names", "emit_graph", "export_graphs", "graph_path"]

IR_VERSION = 12
ALIGNMENT = 4096
"""Of every tensor in the data file: a page, so that each can be mapped by itself."""


@dataclass(frozen=True, kw_only=True)
class RankGraph:
    """The graph of any rank of a tensor group, and the layout of its data file.

    operations: name of the value (and node) that each operation of the Program gave, in program order; "" for one whose
    value the dialect does not have, since a larger operator computes it on the way.
    weights: how its parameters are made of the canonical ones.
    """

    model: onnx.ModelProto
    layout: tuple[Placed, ...]
    operations: tuple[str, ...]
    weights: WeightMap


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
    options: GraphOptions = DEFAULT_OPTIONS,
    spec_digest: str = "",
) -> Export:
    """Write `rank{r}/stage{s}.onnx` and `rank{r}/stage{s}.data` of every rank into `folder`.

    weights: None writes the graphs alone, which is enough to look at shapes and layers.
    precision: float32, float16 or bfloat16, of weights, activations and caches; logits are float32 in each.
    capacity: rows of the KV caches, at most the model's positions. dialect: which operators the graphs are written in.
    The bytes depend on the arguments alone. Raises ArchwrightError BUILD010 where the capacity is out of range.
    """
    if not 1 <= capacity <= plan.program.max_positions:
        raise ArchwrightError(
            "BUILD010",
            f"a cache of {capacity} positions does not fit a model of {plan.program.max_positions}",
            help=f"set build.max_positions to 1..{plan.program.max_positions}",
        )
    dialect = options.dialect
    if dialect.fusions:
        splits = {name: site.param.splits for name, site in plan.program.sites().items()}
        verify_fused(fuse(plan.local, dialect.fusions), splits)
    axes = {"pipeline": plan.degrees.pipeline, "expert": plan.degrees.expert, "tensor": plan.degrees.tensor}
    fixed = {"spec_digest": spec_digest, "precision": precision, "capacity": capacity, "target": dialect.target}
    fixed |= {f"degrees.{axis}": degree for axis, degree in axes.items()}
    paths: list[Path] = []
    data: dict[Path, FileEntry] = {}
    for stage in stages_of(plan):
        ranks = plan.stage_ranks(stage.number)
        graphs = tuple(emit_stage(plan, stage, precision=precision, capacity=capacity, options=options))
        own = [graph_path(folder, rank, stage.number) for rank in ranks]
        for rank, graph, path in zip(ranks, graphs, own, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = fixed | {"rank": rank, "stage": stage.number}
            onnx.helper.set_model_props(graph.model, {f"archwright.{key}": str(value) for key, value in facts.items()})
            path.write_bytes(graph.model.SerializeToString(deterministic=True))
        if weights is not None:
            files = [path.with_suffix(".data") for path in own]
            places = [plan.coordinates(rank) for rank in ranks]
            entries = write_rank_data(files, graphs[0], plan.program, weights, places)
            data |= dict(zip(files, entries, strict=True))
        paths += own
    return Export(graphs=tuple(paths), data=data)


def emit_stage(
    plan: Plan, stage: Stage, *, precision: str, capacity: int, options: GraphOptions
) -> Iterator[RankGraph]:
    """The graph of each rank of a stage, made when it is asked for; those of one tensor group are the same object."""
    degrees = {"expert": plan.degrees.expert, "tensor": plan.degrees.tensor}
    for expert in range(plan.degrees.expert):
        graph = emit_graph(
            stage, precision=precision, capacity=capacity, degrees=degrees, options=options, ranks={"expert": expert}
        )
        yield from repeat(graph, plan.degrees.tensor)


def emit_graph(
    stage: Stage,
    *,
    precision: str,
    capacity: int,
    degrees: Mapping[str, int],
    options: GraphOptions = DEFAULT_OPTIONS,
    ranks: Mapping[str, int] | None = None,
) -> RankGraph:
    """The graph of a rank of a stage; its initializers point into `stage{s}.data`.

    degrees: of the stage's mesh. ranks: where the rank stands on the axes whose ranks have different graphs (expert).
    """
    fused = fuse(stage.program, options.dialect.fusions)
    stage = _with_program(stage, fused.program)
    specs = stage.inputs(precision=precision, capacity=capacity, options=options)
    inputs = {name: _input(name, spec) for name, spec in specs.items()}
    ops = options.dialect.ops(
        precision=precision, capacity=capacity, degrees=degrees, caches={}, moe=options.moe, ranks=ranks or {}
    )
    ops.caches = {key: Tensor(inputs[f"past.{name}"], ops) for key, name in stage.caches.items()}
    given = {name: Tensor(value, ops) for name, value in inputs.items()}
    step: Step[Any] = Step(
        positions_BS=given.get("position_ids"),
        write_index_B=given.get("write_index"),
        kv_positions_L=given.get("kv_positions"),
        logit_index_B=given.get(LOGIT_INDEX),
    )
    recording: Any = Recording(ops)
    bind = instance_of(stage.program, recording, stage.sites)
    result = plain(stage.program.run(bind, recording.given(given[stage.source]), step))
    # A node of its own, so that the last operation keeps its name.
    if stage.result == LOGITS:
        result = ops.cast(result, ir.DataType.FLOAT, name=LOGITS)
    else:
        result = ops.emit("Identity", [result], name=stage.result)
    for key, name in stage.caches.items():
        ops.updated[key].value.name = f"present.{name}"
    outputs = [result.value, *(ops.updated[key].value for key in stage.caches)]
    graph, layout = _graph(ops, list(inputs.values()), outputs, f"stage{stage.number}")
    made = {value.name for node in graph for value in node.outputs}
    names = [str(result.value.name) for result in recording.results]
    return RankGraph(
        model=ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, producer_name="archwright")),
        layout=layout,
        operations=tuple(name if name in made else "" for name in names),
        weights=fused.weights,
    )


def _with_program(stage: Stage, program: Program) -> Stage:
    """The stage after passes that change its Program. Parameters that it still has keep their canonical names."""
    sites = {
        place: replace(site, name=known.name, owner=known.owner) if (known := stage.sites.get(place)) else site
        for place, site in program.sites().items()
    }
    return replace(stage, program=program, sites=sites)


def _graph(
    ops: OnnxOps, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str
) -> tuple[ir.Graph, tuple[Placed, ...]]:
    """The graph of what the ops appended, with the initializers that are read, and where the external ones lie."""
    nodes = ops.finish(outputs)
    read = {id(value) for node in nodes for value in node.inputs}
    layout = _place((external for external in ops.externals.values() if id(external.value) in read), f"{name}.data")
    constants = [value for value in ops.constants.values() if id(value) in read]
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=[*constants, *(p.external.value for p in layout)],
        opset_imports={"": OPSET} | {domain: 1 for domain in sorted({node.domain for node in nodes} - {""})},
        name=name,
    )
    return graph, layout


def _input(name: str, spec: TensorSpec) -> ir.Value:
    dtype = ir.DataType.INT64 if spec.dtype == "int64" else DTYPES[spec.dtype]
    return ir.Value(name=name, shape=ir.Shape(spec.shape), type=ir.TensorType(dtype))


def _place(externals: Iterable[External], file: str) -> tuple[Placed, ...]:
    """Give each initializer its offset, and the graph a reference to it."""
    layout: list[Placed] = []
    end = 0
    for external in externals:
        placed = Placed(external=external, offset=-(-end // ALIGNMENT) * ALIGNMENT)
        end = placed.offset + placed.num_bytes
        value = external.value
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(
            file, placed.offset, placed.num_bytes, value.dtype, shape=value.shape, name=placed.name
        )
        layout.append(placed)
    return tuple(layout)

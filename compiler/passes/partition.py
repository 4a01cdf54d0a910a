"""Program → Plan: place every parameter on the mesh, by one table, and derive where ranks must add up."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import TypeVar

from archwright.compiler.blocks import Embedding, Experts, Head, LayerNorm, Linear, MixtureOfExperts, RMSNorm
from archwright.compiler.ir import TABLE_AXES, Axis, Block, Boundary, Degrees, Param, Plan, Program, Split
from archwright.compiler.passes.stages import cut_stages
from archwright.spec import ArchwrightError
from archwright.spec.models import BuildParallel, Parallel

AnyBlock = TypeVar("AnyBlock", bound=Block)

INFERENCE_TABLE: Mapping[Axis, str] = MappingProxyType(
    {"heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "expert": "expert"}
)
"""Logical axis → mesh axis. Axes that are not named are replicated: all ranks of a stage have the same tokens."""
TRAINING_TABLE: Mapping[Axis, str] = MappingProxyType(
    {**INFERENCE_TABLE, "vocab": "tensor", "positions": "tensor", "tokens": "expert"}
)
"""The same for training: its ranks also share the tables and the loss over the vocabulary, and those that share the
experts have tokens of their own, as all data ranks do."""


def degrees_of(parallel: Parallel | BuildParallel, world: int = 1) -> Degrees:
    """The mesh of a section. world: ranks that there are, which the axis that is `auto` fills.

    Where the other degrees do not divide `world`, the result's `world` is another number.
    """
    if isinstance(parallel, BuildParallel):
        return Degrees(pipeline=parallel.pipeline, expert=parallel.expert, tensor=parallel.tensor)
    given = {axis: getattr(parallel, axis) for axis in Degrees().sizes}
    schedule = parallel.schedule
    stages_per_rank = schedule.stages_per_rank if schedule.kind == "interleaved" and parallel.pipeline != 1 else 1
    known = Degrees(
        **{axis: 1 if degree == "auto" else degree for axis, degree in given.items()},
        sequence=parallel.sequence,
        ring=parallel.ring,
        stages_per_rank=stages_per_rank,
    )
    rest = max(1, world // known.world)
    return replace(known, **{axis: rest for axis, degree in given.items() if degree == "auto"})


def partition(program: Program, degrees: Degrees, table: Mapping[Axis, str] = INFERENCE_TABLE) -> Plan:
    """Split parameters over the mesh, and the segments over the pipeline.

    A matrix whose output axis is sharded leaves its output sharded; one that contracts over a sharded axis gets
    `reduce`, and so does a table whose rows are cut; a block whose matrices turn a replicated input into sharded
    outputs gets `enter`. Experts that are spread over an axis whose ranks have tokens of their own get `dispatch`;
    where these have the same tokens, the experts' outputs are parts that `reduce` adds up, together with those of an
    axis that cuts their widths. With `degrees.sequence` what lies between
    is spread over the tensor ranks token by token, and the parameters that are read there are `partial`.
    Raises ArchwrightError IR001 where an axis cannot be cut.
    """

    def place(block: Block) -> Block:
        return _annotate(
            _map_params(block, lambda param: replace(param, splits=_splits(param, degrees, table))), degrees, table
        )

    annotated = _map_program(program, place)
    local = _map_program(annotated, lambda block: _map_params(block, _local))
    stages = cut_stages(program, degrees.pipeline * degrees.stages_per_rank)
    return Plan(degrees=degrees, table=table, program=annotated, local=local, stages=stages)


def _splits(param: Param, degrees: Degrees, table: Mapping[Axis, str]) -> tuple[Split, ...]:
    """One for each mesh axis that cuts the parameter."""
    sizes = degrees.sizes
    return tuple(
        _split(param, dim, mesh_axis, sizes[mesh_axis])
        for dim, axis in enumerate(param.axes)
        if (mesh_axis := table.get(axis)) is not None and sizes[mesh_axis] > 1
    )


def _split(param: Param, dim: int, mesh_axis: str, degree: int) -> Split:
    axis, units = param.axes[dim], param.units(dim)
    if units % degree == 0 or axis in TABLE_AXES:
        return Split(mesh_axis=mesh_axis, dim=dim, degree=degree, parts=degree)
    if axis == "kv_heads" and degree % units == 0:
        return Split(mesh_axis=mesh_axis, dim=dim, degree=degree, parts=units)
    raise ArchwrightError(
        "IR001",
        f"{units} {axis} cannot be cut over {degree} {mesh_axis} ranks",
        help=f"use a {mesh_axis} degree that divides {units}" + (" or is a multiple" if axis == "kv_heads" else ""),
    )


def _annotate(block: Block, degrees: Degrees, table: Mapping[Axis, str]) -> Block:
    tokens = degrees.sequence and degrees.tensor > 1
    if isinstance(block, RMSNorm | LayerNorm):
        return _map_params(block, _read_in_pieces) if tokens else block
    if isinstance(block, Linear):
        split = block.weight.split
        if split is None:  # a router, which each rank reads for the tokens that it has
            return _map_params(block, _read_in_pieces) if tokens else block
        if split.dim == 0:
            return block
        bias = block.bias and _read_in_pieces(block.bias) if tokens else block.bias
        return replace(block, bias=bias, reduce=Boundary(mesh_axis=split.mesh_axis, tokens=tokens))
    if isinstance(block, Embedding | Head):
        if block.weight.split is None:
            return block
        boundary = Boundary(mesh_axis=block.weight.split.mesh_axis, tokens=tokens)
        if isinstance(block, Embedding):
            return replace(block, reduce=boundary)
        return replace(block, enter=boundary, gather=replace(boundary, tokens=False))
    if isinstance(block, Experts):
        return _annotate_experts(block, tokens, table.get("tokens"))
    if isinstance(block, MixtureOfExperts):
        return replace(block, spread="tensor" if tokens else None)
    splits = [sub.weight.split for sub in block.children().values() if isinstance(sub, Linear)]
    axes = {split.mesh_axis for split in splits if split and split.dim == 0}
    assert len(axes) <= 1, "one block's outputs lie on one mesh axis"
    return replace(block, enter=Boundary(mesh_axis=axes.pop(), tokens=tokens) if axes else None)


def _annotate_experts(block: Experts, tokens: bool, token_axis: str | None) -> Experts:
    """token_axis: the mesh axis whose ranks have tokens of their own."""
    cuts = {split.dim: split.mesh_axis for split in block.gate_proj.splits}
    dispatch = cuts.pop(0) if 0 in cuts and cuts[0] == token_axis else None
    axes = [cuts[dim] for dim in sorted(cuts, reverse=True)]
    if not axes:
        return replace(block, dispatch=dispatch)
    boundary = Boundary(mesh_axis=axes[0], tokens=tokens, outer=axes[1] if len(axes) > 1 else None)
    return replace(block, enter=boundary, reduce=boundary, dispatch=dispatch)


def _read_in_pieces(param: Param) -> Param:
    return replace(param, partial="tensor")


def _local(param: Param) -> Param:
    shape = param.shape
    for split in param.splits:
        shape = split.local_shape(shape)
    return replace(param, shape=shape, splits=())


def _map_program(program: Program, change: Callable[[Block], Block]) -> Program:
    """Rebuild every block bottom-up. Equal blocks are rebuilt once and stay equal."""
    done: dict[Block, Block] = {}

    def visit(block: Block) -> Block:
        if block not in done:
            subs = {name: visit(sub) for name, sub in block.children().items()}
            done[block] = change(replace(block, **subs))
        return done[block]

    return replace(program, segments=tuple(replace(s, block=visit(s.block)) for s in program.segments))


def _map_params(block: AnyBlock, change: Callable[[Param], Param]) -> AnyBlock:
    params = {f.name: change(value) for f in fields(block) if isinstance(value := getattr(block, f.name), Param)}
    return replace(block, **params)

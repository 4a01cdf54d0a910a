"""Program → Plan: place every parameter on the mesh, by one table, and derive where ranks must add up."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType

from archwright.compiler.blocks import Linear
from archwright.compiler.ir import Axis, Block, Degrees, Param, Plan, Program, Split
from archwright.spec import ArchwrightError
from archwright.spec.models import BuildParallel, Parallel

TABLE: Mapping[Axis, str] = MappingProxyType({"heads": "tensor", "kv_heads": "tensor", "ffn": "tensor"})
"""Logical axis → mesh axis. Axes that are not named are replicated."""


def degrees_of(parallel: Parallel | BuildParallel) -> Degrees:
    return Degrees(tensor=parallel.tensor)


def partition(program: Program, degrees: Degrees) -> Plan:
    """Split parameters over the mesh.

    A matrix whose output axis is sharded leaves its output sharded; one that contracts over a sharded axis gets
    `reduce`; a block whose matrices turn a replicated input into sharded outputs gets `enter`.
    Raises ArchwrightError IR001 where an axis cannot be cut.
    """
    sizes = {"tensor": degrees.tensor}

    def split_param(param: Param) -> Param:
        return replace(param, split=_split(param, sizes))

    annotated = _map_program(program, lambda block: _annotate(_map_params(block, split_param)))
    local = _map_program(annotated, lambda block: _map_params(block, _local))
    return Plan(degrees=degrees, table=TABLE, program=annotated, local=local)


def _split(param: Param, sizes: Mapping[str, int]) -> Split | None:
    for dim, axis in enumerate(param.axes):
        mesh_axis = TABLE.get(axis)
        if mesh_axis is None or sizes[mesh_axis] == 1:
            continue
        degree, units = sizes[mesh_axis], param.units(dim)
        if units % degree == 0:
            return Split(mesh_axis=mesh_axis, dim=dim, degree=degree, parts=degree)
        if axis == "kv_heads" and degree % units == 0:
            return Split(mesh_axis=mesh_axis, dim=dim, degree=degree, parts=units)
        raise ArchwrightError(
            "IR001",
            f"{units} {axis} cannot be cut over {degree} {mesh_axis} ranks",
            help=f"use a {mesh_axis} degree that divides {units}" + (" or is a multiple" if axis == "kv_heads" else ""),
        )
    return None


def _annotate(block: Block) -> Block:
    if isinstance(block, Linear):
        split = block.weight.split
        return replace(block, reduce=split.mesh_axis if split and split.dim == 1 else None)
    splits = [sub.weight.split for sub in block.children().values() if isinstance(sub, Linear)]
    axes = {split.mesh_axis for split in splits if split and split.dim == 0}
    assert len(axes) <= 1, "one block's outputs lie on one mesh axis"
    return replace(block, enter=axes.pop() if axes else None)


def _local(param: Param) -> Param:
    if param.split is None:
        return param
    return replace(param, shape=param.split.local_shape(param.shape), split=None)


def _map_program(program: Program, change: Callable[[Block], Block]) -> Program:
    """Rebuild every block bottom-up. Equal blocks are rebuilt once and stay equal."""
    done: dict[Block, Block] = {}

    def visit(block: Block) -> Block:
        if block not in done:
            subs = {name: visit(sub) for name, sub in block.children().items()}
            done[block] = change(replace(block, **subs))
        return done[block]

    return replace(program, segments=tuple(replace(s, block=visit(s.block)) for s in program.segments))


def _map_params(block: Block, change: Callable[[Param], Param]) -> Block:
    params = {f.name: change(value) for f in fields(block) if isinstance(value := getattr(block, f.name), Param)}
    return replace(block, **params)

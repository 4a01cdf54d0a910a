"""The intermediate representation: plain frozen values, no framework."""

from archwright.compiler.ir.block import Block, Boundary, State, child
from archwright.compiler.ir.ops import Ops, Scope, Step
from archwright.compiler.ir.param import (
    STORED_BITS,
    TABLE_AXES,
    Axis,
    Init,
    Normal,
    Ones,
    Param,
    Split,
    Storage,
    Zeros,
)
from archwright.compiler.ir.plan import MESH_AXES, Degrees, Plan
from archwright.compiler.ir.program import Program, Segment, Site
from archwright.compiler.ir.scope import Instance
from archwright.compiler.ir.values import Causal, Mask, Penalties, RopeTable, Routing, Window

__all__ = [
    "MESH_AXES",
    "STORED_BITS",
    "TABLE_AXES",
    "Axis",
    "Block",
    "Boundary",
    "Causal",
    "Degrees",
    "Init",
    "Instance",
    "Mask",
    "Normal",
    "Ones",
    "Ops",
    "Param",
    "Penalties",
    "Plan",
    "Program",
    "RopeTable",
    "Routing",
    "Scope",
    "Segment",
    "Site",
    "Split",
    "State",
    "Step",
    "Storage",
    "Window",
    "Zeros",
    "child",
]

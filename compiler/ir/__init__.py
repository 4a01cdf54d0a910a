"""The intermediate representation: plain frozen values, no framework."""

from archwright.compiler.ir.block import Block, State, child
from archwright.compiler.ir.ops import Ops, Scope, Step
from archwright.compiler.ir.param import Axis, Init, Normal, Ones, Param, Split, Zeros
from archwright.compiler.ir.plan import Degrees, Plan
from archwright.compiler.ir.program import Program, Segment, Site
from archwright.compiler.ir.scope import Instance
from archwright.compiler.ir.values import Causal, Mask, RopeTable, Window

__all__ = [
    "Axis",
    "Block",
    "Causal",
    "Degrees",
    "Init",
    "Instance",
    "Mask",
    "Normal",
    "Ones",
    "Ops",
    "Param",
    "Plan",
    "Program",
    "RopeTable",
    "Scope",
    "Segment",
    "Site",
    "Split",
    "State",
    "Step",
    "Window",
    "Zeros",
    "child",
]

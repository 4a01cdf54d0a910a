"""Plans: a Program placed on a mesh."""

from collections.abc import Mapping
from dataclasses import dataclass

from archwright.compiler.ir.param import Axis
from archwright.compiler.ir.program import Program


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Sizes of the mesh axes."""

    tensor: int = 1

    @property
    def world(self) -> int:
        return self.tensor


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `partition` decides.

    table: logical axis → mesh axis, the only source of every placement below.
    program: the global Program, each parameter annotated with its `split`; training makes DTensors of it.
    local: the Program of one rank, of local sizes; inference emits it. Ranks of one tensor group have equal Programs,
    their weights are the slices that `program` names.
    """

    degrees: Degrees
    table: Mapping[Axis, str]
    program: Program
    local: Program

"""Plans: a Program placed on a mesh."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from archwright.compiler.ir.param import Axis
from archwright.compiler.ir.program import Program

MESH_AXES = ("pipeline", "data_replicate", "expert", "data_shard", "context", "tensor")
"""Outermost first: neighbouring ranks are those of one tensor group."""


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Sizes of the mesh axes.

    sequence: whether tensor ranks share the sequence between the matrices. ring: whether context ranks pass keys and
    values on instead of gathering them. stages_per_rank: pieces of the Program that a pipeline rank holds, more than
    one under the interleaved schedule.
    """

    pipeline: int = 1
    data_replicate: int = 1
    expert: int = 1
    data_shard: int = 1
    context: int = 1
    tensor: int = 1
    sequence: bool = False
    ring: bool = False
    stages_per_rank: int = 1

    @property
    def world(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def data(self) -> int:
        """Ranks that see different sequences in training. In a deployment all of a stage see the same."""
        return self.data_replicate * self.expert * self.data_shard

    @property
    def shard(self) -> int:
        """Ranks over which a parameter's masters, gradients and states are cut (an expert's: without `expert`)."""
        return self.expert * self.data_shard * self.context

    @property
    def token_pieces(self) -> int:
        """Equal pieces that a sequence is cut into: two for each context rank, and those among the tensor ranks."""
        return (2 * self.context if self.context > 1 else 1) * (self.tensor if self.sequence else 1)

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis → degree, outermost first."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `partition` decides.

    table: logical axis → mesh axis, the only source of every placement below.
    program: the global Program, each parameter annotated with its `split`; training makes DTensors of it.
    local: the Program of one rank, of local sizes; inference emits it. Ranks of one tensor group have equal Programs,
    their weights are the slices that `program` names.
    stages: the segments [start, stop) of each pipeline stage; stage s belongs to pipeline rank s mod degree.
    """

    degrees: Degrees
    table: Mapping[Axis, str]
    program: Program
    local: Program
    stages: tuple[tuple[int, int], ...]

    def stage(self, number: int) -> Program:
        """The segments of a stage, of global sizes."""
        start, stop = self.stages[number]
        return replace(self.program, segments=self.program.segments[start:stop])

    def local_stage(self, number: int) -> Program:
        """The same of local sizes: what a rank of the stage computes."""
        start, stop = self.stages[number]
        return replace(self.local, segments=self.local.segments[start:stop])

    def coordinates(self, rank: int) -> dict[str, int]:
        """Mesh axis → where the rank stands on it; ranks are counted along the innermost axis first."""
        result: dict[str, int] = {}
        for axis, degree in reversed(self.degrees.sizes.items()):
            rank, result[axis] = divmod(rank, degree)
        return result

    def stage_ranks(self, number: int) -> range:
        """The ranks that compute a stage together, where each pipeline rank has one stage."""
        size = self.degrees.world // self.degrees.pipeline
        return range(number * size, (number + 1) * size)

"""The mesh of processes that train together: who shares what with whom.

axis             ranks along it
pipeline         hold different layers
data_replicate   hold copies, see different sequences
expert           share experts, see different sequences
data_shard       share masters, gradients and optimizer states, see different sequences
context          share sequences, and masters as `data_shard`
tensor           share matrices
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed import ProcessGroup, get_rank, new_subgroups_by_enumeration
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from archwright.compiler.ir import MESH_AXES, Degrees


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The place of this process.

    ranks: coordinate on each axis. groups: of each axis of more than one rank.
    dense: (pipeline, data_replicate, shard, tensor), shard = expert x data_shard x context: where ordinary parameters
    lie. sparse: (pipeline, data_replicate, expert, expert_shard, tensor): where experts lie.
    batch: the ranks whose losses add up: all but those of the pipeline and of the tensor axis.
    ends: the first and the last pipeline rank of this column; None for the others, and without a pipeline.
    """

    degrees: Degrees
    ranks: Mapping[str, int]
    groups: Mapping[str, ProcessGroup]
    dense: DeviceMesh
    sparse: DeviceMesh
    batch: ProcessGroup
    ends: ProcessGroup | None

    @property
    def data_rank(self) -> int:
        """Of the sequences that this rank sees, among `degrees.data`."""
        degrees, ranks = self.degrees, self.ranks
        outer = ranks["data_replicate"] * degrees.expert + ranks["expert"]
        return outer * degrees.data_shard + ranks["data_shard"]


def make_mesh(degrees: Degrees, device_type: str) -> Mesh | None:
    """The mesh over the processes of the default group; None on one. All of them must call this."""
    if degrees.world == 1:
        return None
    whole = init_device_mesh(device_type, (degrees.world,), mesh_dim_names=("world",))
    sizes, inner = degrees.sizes, degrees.data_shard * degrees.context
    outer = (degrees.pipeline, degrees.data_replicate)

    def view(names: tuple[str, ...], shape: tuple[int, ...]) -> DeviceMesh:
        return whole._unflatten(0, shape, names)  # pyright: ignore[reportPrivateUsage]

    axes = view(MESH_AXES, tuple(sizes.values()))
    batch = view(("pipeline", "batch", "tensor"), (degrees.pipeline, degrees.data * degrees.context, degrees.tensor))
    return Mesh(
        degrees=degrees,
        ranks={axis: axes.get_local_rank(axis) for axis in MESH_AXES},
        groups={axis: axes.get_group(axis) for axis in MESH_AXES if sizes[axis] > 1},
        dense=view(("pipeline", "data_replicate", "shard", "tensor"), (*outer, degrees.shard, degrees.tensor)),
        sparse=view(
            ("pipeline", "data_replicate", "expert", "expert_shard", "tensor"),
            (*outer, degrees.expert, inner, degrees.tensor),
        ),
        batch=batch.get_group("batch"),
        ends=_ends(degrees),
    )


def _ends(degrees: Degrees) -> ProcessGroup | None:
    if degrees.pipeline == 1:
        return None
    column = degrees.world // degrees.pipeline
    pairs = [[rank, rank + column * (degrees.pipeline - 1)] for rank in range(column)]
    group, _ = new_subgroups_by_enumeration(pairs)
    return group if isinstance(group, ProcessGroup) and any(get_rank() in pair for pair in pairs) else None

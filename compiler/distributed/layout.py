"""Where the elements of one parameter lie: which of them this rank keeps, and how to have all of them again."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from archwright.compiler.distributed.mesh import Mesh
from archwright.compiler.ir import Param, Split
from archwright.compiler.weights.streaming import Array

Read = Callable[[tuple[slice, ...] | None], Array]
"""Gives a full tensor's part that the slices name; None names the whole."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A parameter on a mesh. mesh: None on one process. fully_sharded: whether FSDP cuts it further, along dim 0.

    tied: another pipeline stage holds a copy, whose gradient is added.
    """

    param: Param
    mesh: Mesh | None
    fully_sharded: bool = False
    tied: bool = False

    @property
    def splits(self) -> tuple[Split, ...]:
        """The cuts of which each rank has a piece of its own; shared key/value heads are whole on every rank."""
        return tuple(split for split in self.param.splits if split.parts == split.degree)

    @property
    def is_expert(self) -> bool:
        return "expert" in self.param.axes

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The mesh of one axis over which FSDP cuts, or of two of which the first holds copies."""
        assert self.mesh is not None
        device_mesh, name = (self.mesh.sparse, "expert_shard") if self.is_expert else (self.mesh.dense, "shard")
        return device_mesh["data_replicate", name] if self.mesh.degrees.data_replicate > 1 else device_mesh[name]

    @property
    def num_shards(self) -> int:
        return self.shard_mesh.size(-1) if self.fully_sharded else 1

    @property
    def copies(self) -> int:
        """Processes that hold each element."""
        if self.mesh is None:
            return 1
        pieces = self.num_shards
        for split in self.splits:
            pieces *= split.degree
        degrees = self.mesh.degrees
        return degrees.world // degrees.pipeline // pieces * (2 if self.tied else 1)

    def model_shape(self) -> tuple[int, ...]:
        """Of what this rank computes with: its piece of each cut, filled up to equal sizes."""
        shape = self.param.shape
        for split in self.splits:
            shape = split.local_shape(shape)
        return shape

    def on_meta(self, dtype: torch.dtype) -> torch.Tensor:
        """The parameter as the module has it before FSDP: a DTensor on the axes that cut models, if there are any."""
        local = torch.empty(self.model_shape(), dtype=dtype, device="meta")
        if self.mesh is None:
            return local
        axes = [axis for axis in ("expert", "tensor") if axis in self.mesh.groups]
        if not self.is_expert and "expert" in axes:
            axes.remove("expert")
        if not axes:
            return local
        device_mesh = self.mesh.sparse if self.is_expert else self.mesh.dense
        by_axis = {split.mesh_axis: Shard(split.dim) for split in self.splits}
        placements: list[Placement] = [by_axis.get(axis, Replicate()) for axis in axes]
        return DTensor.from_local(local, device_mesh[tuple(axes)], placements, run_check=False)

    def slices(self, rows: int) -> tuple[slice, ...]:
        """The part of the full tensor that this rank stores, `rows` of dim 0 (fewer where it ends within them)."""
        shape = self.param.shape
        starts, sizes = [0] * len(shape), list(self.model_shape())
        if self.mesh is not None:
            for split in self.splits:
                starts[split.dim] = self.mesh.ranks[split.mesh_axis] * sizes[split.dim]
        if self.num_shards > 1:
            starts[0] += min(self.shard_mesh.get_local_rank(-1) * -(-sizes[0] // self.num_shards), sizes[0])
        sizes[0] = rows
        ends = (min(start + size, full) for start, size, full in zip(starts, sizes, shape, strict=True))
        return tuple(slice(min(start, end), end) for start, end in zip(starts, ends, strict=True))

    @torch.no_grad()
    def fill(self, tensor: torch.Tensor, read: Read) -> None:
        """Write this rank's part of what `read` gives; rows past the end of the full tensor become 0."""
        local = local_of(tensor)
        if self.mesh is None:
            local.copy_(_tensor(read(None), local.dtype))
            return
        part = self.slices(len(local))
        local.zero_()
        if all(each.stop > each.start for each in part):
            inner = tuple(slice(0, each.stop - each.start) for each in part)
            local[inner].copy_(_tensor(read(part), local.dtype))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The full tensor on every rank of the column. All ranks of a pipeline stage must call this together."""
        whole = local_of(tensor.detach())
        if self.mesh is None:
            return whole
        if self.num_shards > 1:
            group, rows = self.shard_mesh.get_group(-1), self.model_shape()[0]
            whole = _joined(whole, group, 0, -(-rows // self.num_shards))[:rows]
        for split in self.splits:
            whole = _joined(whole, self.mesh.groups[split.mesh_axis], split.dim, whole.shape[split.dim])
        return whole[tuple(slice(size) for size in self.param.shape)]


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank stores of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _joined(piece: torch.Tensor, group: dist.ProcessGroup, dim: int, size: int) -> torch.Tensor:
    """The pieces of all ranks along `dim`, each filled up to `size`."""
    missing = size - piece.shape[dim]
    if missing:
        shape = [missing if each == dim else full for each, full in enumerate(piece.shape)]
        piece = torch.cat([piece, piece.new_zeros(shape)], dim)
    pieces = [torch.empty_like(piece, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(pieces, piece.contiguous(), group=group)
    return torch.cat(pieces, dim)


def _tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of its own: `array` may be a view of a file, or of a type that torch does not read."""
    tensor = torch.empty(array.shape, dtype=dtype)
    tensor.numpy()[...] = array
    return tensor

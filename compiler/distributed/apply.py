"""A Plan applied to torch modules for training: where each parameter lies on the mesh, and its values.

On more than one rank every parameter is a DTensor on the whole mesh, norms and embeddings replicated: plain tensors
and DTensors side by side break optimizers and norms that work on lists. On one rank every parameter is plain.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import Degrees, Param, Plan
from archwright.compiler.weights.streaming import Array, Weights

Read = Callable[[tuple[slice, ...] | None], Array]
"""Gives a full tensor's part that the slices name; None names the whole."""


def make_mesh(degrees: Degrees, device_type: str) -> DeviceMesh | None:
    """The mesh of `degrees` over the process group that is already there; None on one rank."""
    if degrees.world == 1:
        return None
    return init_device_mesh(device_type, (degrees.tensor,), mesh_dim_names=("tensor",))


def apply_plan(
    plan: Plan,
    weights: Weights,
    *,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> TorchProgram:
    """The module that a rank of `mesh` trains, its parameters read from `weights`, the part of this rank only.

    dtype: of the parameters; compute_dtype: of the computation. With `GeneratedWeights` the values do not depend on the
    plan: the full tensors are the same numbers at every degree.
    """
    axes = () if mesh is None else mesh.mesh_dim_names or ()
    groups: dict[str, ProcessGroup] = {axis: mesh.get_group(axis) for axis in axes} if mesh else {}
    ranks = {axis: mesh.get_local_rank(axis) for axis in axes} if mesh else {}
    ops = TorchOps(dtype=compute_dtype, groups=groups, ranks=ranks)
    module = TorchProgram(plan.program, ops, dtype=dtype, device="meta")
    for name, param in plan.program.params().items():
        value = place(param, lambda part, name=name: weights.read(name, part), dtype=dtype, device=device, mesh=mesh)
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, nn.Parameter(value))
    return module


def place(
    param: Param, read: Read, *, dtype: torch.dtype, device: torch.device, mesh: DeviceMesh | None
) -> torch.Tensor:
    """A tensor of a parameter's shape (its value, or a state of the optimizer) laid out as the parameter is.

    A rank reads only the part that it keeps.
    """
    if mesh is None:
        return _copy(read(None), dtype, device)
    split = param.split if is_sharded(param) else None
    part = None if split is None else split.slices(param.shape, mesh.get_local_rank(split.mesh_axis))
    local = _copy(read(part), dtype, device)
    return DTensor.from_local(local, mesh, placements(param, mesh), run_check=False)


def placements(param: Param, mesh: DeviceMesh) -> list[Placement]:
    """Shard where each rank has a piece of its own; Replicate otherwise, shared key/value heads among them."""
    split = param.split if is_sharded(param) else None
    axes = mesh.mesh_dim_names or ()
    return [Shard(split.dim) if split is not None and split.mesh_axis == axis else Replicate() for axis in axes]


def is_sharded(param: Param) -> bool:
    return param.split is not None and param.split.parts == param.split.degree


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor. With a DTensor every rank of its mesh must call this, in the same order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def global_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all tensors together, the same number on every rank: replicated ones count once.

    sqrt(Σ over replicated x² + all_reduce(Σ over shards x²)), the squares added in float64. One collective for all
    tensors; torch's `get_total_norm` runs one a tensor.
    """
    tensors = list(tensors)
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    norms = torch._foreach_norm(locals_)  # pyright: ignore[reportPrivateImportUsage]
    squares = torch.stack(norms).double().square()
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    if not meshes:
        return squares.sum().sqrt()
    (mesh,) = meshes
    sharded = [isinstance(tensor, DTensor) and any(p.is_shard() for p in tensor.placements) for tensor in tensors]
    chosen = torch.tensor(sharded, device=squares.device)
    shards = squares[chosen].sum()
    all_reduce(shards, group=mesh.get_group())
    return (shards + squares[~chosen].sum()).sqrt()


def scale_(tensors: Iterable[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply every tensor in place."""
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    torch._foreach_mul_(locals_, factor.to(locals_[0].dtype))  # pyright: ignore[reportPrivateImportUsage]


def _copy(array: Array, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of its own: `array` may be a view of a file."""
    tensor = torch.empty(array.shape, dtype=dtype)
    tensor.numpy()[...] = array
    return tensor.to(device)

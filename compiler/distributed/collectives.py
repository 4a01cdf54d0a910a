"""The collectives of training and their gradients, each a pair (Shoeybi et al. 2019; Korthikanti et al. 2022).

operation     forward       backward
copy_to       identity      all-reduce         one input, ranks compute different parts with it
reduce_from   all-reduce    identity           ranks hold parts of one sum
gather_from   all-gather    reduce-scatter     ranks hold pieces, each computes its part with all of them
scatter_to    reduce-scatter  all-gather         ranks hold parts of one sum, each goes on with its piece
join          all-gather    own piece          ranks hold pieces, all compute the same with the whole
sum_over      all-reduce    all-reduce         ranks hold parts of one sum, each makes its part of the loss of it
all_to_all    all-to-all    all-to-all         rows travel to other ranks, their gradients back

Where a group has a window (symmetric.py), `gather_from` and `scatter_to` go through it.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch.distributed import ProcessGroup, all_to_all_single

from archwright.compiler.distributed import symmetric

Tensor = torch.Tensor


def all_reduce(x: Tensor, group: ProcessGroup, operation: str = "sum") -> Tensor:
    """A new tensor; no gradient."""
    return _arrived(funcol.all_reduce(x.contiguous(), operation, group))


def _arrived(x: Tensor) -> Tensor:
    """Waits for a collective's result. In what torch.compile traces that stands there already: its passes, which look
    for a matrix product beside a collective, find none behind a second wait."""
    return funcol.wait_tensor(x) if isinstance(x, funcol.AsyncCollectiveTensor) else x


# torch 2.13 renamed them.
_all_gather: Any = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter: Any = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


def all_gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    return _along(dim, _arrived(_all_gather(x.contiguous(), 0, group)), x.shape[0])


def _along(dim: int, whole: Tensor, rows: int) -> Tensor:
    """Pieces of `rows` rows, one behind the other, put together along another dim. Here: torch.compile of 2.11 cannot
    see into the operator's own way of doing it."""
    return whole if dim == 0 else torch.cat(whole.chunk(whole.shape[0] // rows), dim)


def _gather_pieces(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    if symmetric.has_window(group):
        return _along(dim, symmetric.all_gather(x.contiguous(), group), x.shape[0])
    return all_gather(x, group, dim)


def _scatter_sum(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    if symmetric.has_window(group):
        pieces = x if dim == 0 else torch.cat(x.chunk(group.size(), dim))
        return symmetric.reduce_scatter(pieces.contiguous(), group)
    return _arrived(_reduce_scatter(x.contiguous(), "sum", dim, group))


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return all_reduce(grads[0], ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gather_pieces(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _scatter_sum(grads[0], ctx.group, ctx.dim), None, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _scatter_sum(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gather_pieces(grads[0], ctx.group, ctx.dim), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()].contiguous(), None, None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return all_reduce(grads[0], ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, to_ranks: list[int], from_ranks: list[int], group: ProcessGroup) -> Tensor:
        ctx.to_ranks, ctx.from_ranks, ctx.group = to_ranks, from_ranks, group
        return _exchanged(x_ND, to_ranks, from_ranks, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _exchanged(grads[0], ctx.from_ranks, ctx.to_ranks, ctx.group), None, None, None


def _exchanged(x_ND: Tensor, to_ranks: list[int], from_ranks: list[int], group: ProcessGroup) -> Tensor:
    received = x_ND.new_empty(sum(from_ranks), *x_ND.shape[1:])
    all_to_all_single(received, x_ND.contiguous(), from_ranks, to_ranks, group=group)
    return received


def copy_to(x: Tensor, group: ProcessGroup) -> Tensor:
    """f: the identity; its gradient is summed over the group. Where ranks compute different parts of one input."""
    return _CopyTo.apply(x, group)  # pyright: ignore[reportReturnType]


def reduce_from(x: Tensor, group: ProcessGroup) -> Tensor:
    """g: the sum over the group; its gradient is the identity. Where ranks hold parts of one sum."""
    return _ReduceFrom.apply(x, group)  # pyright: ignore[reportReturnType]


def gather_from(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The ranks' pieces along `dim`; gradients of all ranks are summed, each keeps those of its piece."""
    return _GatherFrom.apply(x, group, dim)  # pyright: ignore[reportReturnType]


def scatter_to(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's piece along `dim` of the sum over the group."""
    return _ScatterTo.apply(x, group, dim)  # pyright: ignore[reportReturnType]


def join(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The ranks' pieces along `dim`, for a use that is the same on every rank."""
    return _Join.apply(x, group, dim)  # pyright: ignore[reportReturnType]


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the group, and of its gradients too. Where ranks that have parts of a sum go on to make different
    parts of the loss of it.
    """
    return _SumOver.apply(x, group)  # pyright: ignore[reportReturnType]


def all_to_all(x_ND: Tensor, to_ranks: list[int], from_ranks: list[int], group: ProcessGroup) -> Tensor:
    """The first `to_ranks[0]` rows go to the group's rank 0, the next to rank 1, ...; what comes from them, in the same
    order. The gradient travels back.
    """
    return _AllToAll.apply(x_ND, to_ranks, from_ranks, group)  # pyright: ignore[reportReturnType]

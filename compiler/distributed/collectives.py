"""Collectives and their gradients.

Of tensor parallelism the two of Shoeybi et al. (2019), f and g.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch.distributed import ProcessGroup, all_to_all_single


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return funcol.wait_tensor(funcol.all_reduce(grads[0].contiguous(), "sum", ctx.group)), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return funcol.wait_tensor(funcol.all_reduce(grads[0].contiguous(), "sum", ctx.group)), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: torch.Tensor, to_ranks: list[int], from_ranks: list[int], group: ProcessGroup
    ) -> torch.Tensor:
        ctx.to_ranks, ctx.from_ranks, ctx.group = to_ranks, from_ranks, group
        return _exchanged(x_ND, to_ranks, from_ranks, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _exchanged(grads[0], ctx.from_ranks, ctx.to_ranks, ctx.group), None, None, None


def _exchanged(x_ND: torch.Tensor, to_ranks: list[int], from_ranks: list[int], group: ProcessGroup) -> torch.Tensor:
    received = x_ND.new_empty(sum(from_ranks), *x_ND.shape[1:])
    all_to_all_single(received, x_ND.contiguous(), from_ranks, to_ranks, group=group)
    return received


def copy_to(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """f: the identity; its gradient is summed over the group. Where ranks compute different parts of one input."""
    return _CopyTo.apply(x, group)  # pyright: ignore[reportReturnType]


def reduce_from(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """g: the sum over the group; its gradient is the identity. Where ranks hold parts of one sum."""
    return _ReduceFrom.apply(x, group)  # pyright: ignore[reportReturnType]


def sum_over(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The sum over the group, and of its gradients too. Where ranks that have parts of a sum go on to make different
    parts of the loss of it.
    """
    return _SumOver.apply(x, group)  # pyright: ignore[reportReturnType]


def all_to_all(x_ND: torch.Tensor, to_ranks: list[int], from_ranks: list[int], group: ProcessGroup) -> torch.Tensor:
    """The first `to_ranks[0]` rows go to the group's rank 0, the next to rank 1, ...; what comes from them, in the same
    order. The gradient travels back.
    """
    return _AllToAll.apply(x_ND, to_ranks, from_ranks, group)  # pyright: ignore[reportReturnType]

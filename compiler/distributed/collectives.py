"""The two collectives of tensor parallelism and their gradients (Shoeybi et al. 2019, operators f and g)."""

from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch.distributed import ProcessGroup


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


def copy_to(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """f: the identity; its gradient is summed over the group. Where ranks compute different parts of one input."""
    return _CopyTo.apply(x, group)  # pyright: ignore[reportReturnType]


def reduce_from(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """g: the sum over the group; its gradient is the identity. Where ranks hold parts of one sum."""
    return _ReduceFrom.apply(x, group)  # pyright: ignore[reportReturnType]

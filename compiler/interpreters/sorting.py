"""Rows in the order of their experts and back, with gradients that add in a fixed order.

N rows, T tokens of X rows each, E experts, D hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """order_N: which row comes n-th; inverse_N: where row n comes; ends_E: the rows before the end of each expert's."""

    order_N: Tensor
    inverse_N: Tensor
    ends_E: Tensor


def sort_by_expert(expert_N: Tensor, num_experts: int) -> Sorted:
    """The order of rows by the expert of each, equal ones as they come."""
    sorted_N, order_N = expert_N.sort(stable=True)
    counted_N = torch.arange(expert_N.shape[0], device=expert_N.device)
    experts_E = torch.arange(num_experts, device=expert_N.device)
    return Sorted(
        order_N=order_N,
        inverse_N=torch.empty_like(order_N).scatter(0, order_N, counted_N),
        ends_E=torch.searchsorted(sorted_N, experts_E, right=True),
    )


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_ND[order_N]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inverse_N,) = ctx.saved_tensors
        return grads[0][inverse_N], None, None


class _RepeatSorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.times = times
        return x_TD[order_N // times]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inverse_N,) = ctx.saved_tensors
        return grads[0][inverse_N].unflatten(0, (-1, ctx.times)).sum(dim=1), None, None, None


def permute(x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """x[order]. Torch's own gradient of an index adds rows where there is nothing to add."""
    return _Permute.apply(x_ND, order_N, inverse_N)  # pyright: ignore[reportReturnType]


def repeat_sorted(x_TD: Tensor, by_expert: Sorted, times: int) -> Tensor:
    """Each token `times` times, in the order of the experts. Torch's own gradient would add atomically on GPUs."""
    return _RepeatSorted.apply(x_TD, by_expert.order_N, by_expert.inverse_N, times)  # pyright: ignore[reportReturnType]

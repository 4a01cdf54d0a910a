"""One matrix product for each group of rows. N rows, E groups, I inputs, O outputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

Tensor = torch.Tensor

ALIGNMENT_BYTES = 16
"""Of the rows that the GPU's grouped product can read."""


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """y[n] = x[n] · weight[e]ᵀ for the rows of group e, which are ends[e - 1] ≤ n < ends[e].

    In bfloat16 on GPUs one kernel that reads `ends` where it lies; otherwise a loop that asks the host for it.
    """
    if x_NI.is_cuda and x_NI.dtype == torch.bfloat16 and _is_aligned(weight_EOI):
        return F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=ends_E.to(torch.int32))
    return _loop(x_NI, weight_EOI, ends_E)


def _is_aligned(weight_EOI: Tensor) -> bool:
    return all(size * weight_EOI.itemsize % ALIGNMENT_BYTES == 0 for size in weight_EOI.shape[1:])


# Operators of their own, since torch.compile cannot look into a loop over numbers that it does not know.


@torch.library.custom_op("archwright::grouped_linear", mutates_args=())
def _loop(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])
    start = 0
    for weight_OI, stop in zip(weight_EOI, ends_E.tolist(), strict=True):
        torch.mm(x_NI[start:stop], weight_OI.T, out=y_NO[start:stop])
        start = stop
    return y_NO


@torch.library.custom_op("archwright::grouped_outer", mutates_args=())
def _outer(y_NO: Tensor, x_NI: Tensor, ends_E: Tensor) -> Tensor:
    """Of each group Σ over its rows of y xᵀ [E, O, I]: the gradient of the matrices."""
    out_EOI = x_NI.new_empty(ends_E.shape[0], y_NO.shape[1], x_NI.shape[1])
    start = 0
    for out_OI, stop in zip(out_EOI, ends_E.tolist(), strict=True):
        torch.mm(y_NO[start:stop].T, x_NI[start:stop], out=out_OI)
        start = stop
    return out_EOI


@_loop.register_fake
def _(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])


@_outer.register_fake
def _(y_NO: Tensor, x_NI: Tensor, ends_E: Tensor) -> Tensor:
    return x_NI.new_empty(ends_E.shape[0], y_NO.shape[1], x_NI.shape[1])


@register_flop_formula(torch.ops.archwright.grouped_linear)
def _(x_NI: torch.Size, weight_EOI: torch.Size, *_: Any, **options: Any) -> int:
    return 2 * x_NI[0] * x_NI[1] * weight_EOI[1]


@register_flop_formula(torch.ops.archwright.grouped_outer)
def _(y_NO: torch.Size, x_NI: torch.Size, *_: Any, **options: Any) -> int:
    return 2 * x_NI[0] * x_NI[1] * y_NO[1]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_NI, weight_EOI, ends_E = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    return (
        _loop(grad_NO, weight_EOI.transpose(1, 2), ends_E) if need_x else None,
        _outer(grad_NO, x_NI, ends_E) if need_weight else None,
        None,
    )


_loop.register_autograd(_backward, setup_context=_keep)

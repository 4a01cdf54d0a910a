"""The loss of a language model without its logits. T tokens, D hidden, V vocabulary (this rank's rows of it)."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.distributed import ProcessGroup

from archwright.compiler.distributed.collectives import all_reduce

CHUNK_BYTES = 1 << 30
"""Of the logits that exist at a time, in the computation's dtype; their gradient takes as much again."""
CPU_CHUNK_BYTES = 4 << 20
"""The same on a CPU, in at least float32: what stays in its cache."""
CHUNK_MULTIPLE = 128
"""Of tokens: what the matrix units of GPUs work on at once."""

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of the vocabulary that a rank of `group` has: `first`, and how many of those stored are real."""

    group: ProcessGroup
    first: int
    real: int


class LinearCrossEntropy(torch.autograd.Function):
    """Σ over tokens of -log softmax(x · weightᵀ)[target], -100 not counted, in chunks of tokens.

    Only one chunk's logits exist at a time. Their gradient, softmax - onehot, is formed in the forward, where they are
    at hand: recomputing them in the backward costs a third matmul over the vocabulary.
    With `rows` each rank of the group has some rows of the weight; the loss is the same on all of them, the gradient of
    x is this rank's part of a sum.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, rows: Rows | None = None) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        matrix_VD = weight_VD.to(x_TD.dtype)
        loss_sum = torch.zeros((), dtype=wide, device=x_TD.device)
        grad_x_TD = torch.empty_like(x_TD) if need_x else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        chunk = chunk_tokens(x_TD, weight_VD.shape[0])
        for start in range(0, x_TD.shape[0], chunk):
            x_tD, targets_t = x_TD[start : start + chunk], targets_T[start : start + chunk]
            part, grad_tV = _loss_and_gradient(x_tD @ matrix_VD.T, targets_t, rows)
            loss_sum += part
            if grad_x_TD is not None:
                grad_x_TD[start : start + chunk] = grad_tV @ matrix_VD
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_tV.T, x_tD)
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss_sum

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_x_TD is None else grad_x_TD * scale.to(grad_x_TD.dtype),
            None if grad_weight_VD is None else grad_weight_VD.mul_(scale).to(ctx.weight_dtype),
            None,
            None,
        )


def chunk_tokens(x_TD: Tensor, num_rows: int) -> int:
    """How many tokens' logits are formed at a time."""
    if x_TD.device.type == "cpu":
        return max(1, CPU_CHUNK_BYTES // (num_rows * max(4, x_TD.dtype.itemsize)))
    return max(1, CHUNK_BYTES // (num_rows * x_TD.dtype.itemsize) // CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def _loss_and_gradient(logits_tV: Tensor, targets_t: Tensor, rows: Rows | None) -> tuple[Tensor, Tensor]:
    """The summed loss of some tokens, and its gradient in the logits' dtype."""
    if rows is None and not logits_tV.is_cuda:
        return _on_cpu(logits_tV, targets_t)
    reduce, gradient = _compiled() if logits_tV.is_cuda else (_reduced, _gradient)
    if rows is None:
        return gradient(logits_tV, targets_t, *reduce(logits_tV, targets_t, 0))
    logits_tV[:, rows.real :] = -torch.inf  # rows that fill the last piece up
    largest_t1, sum_t1, picked_t1 = reduce(logits_tV, targets_t - rows.first, 1)
    all_t1 = all_reduce(largest_t1, rows.group, "max")
    pair_t2 = all_reduce(torch.cat([sum_t1 * (largest_t1 - all_t1).exp(), picked_t1], dim=1), rows.group)
    # Never negative but as the mark: a target 100 rows before the first would look like one that does not count.
    local_t = torch.where(targets_t < rows.first, logits_tV.shape[1], targets_t - rows.first)
    local_t = torch.where(targets_t == -100, -100, local_t)
    return gradient(logits_tV, local_t, all_t1, *pair_t2.chunk(2, dim=1))


def _on_cpu(logits_tV: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the fewest passes that torch's own functions take: half the time there of what GPUs fuse."""
    valid_t1 = (targets_t != -100)[:, None]
    picked_t1 = targets_t.clamp(min=0)[:, None]
    wide_tV = logits_tV.to(torch.promote_types(logits_tV.dtype, torch.float32))
    log_probability_tV = torch.log_softmax(wide_tV, dim=-1)
    loss_sum = -(log_probability_tV.gather(1, picked_t1) * valid_t1).sum()
    grad_tV = log_probability_tV.exp_()
    grad_tV.scatter_add_(1, picked_t1, grad_tV.new_full((), -1.0).expand(picked_t1.shape))
    return loss_sum, grad_tV.mul_(valid_t1).to(logits_tV.dtype)


def _reduced(logits_tV: Tensor, targets_t: Tensor, spread: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exp(logit - largest) and the target's logit (0 where it is not among the rows), [t, 1]."""
    wide_tV = logits_tV.to(torch.promote_types(logits_tV.dtype, torch.float32))
    largest_t1 = wide_tV.amax(dim=-1, keepdim=True)
    if spread:
        largest_t1 = largest_t1.clamp(min=torch.finfo(wide_tV.dtype).min)  # of a rank that has no real row
    sum_t1 = (wide_tV - largest_t1).exp().sum(dim=-1, keepdim=True)
    here_t1 = ((targets_t >= 0) & (targets_t < logits_tV.shape[1]))[:, None]
    picked_t1 = wide_tV.gather(1, torch.where(here_t1, targets_t[:, None], 0))
    return largest_t1, sum_t1, torch.where(here_t1, picked_t1, 0)


def _gradient(
    logits_tV: Tensor, targets_t: Tensor, largest_t1: Tensor, sum_t1: Tensor, picked_t1: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ of log Σ exp - picked, and softmax - onehot; tokens whose target is -100 do not count."""
    wide_tV = logits_tV.to(largest_t1.dtype)
    total_t1 = largest_t1 + sum_t1.log()
    valid_t1 = (targets_t != -100)[:, None]
    loss_sum = torch.where(valid_t1, total_t1 - picked_t1, 0).sum()
    columns_V = torch.arange(logits_tV.shape[1], device=logits_tV.device)
    grad_tV = (wide_tV - total_t1).exp() - (columns_V == targets_t[:, None]).to(wide_tV.dtype)
    return loss_sum, torch.where(valid_t1, grad_tV, 0).to(logits_tV.dtype)


@cache
def _compiled() -> tuple[Any, Any]:
    """The same, each one kernel: a chunk's logits are read twice and written once."""
    return torch.compile(_reduced, dynamic=False), torch.compile(_gradient, dynamic=False)


def _add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """sum_ += a · b, in one kernel where the matrix product can add to a wider sum."""
    if sum_.is_cuda and sum_.dtype != a.dtype and _adds_wide(sum_.device, sum_.dtype, a.dtype):
        torch.addmm(sum_, a, b, out_dtype=sum_.dtype, out=sum_)
    else:
        sum_ += a @ b


@cache
def _adds_wide(device: torch.device, wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether this torch adds a narrow product to a wide sum in place here (cuBLAS can; CPUs cannot)."""
    sum_ = torch.ones(64, 64, dtype=wide, device=device)
    factor = torch.ones(64, 64, dtype=narrow, device=device)
    try:
        torch.addmm(sum_, factor, factor, out_dtype=wide, out=sum_)
    except (RuntimeError, TypeError):
        return False
    return bool((sum_ == 65).all())

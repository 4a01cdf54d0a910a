"""The loss of a language model without its logits. T tokens, D hidden, V vocabulary (this rank's rows of it)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from archwright.compiler.distributed.collectives import all_reduce

CHUNK_BYTES = 64 << 20
"""Of the logits that exist at a time."""
CPU_CHUNK_BYTES = 4 << 20
"""The same on a CPU: what stays in its cache."""

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
        chunk_bytes = CPU_CHUNK_BYTES if x_TD.device.type == "cpu" else CHUNK_BYTES
        chunk = max(1, chunk_bytes // (weight_VD.shape[0] * wide.itemsize))
        for start in range(0, x_TD.shape[0], chunk):
            part = slice(start, start + chunk)
            x_tD, targets_t = x_TD[part], targets_T[part]
            logits_tV = (x_tD @ matrix_VD.T).to(wide)
            chosen = _plain(logits_tV, targets_t) if rows is None else _spread(logits_tV, targets_t, rows)
            loss_sum += chosen.loss_sum
            if not (need_x or need_weight):
                continue
            grad_tV = chosen.gradient().to(x_TD.dtype)
            if grad_x_TD is not None:
                grad_x_TD[part] = grad_tV @ matrix_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_tV.T @ x_tD
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss_sum

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_x_TD is None else grad_x_TD * scale.to(grad_x_TD.dtype),
            None if grad_weight_VD is None else (grad_weight_VD * scale).to(ctx.weight_dtype),
            None,
            None,
        )


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The loss of some tokens. log_probability_tV: of the rows at hand; it is overwritten by `gradient`.

    picked_t1: the target's row; here_t1: whether it is one of those at hand. valid_t1: whether the token counts.
    """

    loss_sum: Tensor
    log_probability_tV: Tensor
    picked_t1: Tensor
    here_t1: Tensor
    valid_t1: Tensor

    def gradient(self) -> Tensor:
        """softmax - onehot, 0 for tokens that do not count."""
        grad_tV = self.log_probability_tV.exp_()
        grad_tV.scatter_add_(1, self.picked_t1, -self.here_t1.to(grad_tV.dtype))
        return grad_tV.mul_(self.valid_t1)


def _plain(logits_tV: Tensor, targets_t: Tensor) -> _Chunk:
    valid_t1 = (targets_t != -100)[:, None]
    picked_t1 = targets_t.clamp(min=0)[:, None]
    log_probability_tV = torch.log_softmax(logits_tV, dim=-1)
    loss_sum = -(log_probability_tV.gather(1, picked_t1) * valid_t1).sum()
    return _Chunk(
        loss_sum=loss_sum,
        log_probability_tV=log_probability_tV,
        picked_t1=picked_t1,
        here_t1=torch.ones_like(valid_t1),
        valid_t1=valid_t1,
    )


def _spread(logits_tV: Tensor, targets_t: Tensor, rows: Rows) -> _Chunk:
    """With the largest logit, the sum of exponentials and the target's logit taken over the group."""
    valid_t1 = (targets_t != -100)[:, None]
    logits_tV[:, rows.real :] = -torch.inf
    largest_t1 = logits_tV.max(dim=-1, keepdim=True).values if rows.real else logits_tV[:, :1]
    largest_t1 = all_reduce(largest_t1, rows.group, "max")
    local_t1 = targets_t[:, None] - rows.first
    here_t1 = (local_t1 >= 0) & (local_t1 < rows.real)
    picked_t1 = local_t1.where(here_t1, 0)
    logits_tV.sub_(largest_t1)
    chosen_t1 = logits_tV.gather(1, picked_t1).where(here_t1, 0)
    sums_t2 = all_reduce(torch.cat([logits_tV.exp().sum(-1, keepdim=True), chosen_t1], dim=1), rows.group)
    log_sum_t1 = sums_t2[:, :1].log()
    loss_sum = ((log_sum_t1 - sums_t2[:, 1:]) * valid_t1).sum()
    return _Chunk(
        loss_sum=loss_sum,
        log_probability_tV=logits_tV.sub_(log_sum_t1),
        picked_t1=picked_t1,
        here_t1=here_t1,
        valid_t1=valid_t1,
    )

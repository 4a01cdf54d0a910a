"""The loss of a language model without its logits. T tokens, D hidden, V vocabulary."""

from typing import Any

import torch

CHUNK_BYTES = 64 << 20
"""Of the logits that exist at a time."""
CPU_CHUNK_BYTES = 4 << 20
"""The same on a CPU: what stays in its cache."""


class LinearCrossEntropy(torch.autograd.Function):
    """Σ over tokens of -log softmax(x · weightᵀ)[target], -100 not counted, in chunks of tokens.

    Only one chunk's logits exist at a time. Their gradient, softmax - onehot, is formed in the forward, where they are
    at hand: recomputing them in the backward costs a third matmul over the vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
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
            valid_t1 = (targets_t != -100)[:, None]
            picked_t1 = targets_t.clamp(min=0)[:, None]
            log_probability_tV = torch.log_softmax((x_tD @ matrix_VD.T).to(wide), dim=-1)
            loss_sum -= (log_probability_tV.gather(1, picked_t1) * valid_t1).sum()
            if not (need_x or need_weight):
                continue
            grad_tV = log_probability_tV.exp_()
            grad_tV.scatter_add_(1, picked_t1, grad_tV.new_full((), -1.0).expand(picked_t1.shape))
            grad_tV = grad_tV.mul_(valid_t1).to(x_TD.dtype)
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
        )

"""AdamW with warmup and cosine decay, and the states that a checkpoint keeps."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from archwright.compiler.distributed.apply import global_norm, scale_
from archwright.spec.models import AdamW, Cosine

STATES = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter besides the number of steps."""


def make_optimizer(module: nn.Module, options: AdamW) -> torch.optim.AdamW:
    """AdamW over all parameters, weight decay on matrices only.

    The fused step also on the CPU: for a 2.2M-parameter model it takes 7 ms there, the foreach one 45 ms.
    """
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True)


def learning_rate(step: int, *, peak: float, schedule: Cosine, steps: int) -> float:
    """Of the step with index `step` (from 0).

    peak · (step + 1) / warmup at first, reaching the peak at the last warmup step; then
    peak · (f + (1 - f) · (1 + cos(π t)) / 2), t from 0 to 1 at the last step, f = final_fraction.
    """
    warmup = schedule.warmup_steps if schedule.warmup_steps is not None else max(1, round(0.02 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step + 1 - warmup) / max(1, steps - warmup)
    floor = schedule.final_fraction
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(module: nn.Module, max_norm: float | None) -> torch.Tensor:
    """The gradient's 2-norm over the whole model; gradients longer than max_norm are scaled down to it."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = global_norm(gradients)
    if max_norm is not None:
        scale_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def optimizer_states(module: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """`STATE.PARAMETER` → tensor, in the order of the parameters."""
    return {
        f"{state}.{name}": optimizer.state[parameter][state]
        for name, parameter in module.named_parameters()
        for state in STATES
    }


def restore_states(
    module: nn.Module, optimizer: torch.optim.AdamW, states: Mapping[str, torch.Tensor], step: int
) -> None:
    """Continue as after `step` steps with these states."""
    for name, parameter in module.named_parameters():
        kept = {state: states[f"{state}.{name}"] for state in STATES}
        device = parameter.device if parameter.device.type == "cuda" else torch.device("cpu")
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=device), **kept}

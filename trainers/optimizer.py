"""AdamW and Muon with warmup and cosine decay, and the states that a checkpoint keeps."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from archwright.compiler.distributed.apply import ShardedModel, global_norm
from archwright.compiler.distributed.layout import Layout, local_of
from archwright.compiler.ir import Param
from archwright.spec.models import AdamW, Cosine
from archwright.spec.models import Muon as MuonSpec
from archwright.spec.models import Optimizer as OptimizerSpec
from archwright.trainers.muon import Muon

ADAMW_STATES = ("exp_avg", "exp_avg_sq")
MUON_STATES = ("momentum",)


class Optimizers:
    """The optimizers of one model, each with its parameters; every parameter has one."""

    def __init__(self, model: ShardedModel, *parts: torch.optim.Optimizer) -> None:
        self._model, self._parts = model, parts
        self._peaks = [group["lr"] for part in parts for group in part.param_groups]
        self._of = {id(p): part for part in parts for group in part.param_groups for p in group["params"]}
        self._has_muon = any(isinstance(part, Muon) for part in parts)

    def step(self, factor: float, scale: torch.Tensor | None = None) -> None:
        """Update every parameter at `factor` times its peak learning rate, with `scale` times its gradient."""
        groups = [group for part in self._parts for group in part.param_groups]
        for group, peak in zip(groups, self._peaks, strict=True):
            group["lr"] = factor * peak
        for part in self._parts:
            if scale is not None:
                _scale(part, scale)
            part.step()
            part.zero_grad(set_to_none=True)

    def state_names(self, param: Param) -> tuple[str, ...]:
        """What is kept of a parameter, tensors of its shape."""
        return MUON_STATES if self._has_muon and param.is_projection else ADAMW_STATES

    def state(self, name: str, state: str) -> torch.Tensor:
        """This rank's part of a state of the parameter `name`."""
        parameter = self._model.parameters[name]
        return self._of[id(parameter)].state[parameter][state]

    def restore(self, parameter: torch.Tensor, states: Mapping[str, torch.Tensor], step: int) -> None:
        """Continue as after `step` steps with these states."""
        part, kept = self._of[id(parameter)], dict(states)
        if isinstance(part, torch.optim.AdamW):
            device = parameter.device if parameter.device.type == "cuda" else torch.device("cpu")
            kept["step"] = torch.tensor(float(step), device=device)
        part.state[parameter] = kept


def make_optimizer(model: ShardedModel, options: OptimizerSpec, **adamw: bool) -> Optimizers:
    """AdamW over all parameters, or Muon over the matrices of the layers and AdamW over the rest.

    adamw: how torch's AdamW works through its parameters, `fused=True` by default: also on the CPU, where for a
    2.2M-parameter model it takes 7 ms, and the foreach form 45 ms.
    """
    how = adamw or {"fused": True}
    pairs = [(parameter, model.layouts[name]) for name, parameter in model.parameters.items()]
    if isinstance(options, AdamW):
        return Optimizers(model, _adamw([parameter for parameter, _ in pairs], options, how))
    matrices = [(parameter, layout) for parameter, layout in pairs if layout.param.is_projection]
    rest = [parameter for parameter, layout in pairs if not layout.param.is_projection]
    parts: list[torch.optim.Optimizer] = [_adamw(rest, options.adamw, how)] if rest else []
    if matrices:
        parts.insert(0, _muon(matrices, options, model.options.compute_dtype))
    return Optimizers(model, *parts)


def _muon(matrices: list[tuple[nn.Parameter, Layout]], options: MuonSpec, dtype: torch.dtype) -> Muon:
    rate, decay = options.learning_rate, options.weight_decay
    return Muon(matrices, lr=rate, momentum=options.momentum, weight_decay=decay, dtype=dtype)


def _adamw(parameters: list[nn.Parameter], options: AdamW, how: Mapping[str, bool]) -> torch.optim.AdamW:
    """Weight decay on matrices only. A group's parameters lie on one mesh: torch takes them as a list."""
    by_kind: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for parameter in parameters:
        key = (parameter.ndim >= 2, getattr(parameter, "device_mesh", None))
        by_kind.setdefault(key, []).append(parameter)
    groups = [
        {"params": each, "weight_decay": options.weight_decay if matrix else 0.0}
        for (matrix, _), each in by_kind.items()
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, **how)


def _scale(part: torch.optim.Optimizer, scale: torch.Tensor) -> None:
    """Have the next step see its gradients scaled. The fused one does so as it reads them: a pass over memory less.

    Its scale is float32 whatever the gradients are, which float64 does not forgive.
    """
    group = part.param_groups[0]
    if group.get("fused") and group["params"][0].dtype != torch.float64:
        part.grad_scale = (1 / scale).float()  # pyright: ignore[reportAttributeAccessIssue]  # what it divides by
        part.found_inf = torch.zeros_like(part.grad_scale)  # pyright: ignore[reportAttributeAccessIssue]
        return
    gradients = [local_of(p.grad) for each in part.param_groups for p in each["params"] if p.grad is not None]
    torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))  # pyright: ignore[reportPrivateImportUsage]


def schedule_factor(step: int, *, schedule: Cosine, steps: int) -> float:
    """Of the peak learning rate, in the step with index `step` (from 0).

    (step + 1) / warmup at first, reaching 1 at the last warmup step; then f + (1 - f) · (1 + cos(π t)) / 2, t from 0
    to 1 at the last step, f = final_fraction.
    """
    warmup = schedule.warmup_steps if schedule.warmup_steps is not None else max(1, round(0.02 * steps))
    if step < warmup:
        return (step + 1) / warmup
    part = (step + 1 - warmup) / max(1, steps - warmup)
    floor = schedule.final_fraction
    return floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2


def clipping(model: ShardedModel, max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient's 2-norm over the whole model, and what to multiply it by so that it is at most max_norm."""
    norm = global_norm(model)
    return norm, None if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)

"""Muon: momentum whose matrix updates are made orthogonal (Jordan et al. 2024)."""

from collections.abc import Sequence
from typing import Any

import torch

from archwright.compiler.distributed.layout import Layout, local_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that takes singular values in (0, 1] to about 1: Jordan's, steep at 0, only near 1 at the end."""
STEPS = 5


def orthogonalize(update: torch.Tensor) -> torch.Tensor:
    """About U Vᵀ of a matrix U Σ Vᵀ: STEPS times X ← a X + (b A + c A²) X with A = X Xᵀ (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """W ← (1 - lr · decay) W - lr · sqrt(max(1, rows / columns)) · orthogonalize(g + momentum · (m - g)), Nesterov's
    form with m ← momentum · m + (1 - momentum) · g.

    torch's own Muon takes whole matrices only. Here a sharded matrix keeps a sharded momentum; its update is gathered,
    every rank makes the whole one orthogonal and keeps its part, so the result does not depend on the plan.
    dtype: of the iteration, which forgives bfloat16.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[torch.Tensor, Layout]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([parameter for parameter, _ in matrices], defaults)
        self._dtype = dtype
        self._layouts = [layout for _, layout in matrices]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        for parameter, layout in zip(group["params"], self._layouts, strict=True):
            if parameter.grad is not None:
                self._update(parameter, layout, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, parameter: torch.Tensor, layout: Layout, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        local, gradient, kept = local_of(parameter), local_of(parameter.grad), local_of(state["momentum"])
        kept.mul_(momentum).add_(gradient, alpha=1 - momentum)
        whole = orthogonalize(layout.gather(gradient * (1 - momentum) + kept * momentum).to(self._dtype))
        rows, columns = whole.shape
        part = whole[layout.slices(len(local))].to(local.dtype)
        local.mul_(1 - lr * weight_decay).add_(part, alpha=-lr * max(1, rows / columns) ** 0.5)

"""Activation checkpointing: what a layer's forward keeps for its backward, and what the backward computes again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from archwright.spec.models import Recompute

_aten, _collectives = torch.ops.aten, torch.ops._c10d_functional
KEPT: dict[str, tuple[Any, ...]] = {
    "attention": (
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    ),
    "linear": (
        _aten.mm.default,
        _aten.addmm.default,
        # A matrix product is what all ranks hold once it is summed: keeping it saves the collective too.
        _collectives.all_reduce.default,
        _collectives.reduce_scatter_tensor.default,
    ),
}
"""Operation of the language (`activation_checkpointing.keep`) → torch's operators whose outputs are kept."""


@dataclass(frozen=True)
class Checkpointing:
    """How a layer runs: its input alone is kept, and the outputs of the operators in `kept`."""

    kept: tuple[Any, ...] = ()

    def run(self, forward: Callable[..., Any], *args: Any) -> Any:
        options: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, self._policy)}
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **(options if self.kept else {})
        )

    def _policy(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in self.kept else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointing_of(recompute: Recompute) -> Checkpointing | None:
    """None where everything is kept."""
    if recompute.kind == "none":
        return None
    if recompute.kind == "full":
        return Checkpointing()
    return Checkpointing(kept=tuple(operator for name in recompute.keep for operator in KEPT[name]))

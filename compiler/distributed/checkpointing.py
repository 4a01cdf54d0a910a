"""Activation checkpointing: what a layer's forward keeps for its backward, and what the backward computes again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from archwright.compiler.distributed.ring import RING_ATTENTION
from archwright.compiler.distributed.symmetric import FETCH
from archwright.spec.models import Recompute

_aten, _collectives = torch.ops.aten, torch.ops._c10d_functional
KEPT: dict[str, tuple[Any, ...]] = {
    "attention": (
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        RING_ATTENTION,
    ),
    "linear": (
        _aten.mm.default,
        _aten.addmm.default,
        # A matrix product is what all ranks hold once it is summed: keeping it saves the collective too.
        _collectives.all_reduce.default,
        _collectives.reduce_scatter_tensor.default,
        FETCH,
    ),
}
"""Operation of the language (`activation_checkpointing.keep`) → torch's operators whose outputs are kept."""


@dataclass(frozen=True)
class Checkpointing:
    """How a layer runs: its input alone is kept, and with `context_fn` the outputs of some operators.

    context_fn: see torch.utils.checkpoint; made beforehand, since torch.compile takes it as a constant.
    """

    context_fn: Callable[[], Any] | None = None

    def run(self, forward: Callable[..., Any], *args: Any) -> Any:
        if self.context_fn is None:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=self.context_fn)


def checkpointing_of(recompute: Recompute) -> Checkpointing | None:
    """None where everything is kept."""
    if recompute.kind == "none":
        return None
    if recompute.kind == "full":
        return Checkpointing()
    kept = [operator for name in recompute.keep for operator in KEPT[name]]
    return Checkpointing(context_fn=partial(create_selective_checkpoint_contexts, kept))

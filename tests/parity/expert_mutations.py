"""Seeded bugs of mixtures of experts, and of the graphs of stages and of expert ranks.

B batch, S sequence, D hidden, E experts, X experts of a token.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch

from archwright.compiler.blocks import Experts
from archwright.compiler.interpreters.onnx_ops import OnnxOps
from archwright.compiler.interpreters.onnx_ops import Tensor as OnnxTensor
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.targets import stages
from tests.parity.mutations import (
    JOINED,
    ONNX,
    PARTITION,
    TORCH,
    TRAINED,
    Mutation,
    _on_node,
    _unverified,
    _wrap,
    _wrap_path,
)

STAGES, LAST = "ONNX Runtime, 2 stages", "ONNX Runtime, prefill of last logits"
EXPERT_RANKS, GATHERED = "ONNX Runtime, 2 expert ranks joined", "ONNX Runtime, 2 x 2 expert and tensor ranks joined"


def _not_normalized(original: Any, ops: Any, logits_BSE: Any, indices_BSX: Any, routing: Any) -> Any:
    return original(ops, logits_BSE, indices_BSX, replace(routing, normalize=False))


def _reversed_experts(
    original: Any,
    ops: Any,
    x_BSD: Any,
    weights_BSX: Any,
    indices_BSX: torch.Tensor,
    gate_EFD: Any,
    *rest: Any,
    **more: Any,
) -> Any:
    return original(ops, x_BSD, weights_BSX, len(gate_EFD) - 1 - indices_BSX, gate_EFD, *rest, **more)


def _reversed_numbers(original: Any, ops: OnnxOps, name: str, value: Any, dtype: Any) -> Any:
    return original(ops, name, value[::-1] if name == f"experts/{len(np.atleast_1d(value))}" else value, dtype)


def _one_expert_dropped(original: Any, ops: Any, x_BSD: Any, weights_BSX: torch.Tensor, *rest: Any, **more: Any) -> Any:
    """Of the last token, as an expert of limited capacity would."""
    kept_BSX = torch.ones_like(weights_BSX)
    kept_BSX[:, -1, 0] = 0
    return original(ops, x_BSD, weights_BSX * kept_BSX, *rest, **more)


def _penalty_of_the_batch(
    original: Any, ops: Any, logits_BSE: torch.Tensor, indices_BSX: Any, *rest: Any, **more: Any
) -> Any:
    """Shares over all sequences together, which depend on how these are spread over micro-batches and ranks."""
    penalty_B = original(ops, logits_BSE.flatten(0, 1)[None], indices_BSX.flatten(0, 1)[None], *rest, **more)
    return penalty_B.expand(len(logits_BSE))


def _all_weights_partial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the routers' weights, of which each tensor rank forms a part, is not summed."""
    monkeypatch.setattr(Experts, "num_entering", 1)


def _experts_not_reduced(original: Any, block: Any, *rest: Any) -> Any:
    annotated = original(block, *rest)
    return replace(annotated, reduce=None) if isinstance(annotated, Experts) else annotated


def _before_the_last_residual(ops: OnnxOps, inputs: Any, rest: Any) -> Any:
    """What is handed to the next stage lacks what the last feed-forward adds."""
    add = inputs[0].value.producer()
    return "Identity", [OnnxTensor(add.inputs[0], ops)], rest


def _layers_from_zero(original: Any, plan: Any, number: int) -> Any:
    """Each stage counts its own layers, so that two stages have caches of one name."""
    stage = original(plan, number)
    own = {path: index for index, path in enumerate(stage.program.states())}
    return replace(stage, caches={(path, state): f"{own[path]}.{state}" for path, state in stage.caches})


def _experts_from_zero(original: Any, ops: OnnxOps, *args: Any, **rest: Any) -> Any:
    """Every rank takes its experts for the first ones."""
    return original(replace(ops, ranks=dict.fromkeys(ops.ranks, 0), nodes=ops.nodes), *args, **rest)


def _everybody(_: Any, ops: OnnxOps, axes: Any) -> list[int]:
    """What the tensor ranks add up, the ranks of all experts add up."""
    return list(range(prod(ops.degrees.values())))


def _first_token(original: Any, ops: OnnxOps, x_BSD: Any, index_B: Any) -> Any:
    """One row further back."""
    return original(ops, x_BSD, ops.emit("Max", [index_B + ops.integers(-1), ops.integers(0)], name="slip"))


EXPERT_MUTATIONS: Mapping[str, Mutation] = {
    "weights of experts not normalised, torch": Mutation(
        comparison=TORCH, patch=_wrap(TorchOps, "routing_weights", _not_normalized)
    ),
    "weights of experts not normalised, ONNX": Mutation(
        comparison=ONNX, patch=_wrap(OnnxOps, "routing_weights", _not_normalized)
    ),
    "experts in another order, torch": Mutation(comparison=TORCH, patch=_wrap(TorchOps, "experts", _reversed_experts)),
    "experts in another order, ONNX": Mutation(comparison=ONNX, patch=_wrap(OnnxOps, "constant", _reversed_numbers)),
    "a token's expert dropped, torch": Mutation(
        comparison=TORCH, patch=_wrap(TorchOps, "experts", _one_expert_dropped)
    ),
    "penalties of routers dropped, torch": Mutation(
        comparison=TORCH, patch=_wrap(TorchOps, "sum_over_targets", lambda original, *args: 0 * original(*args))
    ),
    "penalties over the batch, torch": Mutation(
        comparison=TORCH, patch=_wrap(TorchOps, "router_penalty", _penalty_of_the_batch)
    ),
    "gradient of routers not summed over ranks": Mutation(comparison=TRAINED, patch=_unverified(_all_weights_partial)),
    "all-reduce of experts missing, joined ranks": Mutation(
        comparison=JOINED, patch=_unverified(_wrap_path(f"{PARTITION}:_annotate", _experts_not_reduced))
    ),
    "all-reduce of experts missing, expert ranks": Mutation(
        comparison=EXPERT_RANKS, patch=_unverified(_wrap_path(f"{PARTITION}:_annotate", _experts_not_reduced))
    ),
    "experts of every rank numbered from 0": Mutation(
        comparison=EXPERT_RANKS, patch=_wrap(OnnxOps, "experts", _experts_from_zero)
    ),
    "experts of every rank numbered from 0, gathered": Mutation(
        comparison=GATHERED, patch=_wrap(OnnxOps, "experts", _experts_from_zero)
    ),
    "tensor ranks add up with other groups": Mutation(
        comparison=GATHERED, patch=_wrap(OnnxOps, "_members", _everybody)
    ),
    "caches of a stage numbered from 0": Mutation(
        comparison=STAGES, patch=_wrap(stages, "stage_of", _layers_from_zero)
    ),
    "hidden states handed on before the last residual": Mutation(
        comparison=STAGES, patch=_on_node("Identity", _before_the_last_residual)
    ),
    "logits of the token before": Mutation(comparison=LAST, patch=_wrap(OnnxOps, "take_token", _first_token)),
}

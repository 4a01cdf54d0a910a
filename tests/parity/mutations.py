"""Seeded bugs: each patches one place of one interpreter or pass, as a slip of the pen would have left it.

B batch, S sequence, N query heads, K key/value heads, H head_dim, L visible positions, D hidden, V vocabulary.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from archwright.compiler.blocks import Linear, PositionedEmbedding, SwiGLU
from archwright.compiler.distributed import context
from archwright.compiler.interpreters import cross_entropy, torch_module, torch_ops
from archwright.compiler.interpreters.onnx_ops import OnnxOps
from archwright.compiler.interpreters.torch_module import BlockModule
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import RopeTable, Split, Window
from archwright.trainers import loop
from archwright.trainers.batches import Batch

Patch = Callable[[pytest.MonkeyPatch], None]
PARTITION = "archwright.compiler.passes.partition"


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A bug, and a comparison of the differential suite that must notice it."""

    comparison: str
    patch: Patch


def _wrap(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """Replace a function by `change(original, *args, **kwargs)`."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))

    return patch


def _wrap_path(path: str, change: Callable[..., Any]) -> Patch:
    """The same for `module:name`."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        module, _, name = path.partition(":")
        _wrap(importlib.import_module(module), name, change)(monkeypatch)

    return patch


def _on_node(op: str, change: Callable[..., Any]) -> Patch:
    """Change the ONNX nodes of one operator: `change(ops, inputs, attributes) → (op, inputs, attributes)`."""

    def emit(original: Any, ops: OnnxOps, kind: str, inputs: Any, **attributes: Any) -> Any:
        if kind == op:
            kind, inputs, attributes = change(ops, inputs, attributes)
        return original(ops, kind, inputs, **attributes)

    return _wrap(OnnxOps, "emit", emit)


def _larger_scale(original: Any, ops: Any, *values: Any, scale: float, **rest: Any) -> Any:
    return original(ops, *values, scale=1.01 * scale, **rest)


def _sees_one_ahead(original: Any, masks: Any, positions_BS: torch.Tensor, kv_positions_L: Any) -> Any:
    shift = 0 if kv_positions_L is None else 1
    return original(masks, positions_BS + shift, kv_positions_L)


def _wider_window(original: Any, masks: Any, positions_BS: Any, kv_positions_L: Any) -> Any:
    wide = {mask.key: Window(mask.size + 1) if isinstance(mask, Window) else mask for mask in masks}
    made = original(wide.values(), positions_BS, kv_positions_L)
    return {key: made[mask.key] for key, mask in wide.items() if mask.key in made}


def _interleaved(original: Any, ops: Any, x_BNSH: torch.Tensor, *rest: Any) -> torch.Tensor:
    return original(ops, x_BNSH.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), *rest)


def _narrow_tables(original: Any, table: RopeTable, positions_BS: torch.Tensor, dtype: torch.dtype) -> Any:
    cos_B1SH, sin_B1SH = original(table, positions_BS, dtype)
    return cos_B1SH.to(dtype), sin_B1SH.to(dtype)


def _narrow_onnx_tables(original: Any, ops: OnnxOps, name: str, shape: Any, dtype: Any, *rest: Any, **more: Any) -> Any:
    return original(ops, name, shape, ops.dtype if name.startswith("rope_") else dtype, *rest, **more)


def _swapped_gate(original: Any, block: SwiGLU, ops: Any, m: Any, x_BSD: Any) -> Any:
    return m.down_proj(ops.silu(m.up_proj(x_BSD)) * m.gate_proj(x_BSD))


def _next_row(original: Any, ops: Any, m: Any, name: str, x_BKSH: Any, step: Any) -> Any:
    if step.write_index_B is None:
        return original(ops, m, name, x_BKSH, step)
    return original(ops, m, name, x_BKSH, replace(step, write_index_B=step.write_index_B + 1))


def _unwritten_row(original: Any, ops: Any, m: Any, name: str, x_BKSH: Any, step: Any) -> Any:
    if step.write_index_B is None or x_BKSH.shape[2] > 1:
        return original(ops, m, name, x_BKSH, step)
    return m.cache[name][:, :, : step.kv_positions_L.shape[0]]


def _tiled_heads(
    original: Any, ops: Any, q_BNSH: torch.Tensor, k_BKLH: torch.Tensor, v_BKLH: torch.Tensor, **rest: Any
) -> torch.Tensor:
    """Query head n reads key/value head n mod K in place of n div (N / K)."""
    groups = q_BNSH.shape[1] // k_BKLH.shape[1]
    return original(ops, q_BNSH, k_BKLH.repeat(1, groups, 1, 1), v_BKLH.repeat(1, groups, 1, 1), **rest)


def _no_eps(original: Any, ops: Any, *inputs: Any) -> Any:
    *inputs, _ = inputs
    return original(ops, *inputs, 1e-12)


def _other_gelu(original: Any, ops: Any, x: Any, approximation: str) -> Any:
    return original(ops, x, "tanh" if approximation == "none" else "none")


def _no_norm_bias(original: Any, ops: Any, x_BSD: Any, weight_D: Any, bias_D: Any, eps: float) -> Any:
    return original(ops, x_BSD, weight_D, None, eps)


def _unscaled(original: Any, table: RopeTable, *rest: Any) -> Any:
    return original(replace(table, factor=None), *rest)


def _first_rows_positions(original: Any, *args: Any, positions_BS: Any = None, **rest: Any) -> Any:
    if positions_BS is not None:
        positions_BS = positions_BS[:1].expand(positions_BS.shape)
    return original(*args, positions_BS=positions_BS, **rest)


def _next_position(original: Any, block: Any, ops: Any, m: Any, ids_BS: Any, step: Any) -> Any:
    if isinstance(ops, TorchOps):
        step = replace(step, positions_BS=step.positions_BS + 1)
    return original(block, ops, m, ids_BS, step)


def _next_row_of_positions(original: Any, ops: OnnxOps, ids_BS: Any, weight_VD: Any, **rest: Any) -> Any:
    return original(ops, ids_BS + ops.integers(1) if "positions" in weight_VD.name else ids_BS, weight_VD, **rest)


def _all_targets_count(
    original: Any, ops: Any, x_BSD: Any, weight_VD: Any, targets_BS: torch.Tensor, **rest: Any
) -> Any:
    return original(ops, x_BSD, weight_VD, targets_BS.clamp(min=0), **rest)


def _mean_of_means(original: Any, trainer: Any, batch: Batch) -> Any:
    """Each piece's mean loss, and the mean of these: what averaging the ranks' losses does."""
    number = trainer.share.micro_batches
    pieces = zip(np.split(batch.ids_BS, number), np.split(batch.targets_BS, number), strict=True)
    alone = replace(trainer, share=replace(trainer.share, micro_batches=1))
    losses, counts = zip(*[original(alone, Batch(ids_BS=ids, targets_BS=own)) for ids, own in pieces], strict=True)
    for parameter in trainer.model.parameters.values():
        parameter.grad /= number
    return torch.stack(losses).mean(), sum(counts)


def _untied(original: Any, module: BlockModule, name: str, owner: nn.Module) -> None:
    """The head gets a matrix of its own, which no checkpoint fills."""
    value = getattr(owner, name, None)
    if isinstance(value, nn.Parameter):
        owner = nn.Module()
        owner.register_parameter(name, nn.Parameter(torch.zeros_like(value)))
    original(module, name, owner)


def _head_forgets(original: Any, ops: Any, x_BSD: Any, weight_VD: torch.Tensor, targets_BS: Any, **rest: Any) -> Any:
    """The head's share of a tied matrix's gradient is lost."""
    return original(ops, x_BSD, weight_VD.detach() + 0 * weight_VD, targets_BS, **rest)


def _bias_on_every_rank(original: Any, ops: Any, x: Any, weight: Any, bias: Any, *, reduce: Any, **rest: Any) -> Any:
    if reduce is None or bias is None:
        return original(ops, x, weight, bias, reduce=reduce, **rest)
    if isinstance(ops, OnnxOps):
        partial = original(ops, x, weight, bias, reduce=None)
        return ops.reduce(partial, reduce)
    return torch_ops.reduce_from(original(ops, x, weight, bias, reduce=None), ops.groups[reduce.mesh_axis])


def _no_reduce(original: Any, block: Any, *rest: Any) -> Any:
    annotated = original(block, *rest)
    return replace(annotated, reduce=None) if isinstance(annotated, Linear) else annotated


def _no_enter(original: Any, block: Any, *rest: Any) -> Any:
    return replace(original(block, *rest), enter=None)


def _unverified(change: Patch) -> Patch:
    """A bug in a pass, in a world where the verifier has not been written: it would refuse the Program."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("verify_plan", "verify_program"):
            monkeypatch.setattr(f"archwright.compiler.passes.{name}", lambda _: None)
        change(monkeypatch)

    return patch


def _wrong_dim(original: Any, split: Split, shape: tuple[int, ...], rank: int) -> Any:
    return original(replace(split, dim=len(shape) - 1 - split.dim), shape, rank)


def _strided(original: Any, split: Split, shape: tuple[int, ...], rank: int) -> Any:
    return tuple(
        slice(split.piece(rank), None, split.parts) if dim == split.dim else slice(None) for dim in range(len(shape))
    )


def _next_piece(original: Any, x: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    """Of the summed sequence each rank goes on with its neighbour's piece."""
    return original(x.roll(x.shape[dim] // group.size(), dim), group, dim)


def _own_gradient(original: Any, ops: TorchOps, value: Any, param: Any) -> Any:
    return original(ops, value, replace(param, partial=None))


def _next_rows(original: Any, ops: TorchOps, weight_VD: torch.Tensor, gather: Any) -> Any:
    rows = original(ops, weight_VD, gather)
    return rows and replace(rows, first=rows.first + weight_VD.shape[0])


def _rows_of_the_next_rank(original: Any, ops: TorchOps, ids_BS: Any, weight_VD: Any, *, reduce: Any) -> Any:
    if reduce is not None:
        ops = replace(ops, ranks={axis: rank + 1 for axis, rank in ops.ranks.items()})
    return original(ops, ids_BS, weight_VD, reduce=reduce)


def _own_largest(original: Any, x: torch.Tensor, group: Any, operation: str = "sum") -> torch.Tensor:
    return x if operation == "max" else original(x, group, operation)


def _whole_gradient(original: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum's gradient is summed as well: what a collective that is its own transpose would do."""
    return torch_ops.copy_to(original(x, group), group)


TORCH, ONNX, JOINED, RANKS = "torch, float32", "ONNX Runtime", "ONNX Runtime, 2 ranks joined", "two processes, float64"
TRAINED, SEQUENCE, CONTEXT = "two processes, training", "two processes, sequence", "two processes, context"

MUTATIONS: Mapping[str, Mutation] = {
    "scale is 1% larger, torch": Mutation(comparison=TORCH, patch=_wrap(TorchOps, "attention", _larger_scale)),
    "scale is 1% larger, ONNX": Mutation(comparison=ONNX, patch=_wrap(OnnxOps, "attention", _larger_scale)),
    "mask sees one position ahead, torch": Mutation(
        comparison=TORCH, patch=_wrap(torch_ops, "_visible", _sees_one_ahead)
    ),
    "mask hides the token itself, ONNX": Mutation(
        comparison=ONNX, patch=_on_node("LessOrEqual", lambda _, inputs, rest: ("Less", inputs, rest))
    ),
    "window is one token wider, torch": Mutation(comparison=TORCH, patch=_wrap(torch_ops, "_visible", _wider_window)),
    "window is one token wider, ONNX": Mutation(
        comparison=ONNX, patch=_on_node("Greater", lambda _, inputs, rest: ("GreaterOrEqual", inputs, rest))
    ),
    "rope on interleaved pairs, torch": Mutation(comparison=TORCH, patch=_wrap(TorchOps, "rope", _interleaved)),
    "rope on interleaved pairs, ONNX": Mutation(
        comparison=ONNX,
        patch=_on_node(
            "RotaryEmbedding", lambda _, inputs, rest: ("RotaryEmbedding", inputs, {**rest, "interleaved": 1})
        ),
    ),
    "rope tables in the computation's dtype, torch": Mutation(
        comparison="torch, RoPE in bfloat16", patch=_wrap(torch_ops, "_rotation", _narrow_tables)
    ),
    "rope tables in the computation's dtype, ONNX": Mutation(
        comparison="ONNX Runtime, bfloat16 weights", patch=_wrap(OnnxOps, "external", _narrow_onnx_tables)
    ),
    "rope scaling forgotten, torch": Mutation(comparison=TORCH, patch=_wrap(torch_ops, "_frequencies", _unscaled)),
    "rope scaling forgotten, ONNX": Mutation(comparison=ONNX, patch=_wrap(RopeTable, "frequencies", _unscaled)),
    "learned positions counted from 1, torch": Mutation(
        comparison=TORCH, patch=_wrap(PositionedEmbedding, "forward", _next_position)
    ),
    "learned positions counted from 1, ONNX": Mutation(
        comparison=ONNX, patch=_wrap(OnnxOps, "embed", _next_row_of_positions)
    ),
    "every row at the first row's positions, torch": Mutation(
        comparison=TORCH, patch=_wrap(torch_module, "make_step", _first_rows_positions)
    ),
    "gate and up swapped, torch": Mutation(comparison=TORCH, patch=_wrap(SwiGLU, "forward", _swapped_gate)),
    "gate and up swapped, ONNX": Mutation(comparison=ONNX, patch=_wrap(SwiGLU, "forward", _swapped_gate)),
    "the other GELU, torch": Mutation(comparison=TORCH, patch=_wrap(TorchOps, "gelu", _other_gelu)),
    "the other GELU, ONNX": Mutation(comparison=ONNX, patch=_wrap(OnnxOps, "gelu", _other_gelu)),
    "eps of RMSNorm forgotten, torch": Mutation(comparison=TORCH, patch=_wrap(TorchOps, "rms_norm", _no_eps)),
    "eps of RMSNorm forgotten, ONNX": Mutation(comparison=ONNX, patch=_wrap(OnnxOps, "rms_norm", _no_eps)),
    "eps of LayerNorm forgotten, torch": Mutation(comparison=TORCH, patch=_wrap(TorchOps, "layer_norm", _no_eps)),
    "eps of LayerNorm forgotten, ONNX": Mutation(comparison=ONNX, patch=_wrap(OnnxOps, "layer_norm", _no_eps)),
    "bias of LayerNorm forgotten, ONNX": Mutation(comparison=ONNX, patch=_wrap(OnnxOps, "layer_norm", _no_norm_bias)),
    "cache written one row too far, torch": Mutation(comparison=TORCH, patch=_wrap(TorchOps, "kv_update", _next_row)),
    "cache written one row too far, ONNX": Mutation(
        comparison=ONNX,
        patch=_on_node(
            "TensorScatter",
            lambda ops, inputs, rest: ("TensorScatter", [*inputs[:2], inputs[2] + ops.integers(1)], rest),
        ),
    ),
    "stale cache row in decode, torch": Mutation(comparison=TORCH, patch=_wrap(TorchOps, "kv_update", _unwritten_row)),
    "key/value heads tiled, torch": Mutation(comparison=TORCH, patch=_wrap(TorchOps, "attention", _tiled_heads)),
    "tied head untied, torch": Mutation(comparison=TORCH, patch=_wrap(BlockModule, "borrow", _untied)),
    "head's gradient lost": Mutation(
        comparison="torch, gradients", patch=_wrap(TorchOps, "linear_cross_entropy", _head_forgets)
    ),
    "masked targets count, torch": Mutation(
        comparison=TORCH, patch=_wrap(TorchOps, "linear_cross_entropy", _all_targets_count)
    ),
    "loss averaged per micro-batch": Mutation(
        comparison="torch, micro-batches", patch=_wrap(loop, "accumulate", _mean_of_means)
    ),
    "all-reduce missing, two processes": Mutation(
        comparison=RANKS, patch=_unverified(_wrap_path(f"{PARTITION}:_annotate", _no_reduce))
    ),
    "all-reduce missing, joined ranks": Mutation(
        comparison=JOINED, patch=_unverified(_wrap_path(f"{PARTITION}:_annotate", _no_reduce))
    ),
    "bias added on every rank, two processes": Mutation(
        comparison=RANKS, patch=_wrap(TorchOps, "linear", _bias_on_every_rank)
    ),
    "bias added on every rank, joined ranks": Mutation(
        comparison=JOINED, patch=_wrap(OnnxOps, "linear", _bias_on_every_rank)
    ),
    "gradient not summed over ranks": Mutation(
        comparison=TRAINED, patch=_unverified(_wrap_path(f"{PARTITION}:_annotate", _no_enter))
    ),
    "gradient of a sum summed again": Mutation(
        comparison=TRAINED, patch=_wrap(torch_ops, "reduce_from", _whole_gradient)
    ),
    "vocabulary of the loss off by one piece": Mutation(comparison=TRAINED, patch=_wrap(TorchOps, "_rows", _next_rows)),
    "table looked up one piece off": Mutation(
        comparison=TRAINED, patch=_wrap(TorchOps, "embed", _rows_of_the_next_rank)
    ),
    "largest logit not shared": Mutation(comparison=TRAINED, patch=_wrap(cross_entropy, "all_reduce", _own_largest)),
    "reduce-scatter leaves the neighbour's piece": Mutation(
        comparison=SEQUENCE, patch=_wrap(torch_ops, "scatter_to", _next_piece)
    ),
    "gradients of partial parameters not summed": Mutation(
        comparison=SEQUENCE, patch=_wrap(TorchOps, "param", _own_gradient)
    ),
    "context chunks in plain order": Mutation(
        comparison=CONTEXT,
        patch=_wrap(context, "gathered_order", lambda original, length, *rest: original(length, *rest).sort()[0]),
    ),
    "weights cut along the wrong dim": Mutation(comparison=JOINED, patch=_wrap(Split, "slices", _wrong_dim)),
    "weights cut in strides, joined ranks": Mutation(comparison=JOINED, patch=_wrap(Split, "slices", _strided)),
    "weights cut in strides, two processes": Mutation(comparison=RANKS, patch=_wrap(Split, "slices", _strided)),
    "ranks read the wrong key/value head": Mutation(
        comparison="ONNX Runtime, 4 ranks joined",
        patch=_wrap(Split, "piece", lambda _, split, rank: rank % split.parts),
    ),
}

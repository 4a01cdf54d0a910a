"""Masks as boolean tensors of a graph. B batch, S sequence, L visible cache positions."""

from typing import TYPE_CHECKING

import onnx_ir as ir

from archwright.compiler.ir import Causal, Mask, Step, Window

if TYPE_CHECKING:
    from archwright.compiler.interpreters.onnx_ops import OnnxOps, Size, Tensor


def visible(ops: "OnnxOps", mask: Mask, step: "Step[Tensor]") -> "Tensor":
    """What a mask value shows [B, 1, S, L]; the caller's scope is the whole graph, since layers share it."""
    key = f"mask/{mask.key}"
    shown = _compare(ops, "LessOrEqual", step, 0, key if isinstance(mask, Causal) else f"{key}/causal")
    if isinstance(mask, Window):
        recent = _compare(ops, "Greater", step, mask.size, f"{key}/recent")
        shown = ops.emit("And", [shown, recent], name=key)
    return shown


def _compare(ops: "OnnxOps", op: str, step: "Step[Tensor]", offset: int, name: str) -> "Tensor":
    """Boolean [B, 1, S, L]: kv_position `op` (position - offset)."""
    assert step.kv_positions_L is not None
    batch, sequence = step.positions_BS.shape
    query = step.positions_BS
    if offset:
        query = ops.emit("Sub", [query, ops.integers(offset)], name=f"{name}/offset")
    axes = ops.integers(1, 3)
    query_B1S1 = ops.emit("Unsqueeze", [query, axes], name=f"{name}/query", shape=(batch, 1, sequence, 1))
    shape = (batch, 1, sequence, num_visible_of(step))
    return ops.emit(op, [step.kv_positions_L, query_B1S1], name=name, shape=shape, dtype=ir.DataType.BOOL)


def num_visible_of(step: "Step[Tensor]") -> "Size":
    """L."""
    assert step.kv_positions_L is not None
    return step.kv_positions_L.shape[0]

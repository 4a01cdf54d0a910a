"""Seeded bugs of the dialects' lowerings and of the fusion passes.

B batch, S sequence, D hidden, L visible positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from archwright.compiler.interpreters.onnx_dialects.onnxruntime_dialect import OnnxruntimeOps
from archwright.compiler.interpreters.onnx_dialects.tensorrt_dialect import TensorrtOps
from archwright.compiler.passes import fuse
from archwright.compiler.targets import portable_form
from tests.parity.dialects import FUSED, OWN, OWN_HALF, OWN_RANKS, TENSORRT, TENSORRT_RANKS
from tests.parity.mutations import Mutation, _on_node, _wrap


def _one_key_more(_: Any, inputs: list[Any], rest: dict[str, Any]) -> Any:
    """The last row with a key is taken for the number of keys."""
    return ("Add", inputs, rest) if rest["name"] == "seqlens_k/last" else ("Sub", inputs, rest)


def _without_own_tokens(original: Any, ops: Any, step: Any) -> Any:
    """The lengths before this step's tokens are written."""
    original(ops, step)
    return ops.emit("Sub", [ops._shared["ends"], ops._sequence(step)], name="before")


def _first_rows_end(original: Any, ops: Any, step: Any) -> Any:
    """Every row of the batch as long as the first."""
    ends_B = original(ops, step)
    first = ops.emit("Gather", [ends_B, ops.integers(0)], name="first", shape=(1,), axis=0)
    batch = ops.emit("Shape", [ends_B], name="batch", shape=(1,))
    return ops.emit("Expand", [first, batch], name="same", shape=ends_B.shape)


def _upper_left(original: Any, rewriting: Any, lengths: str, q: str, k: str) -> Any:
    """Query i sees keys ≤ i, whatever stands before the step's tokens."""
    for node in original(rewriting, lengths, q, k):
        if node.name.endswith("/last"):
            node.op_type, node.input[:] = "Identity", [node.input[1]]
        yield node


def _unscaled(original: Any, ops: TensorrtOps, q_BNSH: Any, scale: float) -> Any:
    return q_BNSH


def _forgotten_scale(original: Any, program: Any) -> Any:
    return replace(original(program), weights={})


def _swapped(first: str, second: str) -> Any:
    """Two parts of a fused matrix in each other's place."""

    def change(original: Any, program: Any) -> Any:
        fused = original(program)

        def swap(parts: Sequence[Any]) -> Any:
            names = {first: second, second: first}
            return tuple(
                replace(part, name=".".join(names.get(word, word) for word in part.name.split("."))) for part in parts
            )

        return replace(fused, weights={name: swap(parts) for name, parts in fused.weights.items()})

    return change


def _passes(name: fuse.Fusion, change: Any) -> Any:
    """Patch one of the fusion passes, which are found in a table."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = fuse.PASSES[name]
        monkeypatch.setitem(fuse.PASSES, name, lambda program: change(original, program))  # pyright: ignore[reportArgumentType]

    return patch


def _unsummed(original: Any, ops: OnnxruntimeOps, op: str, x_BSD: Any, *rest: Any) -> Any:
    """The norm goes on as the residual, and not the sum."""
    y_BSD = original(ops, op, x_BSD, *rest)
    if y_BSD is not None:
        ops._replaced[-1] = ops._replaced[-1][0], y_BSD.value
    return y_BSD


def _twice_added(original: Any, ops: OnnxruntimeOps, op: str, x_BSD: Any, *rest: Any) -> Any:
    if x_BSD.value in ops._sums:
        x, _ = ops._sums[x_BSD.value]
        ops._sums[x_BSD.value] = x, x
    return original(ops, op, x_BSD, *rest)


def _attribute(op: str, name: str, change: Any) -> Any:
    return _on_node(op, lambda _, inputs, rest: (op, inputs, {**rest, name: change(rest[name])}))


def _swapped_tables(original: Any, ops: Any, table: Any) -> Any:
    cos, sin = original(ops, table)
    return sin, cos


DIALECT_MUTATIONS: Mapping[str, Mutation] = {
    "seqlens_k off by one": Mutation(comparison=OWN, patch=_on_node("Sub", _one_key_more)),
    "all rows as long as the first, own dialect": Mutation(
        comparison=OWN, patch=_wrap(OnnxruntimeOps, "_ends", _first_rows_end)
    ),
    "all rows as long as the first, tensorrt dialect": Mutation(
        comparison=TENSORRT, patch=_wrap(TensorrtOps, "_ends", _first_rows_end)
    ),
    "kv_lengths without the step's own tokens": Mutation(
        comparison=TENSORRT, patch=_wrap(TensorrtOps, "_ends", _without_own_tokens)
    ),
    "upper left instead of lower right": Mutation(
        comparison=TENSORRT, patch=_wrap(portable_form._Rewriting, "_mask", _upper_left)
    ),
    "scale forgotten, tensorrt dialect": Mutation(comparison=TENSORRT, patch=_wrap(TensorrtOps, "_scaled", _unscaled)),
    "folded scale not in the weights": Mutation(comparison=TENSORRT_RANKS, patch=_passes("scale", _forgotten_scale)),
    "k and v swapped in the fused matrix": Mutation(
        comparison=OWN_RANKS, patch=_passes("qkv", _swapped("k_proj", "v_proj"))
    ),
    "gate and up swapped in the fused matrix": Mutation(
        comparison=FUSED, patch=_passes("gate_up", _swapped("gate_proj", "up_proj"))
    ),
    "wrong residual behind a skip norm": Mutation(comparison=OWN, patch=_wrap(OnnxruntimeOps, "_skip_norm", _unsummed)),
    "skip norm adds the same twice": Mutation(comparison=OWN, patch=_wrap(OnnxruntimeOps, "_skip_norm", _twice_added)),
    "window is one token wider, own dialect": Mutation(
        comparison=OWN, patch=_attribute("GroupQueryAttention", "local_window_size", lambda size: size + (size > 0))
    ),
    "scale is 1% larger, own dialect": Mutation(
        comparison=OWN_HALF, patch=_attribute("GroupQueryAttention", "scale", lambda scale: 1.01 * scale)
    ),
    "rotation forgotten, own dialect": Mutation(
        comparison=OWN, patch=_attribute("GroupQueryAttention", "do_rotary", lambda _: 0)
    ),
    "cos and sin swapped, own dialect": Mutation(
        comparison=OWN, patch=_wrap(OnnxruntimeOps, "_rotation", _swapped_tables)
    ),
}

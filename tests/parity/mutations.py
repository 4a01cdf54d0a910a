"""Seeded bugs: each patches one place of one interpreter or pass, as a slip of the pen would have left it.

B batch, S sequence, N query heads, K key/value heads, H head_dim, L visible positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from archwright.compiler.blocks import Linear, SwiGLU
from archwright.compiler.interpreters import torch_module
from archwright.compiler.interpreters.onnx_ops import OnnxOps
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import RopeTable, Split

Patch = Callable[[pytest.MonkeyPatch], None]
PARTITION = "archwright.compiler.passes.partition"


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A bug and the comparison that must notice it: torch, onnx, joined2, joined4, ranks or gradients."""

    target: str
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
        import importlib

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


def _sees_one_ahead(original: Any, ops: Any, *values: Any, step: Any, **rest: Any) -> Any:
    if step.kv_positions_L is not None:
        step = replace(step, visible_B1SL=step.kv_positions_L <= step.positions_BS[:, None, :, None] + 1)
    return original(ops, *values, step=step, **rest)


def _interleaved(original: Any, ops: Any, x_BNSH: torch.Tensor, *rest: Any) -> torch.Tensor:
    return original(ops, x_BNSH.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), *rest)


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


def _no_eps(original: Any, ops: Any, x_BSD: Any, weight_D: Any, eps: float) -> Any:
    return original(ops, x_BSD, weight_D, 0.0)


def _unscaled(original: Any, table: RopeTable) -> Any:
    return original(replace(table, factor=None))


def _first_rows_positions(original: Any, *args: Any, positions_BS: Any = None, **rest: Any) -> Any:
    if positions_BS is not None:
        positions_BS = positions_BS[:1].expand(positions_BS.shape)
    return original(*args, positions_BS=positions_BS, **rest)


def _all_targets_count(original: Any, ops: Any, x_BSD: Any, weight_VD: Any, targets_BS: torch.Tensor) -> Any:
    return original(ops, x_BSD, weight_VD, targets_BS.clamp(min=0))


def _no_reduce(original: Any, block: Any) -> Any:
    annotated = original(block)
    return replace(annotated, reduce=None) if isinstance(annotated, Linear) else annotated


def _no_enter(original: Any, block: Any) -> Any:
    return replace(original(block), enter=None)


def _wrong_dim(original: Any, split: Split, shape: tuple[int, ...], rank: int) -> Any:
    return original(replace(split, dim=len(shape) - 1 - split.dim), shape, rank)


def _strided(original: Any, split: Split, shape: tuple[int, ...], rank: int) -> Any:
    return tuple(
        slice(split.piece(rank), None, split.parts) if dim == split.dim else slice(None) for dim in range(len(shape))
    )


MUTATIONS: Mapping[str, Mutation] = {
    "scale is 1% larger, torch": Mutation(target="torch", patch=_wrap(TorchOps, "attention", _larger_scale)),
    "scale is 1% larger, ONNX": Mutation(target="onnx", patch=_wrap(OnnxOps, "attention", _larger_scale)),
    "mask sees one position ahead, torch": Mutation(
        target="torch", patch=_wrap(TorchOps, "attention", _sees_one_ahead)
    ),
    "mask hides the token itself, ONNX": Mutation(
        target="onnx", patch=_on_node("LessOrEqual", lambda _, inputs, rest: ("Less", inputs, rest))
    ),
    "rope on interleaved pairs, torch": Mutation(target="torch", patch=_wrap(TorchOps, "rope", _interleaved)),
    "rope on interleaved pairs, ONNX": Mutation(
        target="onnx",
        patch=_on_node(
            "RotaryEmbedding", lambda _, inputs, rest: ("RotaryEmbedding", inputs, {**rest, "interleaved": 1})
        ),
    ),
    "rope scaling forgotten, torch": Mutation(target="torch", patch=_wrap(RopeTable, "frequencies", _unscaled)),
    "rope scaling forgotten, ONNX": Mutation(target="onnx", patch=_wrap(RopeTable, "frequencies", _unscaled)),
    "gate and up swapped, torch": Mutation(target="torch", patch=_wrap(SwiGLU, "forward", _swapped_gate)),
    "gate and up swapped, ONNX": Mutation(target="onnx", patch=_wrap(SwiGLU, "forward", _swapped_gate)),
    "eps forgotten, torch": Mutation(target="torch", patch=_wrap(TorchOps, "rms_norm", _no_eps)),
    "eps forgotten, ONNX": Mutation(target="onnx", patch=_wrap(OnnxOps, "rms_norm", _no_eps)),
    "cache written one row too far, torch": Mutation(target="torch", patch=_wrap(TorchOps, "kv_update", _next_row)),
    "cache written one row too far, ONNX": Mutation(
        target="onnx",
        patch=_on_node(
            "TensorScatter",
            lambda ops, inputs, rest: ("TensorScatter", [*inputs[:2], inputs[2] + ops._integers(1)], rest),
        ),
    ),
    "cache not written in decode, torch": Mutation(target="torch", patch=_wrap(TorchOps, "kv_update", _unwritten_row)),
    "key/value heads tiled, torch": Mutation(target="torch", patch=_wrap(TorchOps, "attention", _tiled_heads)),
    "every row at the first row's positions, torch": Mutation(
        target="torch", patch=_wrap(torch_module, "make_step", _first_rows_positions)
    ),
    "masked targets count, torch": Mutation(
        target="torch", patch=_wrap(TorchOps, "linear_cross_entropy", _all_targets_count)
    ),
    "all-reduce missing, two processes": Mutation(
        target="ranks", patch=_wrap_path(f"{PARTITION}:_annotate", _no_reduce)
    ),
    "all-reduce missing, joined ranks": Mutation(
        target="joined2", patch=_wrap_path(f"{PARTITION}:_annotate", _no_reduce)
    ),
    "gradient not summed over ranks": Mutation(
        target="gradients", patch=_wrap_path(f"{PARTITION}:_annotate", _no_enter)
    ),
    "weights cut along the wrong dim": Mutation(target="joined2", patch=_wrap(Split, "slices", _wrong_dim)),
    "weights cut in strides": Mutation(target="joined2", patch=_wrap(Split, "slices", _strided)),
    "ranks read the wrong key/value head": Mutation(
        target="joined4", patch=_wrap(Split, "piece", lambda _, split, rank: rank % split.parts)
    ),
}

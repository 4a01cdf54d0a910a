"""ONNX Runtime's own operators (domain `com.microsoft`): one for a layer's rotation, caches and attention, and one for
a residual sum and the norm behind it.

    q [B, S, N·H] ─┐
    k [B, S, K·H] ─┼─ GroupQueryAttention ─── [B, S, N·H]         x ─┐
    v [B, S, K·H] ─┤       │       │                                 ├─ SkipSimplifiedLayerNormalization ── norm(x + y)
    past k, v ─────┘   present k  present v                       y ─┘            └── x + y

The blocks' forward asks for heads, rotation, caches and attention one after another. Their portable nodes are made, and
remembered by what they stand for; the last one then joins them into one operator, and what nothing needs is left out.

Traps of GroupQueryAttention, found with ONNX Runtime 1.31 and 1.32:
  * it takes several tokens of several rows only where all of them begin an empty cache and L = S. Its input
    `query_seqlens` would lift that, but 1.31 does not know it, and no later version runs on GPUs (2026-11-25);
  * on GPUs it computes in half precision alone;
  * it takes heads of a multiple of 8, and turns those of a multiple of 16;
  * its tables have the type of q, and in half precision would round each cosine once more: there the rotation is an
    operator of its own, in float32.

B batch, S sequence, D hidden, N query heads, K key/value heads, H head_dim, L visible positions, P cache capacity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from archwright.compiler.interpreters.onnx_dialects.lengths import LengthOps, needed
from archwright.compiler.interpreters.onnx_ops import Size, Tensor, Weight
from archwright.compiler.ir import Mask, RopeTable, Step, Window

MICROSOFT = "com.microsoft"
HEADS, TURNED_HEADS = 8, 16
"""What must divide head_dim: for GroupQueryAttention, and for its own rotation."""


def refusal(mask: Mask, head_dim: int, precision: str) -> str | None:
    """Why a layer cannot be said with GroupQueryAttention, None where it can."""
    if head_dim % HEADS:
        return f"GroupQueryAttention takes heads of a multiple of {HEADS}, not {head_dim}"
    return None


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """What a [B, heads, S, H] value stands for. flat: the [B, S, heads · H] that it was split from."""

    flat: Tensor
    table: RopeTable | None = None


@dataclass(frozen=True, kw_only=True)
class _Channels:
    """A part of the last dim of `whole`."""

    whole: Tensor
    start: int
    stop: int


@dataclass(kw_only=True)
class OnnxruntimeOps(LengthOps):
    """`OnnxOps` with ONNX Runtime's own attention and norms, and its own products with matrices of 4 bits."""

    matmul_nbits = True
    _heads: dict[ir.Value, _Heads] = field(default_factory=dict[ir.Value, _Heads])
    _channels: dict[ir.Value, _Channels] = field(default_factory=dict[ir.Value, _Channels])
    _written: dict[ir.Value, tuple[str, _Heads]] = field(default_factory=dict[ir.Value, tuple[str, _Heads]])
    _merged: dict[ir.Value, Tensor] = field(default_factory=dict[ir.Value, Tensor])
    _sums: dict[ir.Value, tuple[Tensor, Tensor]] = field(default_factory=dict[ir.Value, tuple[Tensor, Tensor]])
    _replaced: list[tuple[ir.Value, ir.Value]] = field(default_factory=list[tuple[ir.Value, ir.Value]])

    def channels(self, x: Tensor, start: int, stop: int) -> Tensor:
        y = super().channels(x, start, stop)
        self._channels[y.value] = _Channels(whole=x, start=start, stop=stop)
        return y

    def split_heads(self, x: Tensor, head_dim: int) -> Tensor:
        y = super().split_heads(x, head_dim)
        self._heads[y.value] = _Heads(flat=x)
        return y

    def rope(self, x_BNSH: Tensor, table: RopeTable, step: Step[Tensor]) -> Tensor:
        y = super().rope(x_BNSH, table, step)
        self._heads[y.value] = _Heads(flat=self._heads[x_BNSH.value].flat, table=table)
        return y

    def kv_update(self, m: Any, name: str, x_BKSH: Tensor, step: Step[Tensor]) -> Tensor:
        y = super().kv_update(m, name, x_BKSH, step)
        self._written[y.value] = m.path, self._heads[x_BKSH.value]
        return y

    def attention(
        self, q_BNSH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, *, mask: Mask, scale: float, step: Step[Tensor]
    ) -> Tensor:
        _, heads, _, head_dim = q_BNSH.shape
        kv_heads = k_BKLH.shape[1]
        assert isinstance(heads, int) and isinstance(head_dim, int) and isinstance(kv_heads, int)
        if refusal(mask, head_dim, self.precision) is not None:
            return super().attention(q_BNSH, k_BKLH, v_BKLH, mask=mask, scale=scale, step=step)
        (path, k), (_, v) = self._written[k_BKLH.value], self._written[v_BKLH.value]
        values = [self._heads[q_BNSH.value], k, v]
        table = self._own_rotation(values, head_dim)
        inputs = self._flat(values, (heads, kv_heads, kv_heads), turned=table is not None, step=step)
        tables = (None, None, None) if table is None else (*self._rotation(table), step.positions_BS)
        caches = [self.caches[path, name] for name in ("key", "value")]
        y_BSD = self._grouped(
            [*inputs, *caches, *self._lengths(step), *tables],
            path,
            shape=(*values[0].flat.shape[:2], heads * head_dim),
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=scale,
            do_rotary=int(table is not None),
            local_window_size=mask.size if isinstance(mask, Window) else -1,
        )
        y_BNSH = super().split_heads(y_BSD, head_dim)  # what blocks expect; merging them again gives y_BSD
        self._merged[y_BNSH.value] = y_BSD
        return y_BNSH

    def merge_heads(self, x: Tensor) -> Tensor:
        return self._merged[x.value] if x.value in self._merged else super().merge_heads(x)

    def _own_rotation(self, values: Sequence[_Heads], head_dim: int) -> RopeTable | None:
        """The table by which the operator itself turns queries and keys, None where it cannot or has not to."""
        q, k, _ = values
        fits = self.dtype == ir.DataType.FLOAT and head_dim % TURNED_HEADS == 0
        return q.table if fits and q.table == k.table else None

    def _flat(
        self, values: Sequence[_Heads], heads: tuple[int, int, int], *, turned: bool, step: Step[Tensor]
    ) -> list[Tensor | None]:
        """q, k, v as the operator takes them: [B, S, heads · H] each, or one value that holds them side by side."""
        if turned or all(value.table is None for value in values):
            whole = self._side_by_side(values)
            if whole is not None:
                return [whole, None, None]
        return [
            value.flat if turned or value.table is None else self._turn(value.flat, value.table, number, step)
            for value, number in zip(values, heads, strict=True)
        ]

    def _side_by_side(self, values: Sequence[_Heads]) -> Tensor | None:
        """The value whose channels are q's, k's and v's, in this order and no others; None where there is none."""
        whole, end = None, 0
        for part in (self._channels.get(value.flat.value) for value in values):
            if part is None or part.start != end or (whole is not None and part.whole.value is not whole.value):
                return None
            whole, end = part.whole, part.stop
        return whole if whole is not None and end == whole.shape[-1] else None

    def _turn(self, x: Tensor, table: RopeTable, heads: int, step: Step[Tensor]) -> Tensor:
        """The rotation of [B, S, heads · H], in float32."""
        cos, sin = self._rotation(table)
        wide = x if self.dtype == ir.DataType.FLOAT else self.cast(x, ir.DataType.FLOAT, name="rope/widen")
        inputs = [wide, cos, sin, step.positions_BS]
        y = self.emit("RotaryEmbedding", inputs, name="rope/rotate", num_heads=heads)
        return y if self.dtype == ir.DataType.FLOAT else self.cast(y, self.dtype, name="rope")

    def _grouped(
        self, inputs: Sequence[Tensor | None], path: str, *, shape: tuple[Size, ...], **attributes: Any
    ) -> Tensor:
        """The operator; its second and third outputs are the caches."""
        y_BSD = self.emit("GroupQueryAttention", inputs, name="attention", shape=shape, domain=MICROSOFT, **attributes)
        pasts = [self.caches[path, name].value for name in ("key", "value")]
        presents = self._more_outputs(
            [(self._unique("key_update"), pasts[0]), (self._unique("value_update"), pasts[1])]
        )
        for name, present in zip(("key", "value"), presents, strict=True):
            self.updated[path, name] = Tensor(present, self)
        return y_BSD

    def _more_outputs(self, wanted: Sequence[tuple[str, ir.Value | None]]) -> list[ir.Value]:
        """More outputs of the last node, by their names and what they are like; None for one that is left out."""
        node = self.nodes[-1]
        node.resize_outputs(1 + len(wanted))
        for value, (name, like) in zip(node.outputs[1:], wanted, strict=True):
            value.name = name
            if like is not None:
                value.shape, value.type = like.shape, like.type
        return list(node.outputs[1:])

    def _lengths(self, step: Step[Tensor]) -> list[Tensor]:
        """seqlens_k [B]: the last row with a key; total_sequence_length: a bound of them all, L."""
        positions_L = step.kv_positions_L
        assert positions_L is not None, "exported graphs have a cache"

        def last() -> Tensor:
            return self.emit("Sub", [self._ends(step), self.integers(1)], name="seqlens_k/last")

        def total() -> Tensor:
            return self.emit("Squeeze", [self._num_visible(positions_L)], name="total_sequence_length/L", shape=())

        return [self._narrow("seqlens_k", last), self._narrow("total_sequence_length", total)]

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        total = super().add(x, y)
        if x.shape == y.shape and len(x.shape) == 3:
            self._sums[total.value] = x, y
        return total

    def rms_norm(self, x_BSD: Tensor, weight_D: Weight, eps: float) -> Tensor:
        return self._skip_norm("SkipSimplifiedLayerNormalization", x_BSD, [weight_D], "rms_norm", eps) or (
            super().rms_norm(x_BSD, weight_D, eps)
        )

    def layer_norm(self, x_BSD: Tensor, weight_D: Weight, bias_D: Weight | None, eps: float) -> Tensor:
        weights = [weight_D] if bias_D is None else [weight_D, bias_D]
        return self._skip_norm("SkipLayerNormalization", x_BSD, weights, "layer_norm", eps) or (
            super().layer_norm(x_BSD, weight_D, bias_D, eps)
        )

    def _skip_norm(self, op: str, x_BSD: Tensor, weights: list[Weight], name: str, eps: float) -> Tensor | None:
        """The norm of a sum that nothing has read yet, which also gives the sum; None where x is no such sum."""
        if x_BSD.value not in self._sums or x_BSD.value.uses():
            return None
        inputs = [*self._sums[x_BSD.value], *map(self._stored, weights)]
        y_BSD = self.emit(op, inputs, name=name, domain=MICROSOFT, epsilon=eps)
        x = x_BSD.value
        self._replaced.append((x, self._more_outputs([("", None), ("", None), (str(x.name), x)])[-1]))
        return y_BSD

    def finish(self, outputs: Sequence[ir.Value]) -> list[ir.Node]:
        for old, new in self._replaced:
            ir.convenience.replace_all_uses_with(old, new)
        return needed(self.nodes, outputs)

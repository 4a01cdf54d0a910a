"""TensorRT's own attention: masks by lengths, not by a tensor of booleans. No other runtime reads these graphs.

    write_index + S ──────────────────── kv_lengths ──┐
    q ── Mul 1/sqrt(H) ──────────────────────────── TRT_Attention ──▶    query i of S sees the keys
    k ── TRT_KVCacheUpdate ── Slice to L ─────────────┤                  ≤ kv_length - S + i
    v ── TRT_KVCacheUpdate ── Slice to L ─────────────┘

TRT_Attention scales nothing, and takes the lengths as its input 5: at any later place they are ignored, without a word.
Mask and lengths exclude each other, so a window is said in the portable form.

B batch, S sequence, N query heads, K key/value heads, H head_dim, L visible positions.
"""

import math
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from archwright.compiler.interpreters.onnx_dialects.lengths import LengthOps
from archwright.compiler.interpreters.onnx_masks import num_visible_of
from archwright.compiler.interpreters.onnx_ops import DOMAIN, Tensor
from archwright.compiler.ir import Mask, Step, Window

HALF_HEADS = 8
"""In half precision TensorRT for RTX 1.7.1 fails to build this attention for heads of 20, and builds multiples of 8."""


def refusal(mask: Mask, head_dim: int, precision: str) -> str | None:
    """Why a layer cannot be said with TRT_Attention, None where it can."""
    if isinstance(mask, Window):
        return "a window needs a mask, and TRT_Attention takes none beside lengths"
    if precision != "float32" and head_dim % HALF_HEADS:
        return f"in {precision} TensorRT has no kernel with lengths for heads of {head_dim}"
    return None


@dataclass(kw_only=True)
class TensorrtOps(LengthOps):
    """`OnnxOps` whose caches and attention are TensorRT's own operators."""

    def kv_update(self, m: Any, name: str, x_BKSH: Tensor, step: Step[Tensor]) -> Tensor:
        index, positions_L = step.write_index_B, step.kv_positions_L
        assert index is not None and positions_L is not None, "exported graphs have a cache"
        past_BKPH = self.caches[m.path, name]
        inputs = [past_BKPH, x_BKSH, self._narrow("write_index/int32", lambda: index)]
        present_BKPH = self.emit(
            "TRT_KVCacheUpdate", inputs, name=f"{name}_update", domain=DOMAIN,
            update_form="padded_bhnd", mode="linear", axis=-2,
        )  # fmt: skip
        self.updated[m.path, name] = present_BKPH
        batch, heads, _, head_dim = past_BKPH.shape
        inputs = [present_BKPH, self.integers(0), self._num_visible(positions_L), self.integers(2)]
        return self.emit("Slice", inputs, name=f"{name}_visible", shape=(batch, heads, num_visible_of(step), head_dim))

    def attention(
        self, q_BNSH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, *, mask: Mask, scale: float, step: Step[Tensor]
    ) -> Tensor:
        head_dim = q_BNSH.shape[3]
        assert isinstance(head_dim, int)
        if refusal(mask, head_dim, self.precision) is not None:
            return super().attention(q_BNSH, k_BKLH, v_BKLH, mask=mask, scale=scale, step=step)
        inputs = [
            self._scaled(q_BNSH, scale),
            k_BKLH,
            v_BKLH,
            None,
            None,
            self._narrow("kv_lengths", lambda: self._ends(step)),
        ]
        return self.emit(
            "TRT_Attention", inputs, name="attention", domain=DOMAIN,
            query_form="padded_bhnd", kv_form="padded_bhnd", causal_kind="lower_right",
        )  # fmt: skip

    def _scaled(self, q_BNSH: Tensor, scale: float) -> Tensor:
        """scale · q, rounded once: the scale itself is no number of half precision unless it is a power of two."""
        if scale == 1:
            return q_BNSH
        if self.dtype == ir.DataType.FLOAT or math.frexp(scale)[0] == 0.5:
            factor = self.constant(f"scale/{scale:.17g}/{self.precision}", scale, self.dtype)
            return self.emit("Mul", [q_BNSH, factor], name="attention/scaled")
        cast = q_BNSH.value.producer()
        if cast is not None and cast.op_type == "Cast":  # of a rotation, which was done in float32
            value = cast.inputs[0]
            assert value is not None
            wide = Tensor(value, self)
        else:
            wide = self.cast(q_BNSH, ir.DataType.FLOAT, name="attention/widen")
        factor = self.constant(f"scale/{scale:.17g}/float32", scale, ir.DataType.FLOAT)
        return self.cast(
            self.emit("Mul", [wide, factor], name="attention/product"), self.dtype, name="attention/scaled"
        )

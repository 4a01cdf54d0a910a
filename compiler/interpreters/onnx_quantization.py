"""Quantized matrices in ONNX.

The portable form is what ONNX Runtime and TensorRT read alike: weights of few bits, a DequantizeLinear behind them, and
the operator that reads them. TensorRT fuses the two into a product with few-bit weights, which wants [in, out] and
groups along `in`.

    weight [in, out] int4 ─┐
    scale [groups, out] ───┴ DequantizeLinear axis 0, block_size in / groups ── MatMul

`MatMulNBits` (com.microsoft) is ONNX Runtime's own operator for int4: weights stay [out, in].
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from archwright.compiler.interpreters.onnx_emitter import OnnxEmitter
from archwright.compiler.ir import Param, Storage

if TYPE_CHECKING:
    from archwright.compiler.interpreters.onnx_ops import Tensor, Weight

Packing = Literal["int4", "offset"]
"""How values -8 to 7 share bytes, the first in the lower half. int4: in two's complement. offset: each plus 8."""
STORED_TYPES: Mapping[Storage, ir.DataType] = {
    "int4": ir.DataType.INT4,
    "int8": ir.DataType.INT8,
    "float8": ir.DataType.FLOAT8E4M3FN,
}
MICROSOFT = "com.microsoft"
OFFSET = 8
"""What MatMulNBits takes from its unsigned values, where no zero points are given."""


def pack(values: NDArray[Any], packing: Packing) -> NDArray[np.uint8]:
    """int8 values -8 to 7 → bytes of two, in the order of the flattened array; an odd last one stands alone."""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    if packing == "offset":
        flat = flat + np.uint8(OFFSET)
    packed: NDArray[np.uint8] = np.left_shift(flat[1::2], np.uint8(4))
    packed |= flat[::2] & np.uint8(15)
    return packed


def unpack(packed: NDArray[np.uint8], packing: Packing, count: int) -> NDArray[np.int8]:
    """The `count` values that `pack` took."""
    values = np.empty((len(packed), 2), np.int8)
    values[:, 0], values[:, 1] = packed & 15, packed >> 4
    flat = values.reshape(-1)[:count]
    return flat - np.int8(OFFSET) if packing == "offset" else ((flat + np.int8(8)) & np.int8(15)) - np.int8(8)


@dataclass(frozen=True, kw_only=True)
class Dequantized:
    """A quantized matrix as blocks see it; the op that reads it decides how it is stored."""

    weight: "Weight"
    scale: "Weight"

    @property
    def param(self) -> Param:
        return self.weight.param

    @property
    def storage(self) -> Storage:
        assert self.param.storage is not None
        return self.param.storage

    @property
    def group_size(self) -> int | None:
        """Input channels that share a scale, None where all do."""
        groups = self.scale.param.shape[-1]
        return None if self.storage != "int4" else self.param.shape[-1] // groups


class OnnxQuantization(OnnxEmitter):
    """A part of `OnnxOps`.

    matmul_nbits: whether int4 products are ONNX Runtime's MatMulNBits, which TensorRT does not know.
    """

    matmul_nbits: bool = False

    @abstractmethod
    def external(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: ir.DataType,
        source: str | Callable[[], NDArray[Any]],
        order: tuple[int, ...] | None = None,
        *,
        packing: Packing | None = None,
    ) -> "Tensor": ...

    def dequantize(self, weight: "Weight", scale: "Weight") -> Dequantized:
        return Dequantized(weight=weight, scale=scale)

    def dequantized(
        self, matrix: Dequantized, *, order: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> "Tensor":
        """The matrix in the graph's precision; order, shape: as in `stored`."""
        shape = matrix.param.shape if shape is None else shape
        if matrix.group_size is None and order is not None and order[0] != len(order) - 1:
            return self._by_rows(matrix, order, shape)
        suffix = "" if order is None else ".T"
        packing: Packing | None = "int4" if matrix.storage == "int4" else None
        weight = self.external(
            f"{matrix.weight.name}{suffix}", shape, STORED_TYPES[matrix.storage], matrix.weight.name, order,
            packing=packing,
        )  # fmt: skip
        form, scales = _scales(shape, matrix.group_size, turned=order is not None)
        scale = self.external(f"{matrix.scale.name}{suffix}", scales, self.dtype, matrix.scale.name, order)
        return self.emit("DequantizeLinear", [weight, scale], name="dequantize", shape=shape, dtype=self.dtype, **form)

    def _by_rows(self, matrix: Dequantized, order: tuple[int, ...], shape: tuple[int, ...]) -> "Tensor":
        """A stack whose scales differ between its matrices: dequantized as it is, then turned.

        The form in `shape` joins the stack with the input channels, where one scale an output channel has no axis.
        """
        *rows, columns = matrix.param.shape
        flat = (prod(rows), columns)
        weight = self.external(matrix.weight.name, flat, STORED_TYPES[matrix.storage], matrix.weight.name)
        scale = self.external(matrix.scale.name, flat[:1], self.dtype, matrix.scale.name)
        plain = self.emit(
            "DequantizeLinear", [weight, scale], name="dequantize/rows", shape=flat, dtype=self.dtype, axis=0
        )
        sizes = self.constant("int64/" + "_".join(map(str, matrix.param.shape)), matrix.param.shape, ir.DataType.INT64)
        stack = self.emit("Reshape", [plain, sizes], name="dequantize/stack", shape=matrix.param.shape)
        turned = tuple(matrix.param.shape[dim] for dim in order)
        stack = self.emit("Transpose", [stack], name="dequantize/turned", shape=turned, perm=list(order))
        joined = self.constant("int64/" + "_".join(map(str, shape)), shape, ir.DataType.INT64)
        return self.emit("Reshape", [stack, joined], name="dequantize", shape=shape)

    def round_to_float8(self, x: "Tensor", scale_11: "Weight") -> "Tensor":
        scale = self.external(scale_11.name, (), self.dtype, scale_11.name)
        zero = self.constant("float8/zero", 0, ir.DataType.FLOAT8E4M3FN)
        rounded = self.emit(
            "QuantizeLinear", [x, scale, zero], name="round_to_float8/quantize", dtype=ir.DataType.FLOAT8E4M3FN
        )
        return self.emit("DequantizeLinear", [rounded, scale], name="round_to_float8", dtype=self.dtype)

    def fused_product(self, x: "Tensor", matrix: Dequantized) -> "Tensor | None":
        """x · weightᵀ as one MatMulNBits, None where the matrix or the dialect has another form.

        A tied head's matrix is stored as the embedding reads it, which this operator does not know.
        """
        group = matrix.group_size
        if not self.matmul_nbits or group is None or matrix.param.share is not None:
            return None
        rows, columns = matrix.param.shape
        groups = columns // group
        weight = self.external(
            matrix.weight.name, (rows, groups, group // 2), ir.DataType.UINT8, matrix.weight.name, packing="offset"
        )
        scale = self.external(matrix.scale.name, (rows * groups,), self.dtype, matrix.scale.name)
        return self.emit(
            "MatMulNBits", [x, weight, scale], name="linear", shape=(*x.shape[:-1], rows), domain=MICROSOFT,
            K=columns, N=rows, bits=4, block_size=group, accuracy_level=1,
        )  # fmt: skip


def _scales(shape: tuple[int, ...], group: int | None, *, turned: bool) -> tuple[dict[str, int], tuple[int, ...]]:
    """The attributes of a DequantizeLinear over `shape`, and its scales' shape. turned: input channels come first."""
    if group is None:  # one scale for each output channel: a vector
        axis = 1 if turned else 0
        return {"axis": axis}, (shape[axis],)
    axis = len(shape) - 2 if turned else len(shape) - 1
    return {"axis": axis, "block_size": group}, tuple(s // group if d == axis else s for d, s in enumerate(shape))

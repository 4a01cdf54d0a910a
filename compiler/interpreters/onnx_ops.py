"""ONNX: the Program as a graph in the portable form, which ONNX Runtime and TensorRT read alike.

`onnx_dialects` has other lowerings of some operations, for graphs that one of the two reads.

Caches have a static capacity; TensorScatter writes the new rows, a Slice keeps the L visible ones, and Attention gets
an explicit boolean mask. TensorRT refuses Attention's own past and present, and ignores `nonpad_kv_seqlen` silently.

B batch, S sequence, D hidden, N query heads, K key/value heads, H head_dim, V vocabulary, L visible positions,
P cache capacity.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from archwright.compiler.interpreters.onnx_masks import num_visible_of, visible
from archwright.compiler.interpreters.onnx_moe import OnnxMoe
from archwright.compiler.interpreters.onnx_quantization import Dequantized, OnnxQuantization, Packing
from archwright.compiler.ir import Boundary, Mask, Param, RopeTable, Step

OPSET = 24
DOMAIN = "archwright"
"""Of DistCollective. TensorRT's parser knows the operator in any domain; ONNX's checker passes over unknown domains."""

DTYPES: Mapping[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
NUMPY_DTYPES: Mapping[ir.DataType, np.dtype[Any]] = {
    ir.DataType.FLOAT: np.dtype("<f4"),
    ir.DataType.FLOAT16: np.dtype("<f2"),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    ir.DataType.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    ir.DataType.INT8: np.dtype("i1"),
    ir.DataType.INT4: np.dtype("i1"),
    ir.DataType.UINT8: np.dtype("i1"),
}
"""How values are held in memory. Those of 4 bits take a byte each, and are packed when they are written."""
Size = int | str
"""A static size, or the name of a symbolic one: batch, sequence, positions."""


@dataclass(frozen=True)
class Tensor:
    """A value of the graph under construction, with the arithmetic that blocks use."""

    value: ir.Value
    ops: "OnnxOps"

    @property
    def shape(self) -> tuple[Size, ...]:
        return sizes_of(self.value)

    def __add__(self, other: "Tensor") -> "Tensor":
        return self.ops.add(self, other)

    def __mul__(self, other: "Tensor") -> "Tensor":
        return self.ops.emit("Mul", [self, other], name="mul")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter as blocks see it; the op that reads it decides how it is stored."""

    name: str
    param: Param


@dataclass(frozen=True, kw_only=True)
class External:
    """An initializer whose bytes lie beside the graph.

    source: the parameter that is stored, or what computes the values when they are written.
    order: of a parameter's dims in the file, where they stand in another; the graph's shape may join neighbours.
    packing: how two values of 4 bits share a byte.
    """

    value: ir.Value
    source: str | Callable[[], NDArray[Any]]
    order: tuple[int, ...] | None = None
    packing: Packing | None = None


@dataclass(kw_only=True)
class OnnxOps(OnnxQuantization, OnnxMoe):
    """Ops that append to a graph.

    precision: of weights, activations and caches. The rotation and the sums inside RMSNorm are float32 in every
    precision: at position 8,000 a bfloat16 angle has lost its phase.
    capacity: rows of the caches and of the rotary tables. moe: dense or gathered, see `OnnxMoe`.
    degrees: axis of a stage's mesh (expert, tensor) → ranks; ranks: → where this rank stands, of axes whose ranks have
    different graphs.
    caches: (path, state) → graph input; `updated` receives the graph output that belongs to it.
    """

    precision: str
    capacity: int
    degrees: Mapping[str, int]
    caches: Mapping[tuple[str, str], Tensor]
    moe: str = "dense"
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])
    nodes: list[ir.Node] = field(default_factory=list[ir.Node])
    constants: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])
    externals: dict[str, External] = field(default_factory=dict[str, External])
    updated: dict[tuple[str, str], Tensor] = field(default_factory=dict[tuple[str, str], Tensor])
    _shared: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _names: Counter[str] = field(default_factory=Counter[str])
    _paths: list[str] = field(default_factory=lambda: [""])

    @property
    def dtype(self) -> ir.DataType:
        return DTYPES[self.precision]

    @contextmanager
    def scope(self, path: str) -> Iterator[None]:
        """Nodes appended inside are named `path/op`."""
        self._paths.append(path)
        yield
        self._paths.pop()

    def emit(
        self,
        op: str,
        inputs: Sequence[Tensor | None],
        *,
        name: str,
        shape: tuple[Size, ...] | None = None,
        dtype: ir.DataType | None = None,
        domain: str = "",
        num_outputs: int = 1,
        **attributes: Any,
    ) -> Tensor:
        """Append a node; it and its output are named `scope/name`. Default shape and dtype: the first input's.

        inputs: None where an optional one is left out, the first never. num_outputs: of which the last is given, and
        the others have its shape and the first input's dtype.
        """
        assert inputs[0] is not None, "the first input is never left out"
        first = inputs[0].value
        unique = self._unique(name)
        output = ir.Value(
            name=unique,
            shape=ir.Shape(inputs[0].shape if shape is None else shape),
            type=ir.TensorType(first.dtype if dtype is None else dtype),  # pyright: ignore[reportArgumentType]
        )
        values = [None if x is None else x.value for x in inputs]
        others = [
            ir.Value(name=f"{unique}/{index}", shape=output.shape, type=ir.TensorType(first.dtype))  # pyright: ignore[reportArgumentType]
            for index in range(num_outputs - 1)
        ]
        self.nodes.append(ir.node(op, values, attributes, domain=domain, outputs=[*others, output], name=unique))
        return Tensor(output, self)

    def _unique(self, name: str) -> str:
        path = self._paths[-1]
        full = f"{path}/{name}" if path else name
        self._names[full] += 1
        return full if self._names[full] == 1 else f"{full}_{self._names[full]}"

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.emit("Add", [x, y], name="add")

    def finish(self, outputs: Sequence[ir.Value]) -> list[ir.Node]:
        """The nodes of the finished graph; a dialect leaves out those that its own have made needless."""
        return self.nodes

    def integers(self, *numbers: int) -> Tensor:
        """A constant int64 vector; equal ones are one initializer."""
        return self.constant("int64/" + "_".join(map(str, numbers)), numbers, ir.DataType.INT64)

    def constant(self, name: str, value: Any, dtype: ir.DataType) -> Tensor:
        """A small initializer; its name stands for its value."""
        if name not in self.constants:
            array = np.array(value, np.int64 if dtype == ir.DataType.INT64 else NUMPY_DTYPES[dtype])
            self.constants[name] = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(dtype),
                const_value=ir.tensor(array, dtype=dtype, name=name),
            )
        return Tensor(self.constants[name], self)

    def param(self, name: str, param: Param) -> Weight:
        return Weight(name=name, param=param)

    def _stored(self, weight: Weight | Dequantized) -> Tensor:
        """The initializer of a parameter, or what makes a quantized one of it."""
        if isinstance(weight, Dequantized):
            return self.dequantized(weight)
        return self.external(weight.name, weight.param.shape, self.dtype, weight.name)

    def stored(self, weight: Weight | Dequantized, *, order: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The same with its dims in another order, called `{name}.T` since it is not the canonical one."""
        if isinstance(weight, Dequantized):
            return self.dequantized(weight, order=order, shape=shape)
        return self.external(f"{weight.name}.T", shape, self.dtype, weight.name, order)

    def external(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: ir.DataType,
        source: str | Callable[[], NDArray[Any]],
        order: tuple[int, ...] | None = None,
        *,
        packing: Packing | None = None,
    ) -> Tensor:
        if name not in self.externals:
            value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            self.externals[name] = External(value=value, source=source, order=order, packing=packing)
        return Tensor(self.externals[name].value, self)

    def linear(
        self,
        x: Tensor,
        weight: Weight | Dequantized,
        bias: Weight | None,
        *,
        reduce: Boundary | None,
        gather: Boundary | None = None,
    ) -> Tensor:
        assert gather is None, "inference keeps the vocabulary whole"
        y = self._product(x, weight)
        y = y if reduce is None else self.reduce(y, reduce)
        return y if bias is None else self.emit("Add", [y, self._stored(bias)], name="linear/bias")

    def _product(self, x: Tensor, weight: Weight | Dequantized) -> Tensor:
        if isinstance(weight, Dequantized) and (fused := self.fused_product(x, weight)) is not None:
            return fused
        rows, columns = weight.param.shape
        if weight.param.share is None:
            # [in, out] is what MatMul multiplies with and what weight-only quantisation needs; transposing costs the
            # writer once, not every session.
            matrix = self.stored(weight, order=(1, 0), shape=(columns, rows))
        else:
            plain = self._stored(weight)
            matrix = self.emit("Transpose", [plain], name="linear/transpose", shape=(columns, rows), perm=[1, 0])
        return self.emit("MatMul", [x, matrix], name="linear", shape=(*x.shape[:-1], rows))

    def reduce(self, y: Tensor, boundary: Boundary) -> Tensor:
        """The sum over the ranks that compute parts.

        Where these are not all ranks of the stage, `groups` names those of this rank's own group, by their numbers in
        the stage's communicator: TensorRT takes one list of ranks that take part, and `group_size` is its length.
        """
        group = self._members(boundary.axes)
        whole = len(group) == prod(self.degrees.values())
        return self._all_reduce(y, len(group), {} if whole else {"groups": group, "group_size": len(group)})

    def _members(self, axes: tuple[str, ...]) -> list[int]:
        """The ranks that share this rank's place on every other axis; the tensor axis is innermost."""
        members = [0]
        for axis in ("expert", "tensor"):
            degree = self.degrees.get(axis, 1)
            places = range(degree) if axis in axes else [self.ranks[axis] if degree > 1 else 0]
            members = [member * degree + place for member in members for place in places]
        return members

    def _all_reduce(self, x: Tensor, degree: int, groups: Mapping[str, Any]) -> Tensor:
        return self.emit(
            "DistCollective",
            [x],
            name="all_reduce",
            domain=DOMAIN,
            collective_operation="all_reduce",
            reduce_op="sum",
            root=-1,  # the parser's default, 0, is refused for collectives without a root
            nb_rank=degree,
            **groups,
        )

    def embed(self, ids_BS: Tensor, weight_VD: Weight | Dequantized, *, reduce: Boundary | None) -> Tensor:
        assert reduce is None, "inference keeps tables whole"
        shape = (*ids_BS.shape, weight_VD.param.shape[1])
        return self.emit(
            "Gather", [self._stored(weight_VD), ids_BS], name="embed", shape=shape, dtype=self.dtype, axis=0
        )

    def rms_norm(self, x_BSD: Tensor, weight_D: Weight, eps: float) -> Tensor:
        inputs = [x_BSD, self._stored(weight_D)]
        return self.emit("RMSNormalization", inputs, name="rms_norm", axis=-1, epsilon=eps, stash_type=1)

    def layer_norm(self, x_BSD: Tensor, weight_D: Weight, bias_D: Weight | None, eps: float) -> Tensor:
        inputs = [x_BSD, self._stored(weight_D), *([] if bias_D is None else [self._stored(bias_D)])]
        return self.emit("LayerNormalization", inputs, name="layer_norm", axis=-1, epsilon=eps, stash_type=1)

    def take_token(self, x_BSD: Tensor, index_B: Tensor) -> Tensor:
        batch, _, width = x_BSD.shape
        axes = self.integers(1, 2)
        index_B11 = self.emit("Unsqueeze", [index_B, axes], name="take_token/index", shape=(batch, 1, 1))
        return self.emit("GatherND", [x_BSD, index_B11], name="take_token", shape=(batch, 1, width), batch_dims=1)

    def silu(self, x: Tensor) -> Tensor:
        return self.emit("Mul", [x, self.emit("Sigmoid", [x], name="silu/sigmoid")], name="silu")

    def gelu(self, x: Tensor, approximation: str) -> Tensor:
        return self.emit("Gelu", [x], name="gelu", approximate=approximation)

    def channels(self, x: Tensor, start: int, stop: int) -> Tensor:
        inputs = [x, self.integers(start), self.integers(stop), self.integers(-1)]
        return self.emit("Slice", inputs, name="channels", shape=(*x.shape[:-1], stop - start))

    def split_heads(self, x: Tensor, head_dim: int) -> Tensor:
        batch, sequence, width = x.shape
        assert isinstance(width, int)
        heads = width // head_dim
        inputs = [x, self.integers(0, 0, -1, head_dim)]
        x_BSNH = self.emit("Reshape", inputs, name="split_heads/reshape", shape=(batch, sequence, heads, head_dim))
        return self.emit(
            "Transpose", [x_BSNH], name="split_heads", shape=(batch, heads, sequence, head_dim), perm=[0, 2, 1, 3]
        )

    def merge_heads(self, x: Tensor) -> Tensor:
        batch, heads, sequence, head_dim = x.shape
        assert isinstance(heads, int) and isinstance(head_dim, int)
        x_BSNH = self.emit(
            "Transpose",
            [x],
            name="merge_heads/transpose",
            shape=(batch, sequence, heads, head_dim),
            perm=[0, 2, 1, 3],
        )
        inputs = [x_BSNH, self.integers(0, 0, -1)]
        return self.emit("Reshape", inputs, name="merge_heads", shape=(batch, sequence, heads * head_dim))

    def rope(self, x_BNSH: Tensor, table: RopeTable, step: Step[Tensor]) -> Tensor:
        cos, sin = self._rotation(table)
        if self.dtype == ir.DataType.FLOAT:
            return self.emit("RotaryEmbedding", [x_BNSH, cos, sin, step.positions_BS], name="rope")
        # The operator wants its tables in the type of x; they must stay float32, so x is widened.
        wide = self.cast(x_BNSH, ir.DataType.FLOAT, name="rope/widen")
        turned = self.emit("RotaryEmbedding", [wide, cos, sin, step.positions_BS], name="rope/rotate")
        return self.cast(turned, self.dtype, name="rope")

    def cast(self, x: Tensor, dtype: ir.DataType, *, name: str) -> Tensor:
        return self.emit("Cast", [x], name=name, dtype=dtype, to=dtype)

    def _rotation(self, table: RopeTable) -> tuple[Tensor, Tensor]:
        """cos and sin [P, H/2]; the angle is formed in float64."""
        shape = (self.capacity, table.head_dim // 2)

        def tabled(function: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[Any]:
            angle_PH = np.arange(self.capacity)[:, None] * np.array(table.frequencies())
            return function(angle_PH).astype(np.float32)

        cos = self.external(f"{table.key}/cos", shape, ir.DataType.FLOAT, lambda: tabled(np.cos))
        sin = self.external(f"{table.key}/sin", shape, ir.DataType.FLOAT, lambda: tabled(np.sin))
        return cos, sin

    def kv_update(self, m: Any, name: str, x_BKSH: Tensor, step: Step[Tensor]) -> Tensor:
        assert step.write_index_B is not None and step.kv_positions_L is not None, "exported graphs have a cache"
        past_BKPH = self.caches[m.path, name]
        present_BKPH = self.emit(
            "TensorScatter", [past_BKPH, x_BKSH, step.write_index_B], name=f"{name}_update", axis=2, mode="linear"
        )
        self.updated[m.path, name] = present_BKPH
        batch, heads, _, head_dim = past_BKPH.shape
        ends = self._num_visible(step.kv_positions_L)
        inputs = [present_BKPH, self.integers(0), ends, self.integers(2)]
        return self.emit("Slice", inputs, name=f"{name}_visible", shape=(batch, heads, num_visible_of(step), head_dim))

    def _num_visible(self, kv_positions_L: Tensor) -> Tensor:
        if "num_visible" not in self._shared:
            with self.scope(""):
                self._shared["num_visible"] = self.emit("Shape", [kv_positions_L], name="num_visible", shape=(1,))
        return self._shared["num_visible"]

    def attention(
        self, q_BNSH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, *, mask: Mask, scale: float, step: Step[Tensor]
    ) -> Tensor:
        visible_B1SL = self._visible(mask, step)
        # Without `scale` TensorRT splits its root over Q and K with a chain of small layers.
        return self.emit("Attention", [q_BNSH, k_BKLH, v_BKLH, visible_B1SL], name="attention", scale=scale)

    def _visible(self, mask: Mask, step: Step[Tensor]) -> Tensor:
        """The boolean mask [B, 1, S, L] of a mask value, made once for all layers that have it."""
        if mask.key not in self._shared:
            with self.scope(""):
                self._shared[mask.key] = visible(self, mask, step)
        return self._shared[mask.key]

    def linear_cross_entropy(
        self, x_BSD: Tensor, weight_VD: Weight, targets_BS: Tensor, *, gather: Boundary | None
    ) -> Any:
        raise AssertionError("graphs are made for inference: their steps have no targets")


def sizes_of(value: ir.Value) -> tuple[Size, ...]:
    """The sizes of a value's dims; every value of our graphs has them."""
    assert value.shape is not None
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)

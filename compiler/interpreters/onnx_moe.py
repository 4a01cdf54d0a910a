"""Mixture of experts in ONNX: every expert computes every token, and what was not chosen counts as 0.

Operators that ONNX Runtime and TensorRT read alike: TensorRT has no fused mixture of experts on SM 9.0. All experts
are one matrix product, so that it is a large one, and it reads all weights however few tokens there are.

x_BSD ── MatMul gate [D, E·F] ── silu ─┐
      └─ MatMul up   [D, E·F] ───────── Mul ── [B, S, E, F] · weight or 0 ── [B, S, E·F] ── MatMul down [E·F, D] ──▶

B batch, S sequence, D hidden, E experts, X experts of a token, F inner width of an expert.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from archwright.compiler.ir import Boundary, Penalties, Routing

if TYPE_CHECKING:
    from archwright.compiler.interpreters.onnx_ops import Tensor, Weight
    from archwright.compiler.interpreters.onnx_quantization import Dequantized


class OnnxMoe(ABC):
    """A part of `OnnxOps`."""

    @property
    @abstractmethod
    def dtype(self) -> ir.DataType: ...

    @abstractmethod
    def emit(self, op: str, inputs: "list[Tensor]", *, name: str, **rest: Any) -> "Tensor": ...

    @abstractmethod
    def constant(self, name: str, value: Any, dtype: ir.DataType) -> "Tensor": ...

    @abstractmethod
    def cast(self, x: "Tensor", dtype: ir.DataType, *, name: str) -> "Tensor": ...

    @abstractmethod
    def silu(self, x: "Tensor") -> "Tensor": ...

    @abstractmethod
    def stored(self, weight: "Weight | Dequantized", *, order: tuple[int, ...], shape: tuple[int, ...]) -> "Tensor": ...

    @abstractmethod
    def reduce(self, y: "Tensor", boundary: Boundary) -> "Tensor": ...

    def top_k(self, x_BSE: "Tensor", number: int) -> "Tensor":
        shape = (*x_BSE.shape[:-1], number)
        inputs = [x_BSE, self._axis(number)]
        return self.emit("TopK", inputs, name="top_k", shape=shape, dtype=ir.DataType.INT64, num_outputs=2, axis=-1)

    def routing_weights(self, logits_BSE: "Tensor", indices_BSX: "Tensor", routing: Routing) -> "Tensor":
        name, wide = "routing_weights", self.dtype != ir.DataType.FLOAT
        scores = self.cast(logits_BSE, ir.DataType.FLOAT, name=f"{name}/widen") if wide else logits_BSE
        if routing.score == "sigmoid":
            scores = self.emit("Sigmoid", [scores], name=f"{name}/scores")
        else:
            scores = self.emit("Softmax", [scores], name=f"{name}/scores", axis=-1)
        y = self.emit("GatherElements", [scores, indices_BSX], name=f"{name}/chosen", shape=indices_BSX.shape, axis=-1)
        if routing.normalize:
            shape = (*indices_BSX.shape[:-1], 1)
            total = self.emit("ReduceSum", [y, self._axis(-1)], name=f"{name}/sum", shape=shape, keepdims=1)
            y = self.emit("Div", [y, total], name=f"{name}/normalized")
        if routing.scale != 1:
            scale = self.constant(f"{name}/{routing.scale:.17g}", routing.scale, ir.DataType.FLOAT)
            y = self.emit("Mul", [y, scale], name=f"{name}/scaled")
        return self.cast(y, self.dtype, name=name) if wide else y

    def experts(
        self,
        x_BSD: "Tensor",
        weights_BSX: "Tensor",
        indices_BSX: "Tensor",
        gate_EFD: "Weight | Dequantized",
        up_EFD: "Weight | Dequantized",
        down_EDF: "Weight | Dequantized",
        *,
        dispatch: str | None,
        reduce: Boundary | None,
    ) -> "Tensor":
        assert dispatch is None, "inference keeps all experts on each rank"
        experts, inner, hidden = gate_EFD.param.shape
        joined = (*x_BSD.shape[:-1], experts * inner)

        def widen(weight: "Weight | Dequantized", name: str) -> "Tensor":
            matrix = self.stored(weight, order=(2, 0, 1), shape=(hidden, experts * inner))
            return self.emit("MatMul", [x_BSD, matrix], name=f"experts/{name}", shape=joined)

        hidden_BSF = self.emit("Mul", [self.silu(widen(gate_EFD, "gate")), widen(up_EFD, "up")], name="experts/hidden")
        weighted_BSF = self._weighted(hidden_BSF, self._matrix(weights_BSX, indices_BSX, experts), inner)
        matrix = self.stored(down_EDF, order=(0, 2, 1), shape=(experts * inner, hidden))
        y_BSD = self.emit("MatMul", [weighted_BSF, matrix], name="experts", shape=x_BSD.shape)
        return y_BSD if reduce is None else self.reduce(y_BSD, reduce)

    def _matrix(self, weights_BSX: "Tensor", indices_BSX: "Tensor", experts: int) -> "Tensor":
        """[B, S, E, 1]: each expert's weight, 0 for those that are not chosen."""
        batch, sequence, chosen = indices_BSX.shape
        numbers = self.constant(f"experts/{experts}", np.arange(experts), ir.DataType.INT64)
        last, shape = self._axis(-1), (batch, sequence, chosen, 1)
        index = self.emit("Unsqueeze", [indices_BSX, last], name="experts/index", shape=shape)
        weight = self.emit("Unsqueeze", [weights_BSX, last], name="experts/weight", shape=shape)
        shape = (batch, sequence, chosen, experts)
        chosen_BSXE = self.emit("Equal", [index, numbers], name="experts/chosen", shape=shape, dtype=ir.DataType.BOOL)
        each_BSXE = self.emit(
            "Where", [chosen_BSXE, weight, self._zero()], name="experts/weights", shape=shape, dtype=self.dtype
        )
        shape = (batch, sequence, experts)
        sum_BSE = self.emit("ReduceSum", [each_BSXE, self._axis(2)], name="experts/sum", shape=shape, keepdims=0)
        return self.emit("Unsqueeze", [sum_BSE, last], name="experts/matrix", shape=(*shape, 1))

    def _weighted(self, hidden_BSF: "Tensor", matrix_BSE1: "Tensor", inner: int) -> "Tensor":
        """hidden · weight. Not left to 0 · hidden: what nobody chose may be infinite in half precision."""
        batch, sequence, experts, _ = matrix_BSE1.shape
        shape = (batch, sequence, experts, inner)
        split = self.constant(f"experts/{experts}_{inner}", [0, 0, experts, inner], ir.DataType.INT64)
        hidden_BSEF = self.emit("Reshape", [hidden_BSF, split], name="experts/split", shape=shape)
        product = self.emit("Mul", [hidden_BSEF, matrix_BSE1], name="experts/product")
        used = self.emit(
            "Greater", [matrix_BSE1, self._zero()], name="experts/used", shape=matrix_BSE1.shape, dtype=ir.DataType.BOOL
        )
        kept = self.emit("Where", [used, product, self._zero()], name="experts/kept", shape=shape, dtype=self.dtype)
        joined = self.constant("experts/joined", [0, 0, -1], ir.DataType.INT64)
        return self.emit("Reshape", [kept, joined], name="experts/weighted", shape=hidden_BSF.shape)

    def _axis(self, axis: int) -> "Tensor":
        return self.constant(f"int64/{axis}", [axis], ir.DataType.INT64)

    def _zero(self) -> "Tensor":
        return self.constant("zero", 0.0, self.dtype)

    def router_penalty(
        self,
        logits_BSE: "Tensor",
        indices_BSX: "Tensor",
        routing: Routing,
        penalties: Penalties,
        *,
        spread: str | None,
    ) -> "Tensor":
        raise AssertionError("graphs are made for inference: their steps have no targets")

    def sum_over_targets(self, penalty_B: "Tensor", targets_BS: "Tensor") -> "Tensor":
        raise AssertionError("graphs are made for inference: their steps have no targets")

"""Mixture of experts in ONNX, in operators that ONNX Runtime and TensorRT read alike: TensorRT has no fused mixture of
experts on SM 9.0. Two forms of the same numbers:

dense: every expert computes every token, and what was not chosen counts as 0. All experts are one matrix product, so
that it is a large one, and it reads all weights however few tokens there are.

x_BSD ── MatMul gate [D, E·F] ── silu ─┐
      └─ MatMul up   [D, E·F] ───────── Mul ── [B, S, E, F] · weight or 0 ── [B, S, E·F] ── MatMul down [E·F, D] ──▶

gathered: the matrices of each token's experts are gathered, and only those are multiplied. A decode step of few tokens
reads B · X matrices in place of E; a call of many tokens copies 3 · X · D · F weights for each of them.

indices_BSX ── Gather gate, up [E, D, F] ── [B, S, X, D, F] ── MatMul, silu, Mul ── [B, S, X, 1, F]
            └─ Gather down [E, F, D] ────────────────────────── MatMul ── [B, S, X, 1, D] · weight ── sum over X ──▶

A rank that has some of the experts computes these alone, numbered from its coordinate on the expert axis, and the sum
over the ranks is the result: every rank has all tokens, so nothing travels and all shapes are static.

B batch, S sequence, D hidden, E experts of this rank, X experts of a token, F inner width of an expert.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from archwright.compiler.interpreters.onnx_emitter import OnnxEmitter
from archwright.compiler.ir import Boundary, Penalties, Routing

if TYPE_CHECKING:
    from archwright.compiler.interpreters.onnx_ops import Tensor, Weight
    from archwright.compiler.interpreters.onnx_quantization import Dequantized


class OnnxMoe(OnnxEmitter):
    """A part of `OnnxOps`."""

    moe: str
    ranks: Mapping[str, int]

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
        assert dispatch is None, "the ranks of a graph have the same tokens"
        experts = gate_EFD.param.shape[0]
        spread = reduce is not None and "expert" in reduce.axes
        first = self.ranks["expert"] * experts if spread else 0
        if self.moe == "gathered":
            own = self._own(indices_BSX, first, experts) if spread else None
            y_BSD = self._gathered(x_BSD, weights_BSX, indices_BSX, (gate_EFD, up_EFD, down_EDF), own)
        else:
            matrix_BSE1 = self._matrix(weights_BSX, indices_BSX, first, experts)
            y_BSD = self._dense(x_BSD, matrix_BSE1, gate_EFD, up_EFD, down_EDF)
        return y_BSD if reduce is None else self.reduce(y_BSD, reduce)

    def _dense(
        self,
        x_BSD: "Tensor",
        matrix_BSE1: "Tensor",
        gate_EFD: "Weight | Dequantized",
        up_EFD: "Weight | Dequantized",
        down_EDF: "Weight | Dequantized",
    ) -> "Tensor":
        experts, inner, hidden = gate_EFD.param.shape
        joined = (*x_BSD.shape[:-1], experts * inner)

        def widen(weight: "Weight | Dequantized", name: str) -> "Tensor":
            matrix = self.stored(weight, order=(2, 0, 1), shape=(hidden, experts * inner))
            return self.emit("MatMul", [x_BSD, matrix], name=f"experts/{name}", shape=joined)

        hidden_BSF = self.emit("Mul", [self.silu(widen(gate_EFD, "gate")), widen(up_EFD, "up")], name="experts/hidden")
        weighted_BSF = self._weighted(hidden_BSF, matrix_BSE1, inner)
        matrix = self.stored(down_EDF, order=(0, 2, 1), shape=(experts * inner, hidden))
        return self.emit("MatMul", [weighted_BSF, matrix], name="experts", shape=x_BSD.shape)

    def _gathered(
        self,
        x_BSD: "Tensor",
        weights_BSX: "Tensor",
        indices_BSX: "Tensor",
        matrices: "tuple[Weight | Dequantized, Weight | Dequantized, Weight | Dequantized]",
        own: "tuple[Tensor, Tensor] | None",
    ) -> "Tensor":
        """own: which of the chosen experts this rank has [B, S, X], and their numbers among its own (0 for others)."""
        gate, up, down = matrices
        experts, inner, hidden = gate.param.shape
        batch, sequence, chosen = indices_BSX.shape
        index_BSX = indices_BSX if own is None else own[1]

        def gathered(weight: "Weight | Dequantized", name: str, rows: int, columns: int) -> "Tensor":
            stored = self.stored(weight, order=(0, 2, 1), shape=(experts, rows, columns))
            shape = (batch, sequence, chosen, rows, columns)
            inputs = [stored, index_BSX]
            return self.emit("Gather", inputs, name=f"experts/{name}/gathered", shape=shape, axis=0)

        def widen(weight: "Weight | Dequantized", name: str) -> "Tensor":
            inputs = [x_BS11D, gathered(weight, name, hidden, inner)]
            return self.emit("MatMul", inputs, name=f"experts/{name}", shape=(batch, sequence, chosen, 1, inner))

        axes = self.constant("int64/2_3", [2, 3], ir.DataType.INT64)
        x_BS11D = self.emit("Unsqueeze", [x_BSD, axes], name="experts/token", shape=(batch, sequence, 1, 1, hidden))
        hidden_BSX1F = self.emit("Mul", [self.silu(widen(gate, "gate")), widen(up, "up")], name="experts/hidden")
        shape = (batch, sequence, chosen, 1, hidden)
        inputs = [hidden_BSX1F, gathered(down, "down", inner, hidden)]
        y_BSX1D = self.emit("MatMul", inputs, name="experts/down", shape=shape)
        weight = self._unsqueezed(weights_BSX, "weight")
        y_BSX1D = self.emit("Mul", [y_BSX1D, weight], name="experts/product")
        if own is not None:  # not left to a weight of 0: what another rank should compute may be infinite here
            inputs = [self._unsqueezed(own[0], "own"), y_BSX1D, self._zero()]
            y_BSX1D = self.emit("Where", inputs, name="experts/kept", shape=shape, dtype=self.dtype)
        return self.emit("ReduceSum", [y_BSX1D, axes], name="experts", shape=x_BSD.shape, keepdims=0)

    def _unsqueezed(self, x_BSX: "Tensor", name: str) -> "Tensor":
        """[B, S, X, 1, 1]."""
        axes = self.constant("int64/3_4", [3, 4], ir.DataType.INT64)
        return self.emit("Unsqueeze", [x_BSX, axes], name=f"experts/{name}", shape=(*x_BSX.shape, 1, 1))

    def _own(self, indices_BSX: "Tensor", first: int, experts: int) -> "tuple[Tensor, Tensor]":
        """Whether an index is one of first .. first + experts - 1, and its number among them, 0 where it is not."""
        low, high, zero = (self.constant(f"int64/{n}", [n], ir.DataType.INT64) for n in (first, first + experts, 0))
        boolean, shape = ir.DataType.BOOL, indices_BSX.shape
        above = self.emit("GreaterOrEqual", [indices_BSX, low], name="experts/above", shape=shape, dtype=boolean)
        below = self.emit("Less", [indices_BSX, high], name="experts/below", shape=shape, dtype=boolean)
        own = self.emit("And", [above, below], name="experts/here")
        number = self.emit("Sub", [indices_BSX, low], name="experts/number")
        dtype = ir.DataType.INT64
        return own, self.emit("Where", [own, number, zero], name="experts/local", shape=shape, dtype=dtype)

    def _matrix(self, weights_BSX: "Tensor", indices_BSX: "Tensor", first: int, experts: int) -> "Tensor":
        """[B, S, E, 1]: the weight of each of the experts first .. first + E - 1, 0 for those that are not chosen."""
        batch, sequence, chosen = indices_BSX.shape
        name = f"experts/{experts}" if first == 0 else f"experts/{experts}/from_{first}"
        numbers = self.constant(name, first + np.arange(experts), ir.DataType.INT64)
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

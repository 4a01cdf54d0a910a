"""Blocks whose matrices are stored in fewer bits, made by the pass `quantize`.

Each is the block that it stands for, with a scale beside each matrix: partition and targets see it as that block.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

from archwright.compiler.blocks.decoder import Head
from archwright.compiler.blocks.embedding import Embedding
from archwright.compiler.blocks.linear import Linear
from archwright.compiler.blocks.moe import Experts
from archwright.compiler.ir import Ops, Param, Scope, Step

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class QuantLinear(Linear):
    """x · (weight · scale)ᵀ + bias. weight [out, in] in few bits, weight_scale [out, groups].

    input_scale [1, 1]: x is rounded to 8-bit floats first.
    """

    weight_scale: Param
    input_scale: Param | None = None

    def forward(self, ops: Ops[T], m: Scope[T], x: T) -> T:
        if self.input_scale is not None:
            x = ops.round_to_float8(x, m.input_scale)
        weight = ops.dequantize(m.weight, m.weight_scale)
        return ops.linear(x, weight, m.bias if self.bias else None, reduce=self.reduce)


@dataclass(frozen=True, kw_only=True)
class QuantEmbedding(Embedding):
    """Row lookup in a table of few bits: weight[ids] · scale[ids]."""

    weight_scale: Param

    def forward(self, ops: Ops[T], m: Scope[T], ids_BS: T, step: Step[T]) -> T:
        return ops.embed(ids_BS, ops.dequantize(m.weight, m.weight_scale), reduce=self.reduce)


@dataclass(frozen=True, kw_only=True)
class QuantHead(Head):
    """Output matrix of few bits; a tied one shares weight and scale with the embedding."""

    weight_scale: Param
    input_scale: Param | None = None

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, step: Step[T]) -> Any:
        if self.input_scale is not None:
            x_BSD = ops.round_to_float8(x_BSD, m.input_scale)
        weight = ops.dequantize(m.weight, m.weight_scale)
        if step.targets_BS is None:
            return ops.linear(x_BSD, weight, None, reduce=None, gather=self.gather)
        return ops.linear_cross_entropy(x_BSD, weight, step.targets_BS, gather=self.gather)


@dataclass(frozen=True, kw_only=True)
class QuantExperts(Experts):
    """Experts whose matrices are of few bits; a scale [E, out, groups] beside each stack."""

    gate_proj_scale: Param
    up_proj_scale: Param
    down_proj_scale: Param

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, weights_BSX: T, indices_BSX: T) -> T:
        pairs = (
            (m.gate_proj, m.gate_proj_scale),
            (m.up_proj, m.up_proj_scale),
            (m.down_proj, m.down_proj_scale),
        )
        gate_EFD, up_EFD, down_EDF = (ops.dequantize(weight, scale) for weight, scale in pairs)
        return ops.experts(
            x_BSD, weights_BSX, indices_BSX, gate_EFD, up_EFD, down_EDF, dispatch=self.dispatch, reduce=self.reduce
        )

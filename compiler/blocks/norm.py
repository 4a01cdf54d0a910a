"""Normalisation over the last dim."""

from dataclasses import dataclass
from typing import TypeVar

from archwright.compiler.ir import Block, Ops, Param, Scope

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Block):
    """x / sqrt(mean(x²) + eps) · weight, the mean in at least float32 (Zhang & Sennrich 2019)."""

    weight: Param
    eps: float

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T) -> T:
        return ops.rms_norm(x_BSD, m.weight, self.eps)


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Block):
    """(x - mean(x)) / sqrt(var(x) + eps) · weight + bias, the moments in at least float32 (Ba et al. 2016)."""

    weight: Param
    bias: Param | None
    eps: float

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T) -> T:
        return ops.layer_norm(x_BSD, m.weight, m.bias if self.bias else None, self.eps)


Norm = RMSNorm | LayerNorm

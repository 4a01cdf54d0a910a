"""Feed-forward networks."""

from dataclasses import dataclass
from typing import Any, TypeVar

from archwright.compiler.blocks.linear import Linear
from archwright.compiler.ir import Block, Ops, Scope

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SwiGLU(Block):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T) -> T:
        return m.down_proj(ops.silu(m.gate_proj(x_BSD)) * m.up_proj(x_BSD))


@dataclass(frozen=True, kw_only=True)
class GELU(Block):
    """fc2(gelu(fc1(x))) (Hendrycks & Gimpel 2016). approximation: none, or tanh for GPT-2's formula."""

    fc1: Linear
    fc2: Linear
    approximation: str

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T) -> T:
        return m.fc2(ops.gelu(m.fc1(x_BSD), self.approximation))


@dataclass(frozen=True, kw_only=True)
class FusedSwiGLU(Block):
    """SwiGLU with one matrix for gate and up: the rows of gate_proj, then as many of up_proj."""

    gate_up_proj: Linear
    down_proj: Linear

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T) -> T:
        rows = self.gate_up_proj.weight.shape[0]
        joined: T = m.gate_up_proj(x_BSD)
        gate: Any = ops.silu(ops.channels(joined, 0, rows // 2))
        return m.down_proj(gate * ops.channels(joined, rows // 2, rows))


FeedForward = SwiGLU | GELU | FusedSwiGLU

"""y = x · Wᵀ + b."""

from dataclasses import dataclass
from typing import TypeVar

from archwright.compiler.ir import Block, Boundary, Ops, Param, Scope

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Linear(Block):
    """A matrix, and a bias if there is one. weight [out, in], bias [out].

    reduce: written by `partition` where the contraction runs over a sharded axis: the mesh axis to sum over. The bias
    is added once, after the sum.
    """

    weight: Param
    bias: Param | None = None
    reduce: Boundary | None = None

    def forward(self, ops: Ops[T], m: Scope[T], x: T) -> T:
        return ops.linear(x, m.weight, m.bias if self.bias else None, reduce=self.reduce)

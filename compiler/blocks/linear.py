"""y = x · Wᵀ."""

from dataclasses import dataclass
from typing import TypeVar

from archwright.compiler.ir import Block, Ops, Param, Scope

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Linear(Block):
    """A matrix without a bias. weight [out, in].

    reduce: written by `partition` where the contraction runs over a sharded axis: the mesh axis to sum over.
    """

    weight: Param
    reduce: str | None = None

    def forward(self, ops: Ops[T], m: Scope[T], x: T) -> T:
        return ops.linear(x, m.weight, reduce=self.reduce)

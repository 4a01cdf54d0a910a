"""Token embedding."""

from dataclasses import dataclass
from typing import TypeVar

from archwright.compiler.ir import Block, Ops, Param, Scope, Step

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Embedding(Block):
    """Row lookup: x[b, s] = weight[ids[b, s]]. weight [vocab, hidden]."""

    weight: Param

    def forward(self, ops: Ops[T], m: Scope[T], ids_BS: T, step: Step[T]) -> T:
        return ops.embed(ids_BS, m.weight)

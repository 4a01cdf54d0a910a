"""Embedding of tokens and of positions. B batch, S sequence."""

from dataclasses import dataclass
from typing import TypeVar

from archwright.compiler.ir import Block, Boundary, Ops, Param, Scope, Step, child

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Embedding(Block):
    """Row lookup: x[b, s] = weight[ids[b, s]]. weight [rows, hidden].

    reduce: written by `partition` where the rows are cut over a mesh axis: each rank looks up the ids that it has, and
    the sum over the axis is the row.
    """

    weight: Param
    reduce: Boundary | None = None

    def forward(self, ops: Ops[T], m: Scope[T], ids_BS: T, step: Step[T]) -> T:
        return ops.embed(ids_BS, m.weight, reduce=self.reduce)


@dataclass(frozen=True, kw_only=True)
class PositionedEmbedding(Block):
    """A token's row plus the row of its position (GPT-2)."""

    embed_tokens: Embedding = child("model.embed_tokens")
    embed_positions: Embedding = child("model.embed_positions")

    def forward(self, ops: Ops[T], m: Scope[T], ids_BS: T, step: Step[T]) -> T:
        return m.embed_tokens(ids_BS, step) + m.embed_positions(step.positions_BS, step)

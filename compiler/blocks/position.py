"""Positions inside attention."""

from dataclasses import dataclass
from typing import TypeVar

from archwright.compiler.ir import Block, Ops, RopeTable, Scope, Step

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rope(Block):
    """Rotates each pair (x[i], x[i + H/2]) of a head by position · frequency[i]: Hugging Face's half-split layout,
    not the interleaved pairs of the paper (Su et al. 2021)."""

    table: RopeTable

    def forward(self, ops: Ops[T], m: Scope[T], x_BNSH: T, step: Step[T]) -> T:
        return ops.rope(x_BNSH, self.table, step)


@dataclass(frozen=True, kw_only=True)
class NoPosition(Block):
    """Leaves queries and keys as they are."""

    def forward(self, ops: Ops[T], m: Scope[T], x_BNSH: T, step: Step[T]) -> T:
        return x_BNSH


Position = Rope | NoPosition

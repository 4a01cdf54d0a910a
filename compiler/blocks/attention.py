"""Attention. B batch, S sequence, D hidden, N query heads, K key/value heads, H head_dim, L visible positions."""

from dataclasses import dataclass
from typing import TypeVar

from archwright.compiler.blocks.linear import Linear
from archwright.compiler.blocks.position import Position
from archwright.compiler.ir import Block, Mask, Ops, Scope, State, Step

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention(Block):
    """softmax(q kᵀ / sqrt(H) + mask) v with N / K query heads to each key/value head (Ainslie et al. 2023).

        query heads     0 1 2 3   4 5 6 7      N = 8
                        └──┬──┘   └──┬──┘
        key/value head     0         1         K = 2

    N = K is multi-head, K = 1 multi-query attention.
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    position: Position
    mask: Mask
    head_dim: int

    def state(self) -> dict[str, State]:
        kv_heads = self.k_proj.weight.shape[0] // self.head_dim
        rows = State(axes=("batch", "kv_heads", "positions", "head_dim"), sizes=(0, kv_heads, 0, self.head_dim))
        return {"key": rows, "value": rows}

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, step: Step[T]) -> T:
        q_BNSH = m.position(ops.split_heads(m.q_proj(x_BSD), self.head_dim), step)
        k_BKSH = m.position(ops.split_heads(m.k_proj(x_BSD), self.head_dim), step)
        v_BKSH = ops.split_heads(m.v_proj(x_BSD), self.head_dim)
        k_BKLH = ops.kv_update(m, "key", k_BKSH, step)
        v_BKLH = ops.kv_update(m, "value", v_BKSH, step)
        y_BNSH = ops.attention(q_BNSH, k_BKLH, v_BKLH, mask=self.mask, scale=self.head_dim**-0.5, step=step)
        return m.o_proj(ops.merge_heads(y_BNSH))

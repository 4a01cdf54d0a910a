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
    scale: None for 1 / sqrt(H); another where a pass has multiplied the weights of the queries (`passes.fuse`).
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    position: Position
    mask: Mask
    head_dim: int
    scale: float | None = None

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
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        y_BNSH = ops.attention(q_BNSH, k_BKLH, v_BKLH, mask=self.mask, scale=scale, step=step)
        return m.o_proj(ops.merge_heads(y_BNSH))


@dataclass(frozen=True, kw_only=True)
class FusedAttention(Block):
    """The same with one matrix for queries, keys and values: the rows of q_proj, k_proj and v_proj, in this order.

    num_heads, num_kv_heads: of the rank whose Program this is, since they say where its parts of the matrix meet.
    """

    qkv_proj: Linear
    o_proj: Linear
    position: Position
    mask: Mask
    head_dim: int
    num_heads: int
    num_kv_heads: int
    scale: float

    def state(self) -> dict[str, State]:
        sizes = (0, self.num_kv_heads, 0, self.head_dim)
        rows = State(axes=("batch", "kv_heads", "positions", "head_dim"), sizes=sizes)
        return {"key": rows, "value": rows}

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, step: Step[T]) -> T:
        keys, values = (number * self.head_dim for number in (self.num_heads, self.num_heads + self.num_kv_heads))
        joined: T = m.qkv_proj(x_BSD)
        q_BNSH = m.position(ops.split_heads(ops.channels(joined, 0, keys), self.head_dim), step)
        k_BKSH = m.position(ops.split_heads(ops.channels(joined, keys, values), self.head_dim), step)
        end = values + self.num_kv_heads * self.head_dim
        v_BKSH = ops.split_heads(ops.channels(joined, values, end), self.head_dim)
        k_BKLH = ops.kv_update(m, "key", k_BKSH, step)
        v_BKLH = ops.kv_update(m, "value", v_BKSH, step)
        y_BNSH = ops.attention(q_BNSH, k_BKLH, v_BKLH, mask=self.mask, scale=self.scale, step=step)
        return m.o_proj(ops.merge_heads(y_BNSH))


Attention = GroupedQueryAttention | FusedAttention

"""The decoder: layers and head. B batch, S sequence, D hidden, V vocabulary."""

from dataclasses import dataclass
from typing import Any, TypeVar

from archwright.compiler.blocks.attention import GroupedQueryAttention
from archwright.compiler.blocks.ffn import FeedForward
from archwright.compiler.blocks.linear import Linear
from archwright.compiler.blocks.norm import Norm
from archwright.compiler.ir import Block, Ops, Scope, Step, child

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DecoderLayer(Block):
    """Pre-norm residual layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    input_layernorm: Norm
    self_attn: GroupedQueryAttention
    post_attention_layernorm: Norm
    mlp: FeedForward

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, step: Step[T]) -> T:
        x_BSD = x_BSD + m.self_attn(m.input_layernorm(x_BSD), step)
        return x_BSD + m.mlp(m.post_attention_layernorm(x_BSD))


@dataclass(frozen=True, kw_only=True)
class LanguageModelHead(Block):
    """Final norm and output matrix: logits_BSV, or (loss_sum, num_tokens) where the step carries targets.

    A tied head's weight shares the embedding's parameter (`Param.share`).
    """

    norm: Norm = child("model.norm")
    lm_head: Linear = child("lm_head")

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, step: Step[T]) -> Any:
        x_BSD = m.norm(x_BSD)
        if step.targets_BS is None:
            return m.lm_head(x_BSD)
        return ops.linear_cross_entropy(x_BSD, m.lm_head.weight, step.targets_BS)

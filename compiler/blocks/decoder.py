"""The decoder: layers and head. B batch, S sequence, D hidden, V vocabulary."""

from dataclasses import dataclass
from typing import Any, TypeVar

from archwright.compiler.blocks.attention import GroupedQueryAttention
from archwright.compiler.blocks.ffn import FeedForward
from archwright.compiler.blocks.norm import Norm
from archwright.compiler.ir import Block, Boundary, Ops, Param, Scope, Step, child

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
class Head(Block):
    """Output matrix: logits_BSV, or (loss_sum, num_tokens) where the step carries targets. weight [vocab, hidden].

    A tied head's weight shares the embedding's parameter (`Param.share`).
    gather: written by `partition` where the rows are cut over a mesh axis: the logits of all ranks are put together.
    """

    weight: Param
    gather: Boundary | None = None

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, step: Step[T]) -> Any:
        if step.targets_BS is None:
            return ops.linear(x_BSD, m.weight, None, reduce=None, gather=self.gather)
        return ops.linear_cross_entropy(x_BSD, m.weight, step.targets_BS, gather=self.gather)


@dataclass(frozen=True, kw_only=True)
class LanguageModelHead(Block):
    """Final norm, then the output matrix."""

    norm: Norm = child("model.norm")
    lm_head: Head = child("lm_head")

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, step: Step[T]) -> Any:
        return m.lm_head(m.norm(x_BSD), step)

"""The decoder: layers and head. B batch, S sequence, D hidden, V vocabulary."""

from dataclasses import dataclass
from typing import Any, TypeVar

from archwright.compiler.blocks.attention import Attention
from archwright.compiler.blocks.ffn import FeedForward
from archwright.compiler.blocks.moe import MixtureOfExperts
from archwright.compiler.blocks.norm import Norm
from archwright.compiler.ir import Block, Boundary, Ops, Param, Scope, Step, child

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DecoderLayer(Block):
    """Pre-norm residual layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    input_layernorm: Norm
    self_attn: Attention
    post_attention_layernorm: Norm
    mlp: FeedForward | MixtureOfExperts

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, step: Step[T]) -> T | tuple[T, T]:
        x_BSD = x_BSD + m.self_attn(m.input_layernorm(x_BSD), step)
        return x_BSD + m.mlp(m.post_attention_layernorm(x_BSD))


@dataclass(frozen=True, kw_only=True)
class MoeDecoderLayer(DecoderLayer):
    """The same with a mixture of experts: gives x_BSD, or (x_BSD, penalty_B) where its router adds to the loss."""

    mlp: MixtureOfExperts

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, step: Step[T]) -> T | tuple[T, T]:
        x_BSD = x_BSD + m.self_attn(m.input_layernorm(x_BSD), step)
        y_BSD, penalty_B = m.mlp(m.post_attention_layernorm(x_BSD), step)
        x_BSD = x_BSD + y_BSD
        return x_BSD if penalty_B is None else (x_BSD, penalty_B)


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
    """Final norm, then the output matrix; of one token a row where the step says of which.

    penalty_B: what the routers of all layers add to the loss of each sequence. It is weighed by the sequence's targets:
    the mean loss over all targets grows by its mean over them, however the sequences are spread.
    """

    norm: Norm = child("model.norm")
    lm_head: Head = child("lm_head")

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, step: Step[T], penalty_B: T | None = None) -> Any:
        if step.logit_index_B is not None:
            x_BSD = ops.take_token(x_BSD, step.logit_index_B)
        output = m.lm_head(m.norm(x_BSD), step)
        if penalty_B is None or step.targets_BS is None:
            return output
        loss_sum, num_tokens = output
        return loss_sum + ops.sum_over_targets(penalty_B, step.targets_BS), num_tokens

"""Mixture of experts. B batch, S sequence, D hidden, E experts, X experts of a token, F inner width of an expert."""

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from archwright.compiler.blocks.ffn import FusedSwiGLU, SwiGLU
from archwright.compiler.blocks.linear import Linear
from archwright.compiler.ir import Block, Boundary, Ops, Param, Penalties, Routing, Scope, Step

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Experts(Block):
    """Σ over a token's experts e of weight · down_e(silu(gate_e(x)) · up_e(x)).

    gate_proj, up_proj [E, F, D], down_proj [E, D, F].
    Written by `partition`: dispatch, the mesh axis over which the experts are spread and to which tokens travel;
    reduce, over which F is cut, and over which the experts are spread where its ranks all have the same tokens.
    Under the latter the ranks compute parts of what both x and the weights lead to, so both enter, and the indices
    with them: where tokens are spread, all three are gathered.
    """

    num_entering: ClassVar[int] = 3

    gate_proj: Param
    up_proj: Param
    down_proj: Param
    dispatch: str | None = None
    reduce: Boundary | None = None

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, weights_BSX: T, indices_BSX: T) -> T:
        matrices = m.gate_proj, m.up_proj, m.down_proj
        return ops.experts(x_BSD, weights_BSX, indices_BSX, *matrices, dispatch=self.dispatch, reduce=self.reduce)


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts(Block):
    """shared(x) + Σ over the experts with the largest router logits of weight · expert(x) (Shazeer et al. 2017).

                 ┌─ gate ─ top X ─ weights ─┐
        x_BSD ───┼──────────────────────── experts ─ + ─▶
                 └──────── shared_experts ───────────┘

    spread: written by `partition`: the mesh axis whose ranks route different tokens of a sequence.
    """

    gate: Linear
    experts: Experts
    shared_experts: SwiGLU | FusedSwiGLU | None
    routing: Routing
    penalties: Penalties
    spread: str | None = None

    def forward(self, ops: Ops[T], m: Scope[T], x_BSD: T, step: Step[T]) -> tuple[T, T | None]:
        """(y_BSD, penalty_B); no penalty where the step has no targets or asks for none."""
        logits_BSE: T = m.gate(x_BSD)
        indices_BSX = ops.top_k(logits_BSE, self.routing.experts_per_token)
        weights_BSX = ops.routing_weights(logits_BSE, indices_BSX, self.routing)
        y_BSD = m.experts(x_BSD, weights_BSX, indices_BSX)
        if self.shared_experts is not None:
            y_BSD = y_BSD + m.shared_experts(x_BSD)
        if step.targets_BS is None or not step.penalized:
            return y_BSD, None
        return y_BSD, ops.router_penalty(logits_BSE, indices_BSX, self.routing, self.penalties, spread=self.spread)

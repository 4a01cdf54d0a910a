"""What an interpreter offers to a block's `forward`.

T is the interpreter's tensor: an array, a torch tensor, a value of an ONNX graph, a shape with a cost.
Shape suffixes: B batch, S sequence, D hidden, N query heads, K key/value heads, H head_dim, F feed-forward,
V vocabulary, L visible cache positions, P cache capacity; of mixtures of experts E experts, X experts of a token.
"""

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from archwright.compiler.ir.block import Boundary
from archwright.compiler.ir.values import Mask, Penalties, RopeTable, Routing

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Step(Generic[T]):
    """Where the tokens of one call stand.

    positions_BS: position of each token.
    write_index_B, kv_positions_L: with a cache, the row where the first token's key goes, and 0..L-1 for the rows that
    may be visible; both None without a cache.
    targets_BS: with targets the Program returns (loss_sum, num_tokens) instead of logits; -100 does not count.
    penalized: whether routers add their penalties to that loss, as they do in training.
    logit_index_B: which of the S tokens of each row the logits are wanted of; None: of all.
    """

    positions_BS: T
    write_index_B: T | None = None
    kv_positions_L: T | None = None
    targets_BS: T | None = None
    penalized: bool = True
    logit_index_B: T | None = None


class Scope(Protocol[T_co]):
    """An interpreter's instance of a block: children are callable, parameters are values, `path` is its name."""

    def __getattr__(self, name: str) -> Any: ...


class Ops(Protocol[T]):
    """The operations that are not plain arithmetic. Each has its reference in `interpreters/numpy_ops.py`."""

    def linear(self, x: T, weight: T, bias: T | None, *, reduce: Boundary | None, gather: Boundary | None = None) -> T:
        """x · weightᵀ + bias; the product is summed over the mesh axis `reduce` if one is named, before the bias.

        gather: the mesh axis over which the output's channels are cut, where all of them are wanted on each rank.
        x [..., in], weight [out, in], bias [out].
        """
        ...

    def dequantize(self, weight: T, scale: T) -> T:
        """weight · scale: a matrix as its reader multiplies with it.

        weight [..., out, in], scale [..., out, groups]: in / groups neighbours along `in` share a scale. A weight, like
        a parameter, and no result of its own: it is not recorded.
        """
        ...

    def round_to_float8(self, x: T, scale_11: T) -> T:
        """x / scale rounded to the nearest 8-bit float (E4M3, ties to even, at most ±448), times scale."""
        ...

    def embed(self, ids_BS: T, weight_VD: T, *, reduce: Boundary | None) -> T:
        """Rows of a table. reduce: the mesh axis over which its rows are cut."""
        ...

    def rms_norm(self, x_BSD: T, weight_D: T, eps: float) -> T: ...

    def layer_norm(self, x_BSD: T, weight_D: T, bias_D: T | None, eps: float) -> T: ...

    def silu(self, x: T) -> T: ...

    def gelu(self, x: T, approximation: str) -> T:
        """x · Φ(x), or with `tanh` GPT-2's formula for it."""
        ...

    def channels(self, x: T, start: int, stop: int) -> T:
        """The channels [start, stop) of the last dim, of those that this rank has."""
        ...

    def split_heads(self, x: T, head_dim: int) -> T:
        """[B, S, heads · head_dim] → [B, heads, S, head_dim]; the number of heads is inferred, so local sizes work."""
        ...

    def merge_heads(self, x: T) -> T:
        """[B, heads, S, head_dim] → [B, S, heads · head_dim]."""
        ...

    def rope(self, x_BNSH: T, table: RopeTable, step: Step[T]) -> T:
        """Rotate the pairs (x[i], x[i + H/2]) by angle[position, i]."""
        ...

    def kv_update(self, m: Scope[T], name: str, x_BKSH: T, step: Step[T]) -> T:
        """Without a cache: x. With one: write x into the state `name` of `m` at write_index; its first L rows."""
        ...

    def attention(self, q_BNSH: T, k_BKLH: T, v_BKLH: T, *, mask: Mask, scale: float, step: Step[T]) -> T:
        """softmax(scale · q kᵀ + mask) v, each key/value head serving N / K query heads."""
        ...

    def take_token(self, x_BSD: T, index_B: T) -> T:
        """[B, 1, D]: of each row the token at its index, counted from 0 among the S tokens of the call."""
        ...

    def top_k(self, x_BSE: T, number: int) -> T:
        """Indices [B, S, X] of the `number` largest values along the last dim, the largest first."""
        ...

    def routing_weights(self, logits_BSE: T, indices_BSX: T, routing: Routing) -> T:
        """[B, S, X]: the scores of the chosen experts, divided by their sum if so said, times `scale`."""
        ...

    def experts(
        self,
        x_BSD: T,
        weights_BSX: T,
        indices_BSX: T,
        gate_EFD: T,
        up_EFD: T,
        down_EDF: T,
        *,
        dispatch: str | None,
        reduce: Boundary | None,
    ) -> T:
        """Σ over a token's experts e of weight · down_e(silu(gate_e(x)) · up_e(x)); no token is dropped.

        dispatch: the mesh axis over which the experts are spread: tokens travel to them and back. reduce: over which
        their inner widths are cut; also over which they are spread, where all its ranks have the same tokens: each
        computes its own experts, numbered by its coordinate, for all tokens.
        """
        ...

    def router_penalty(
        self, logits_BSE: T, indices_BSX: T, routing: Routing, penalties: Penalties, *, spread: str | None
    ) -> T:
        """[B]: balance · E · Σ_e f_e p_e + z · mean of logsumexp(logits)², of each sequence by itself.

        f_e: the share of the sequence's S · X choices that fall on e; p_e: the mean over its tokens of e's score
        divided by the sum of all scores (DeepSeek-V3, arXiv:2412.19437, equations 17 to 20). Shares over several
        sequences would depend on how these are spread over ranks and micro-batches.
        spread: the mesh axis whose ranks hold different tokens of a sequence.
        """
        ...

    def sum_over_targets(self, penalty_B: T, targets_BS: T) -> T:
        """Σ over sequences of penalty · (number of targets ≠ -100)."""
        ...

    def linear_cross_entropy(self, x_BSD: T, weight_VD: T, targets_BS: T, *, gather: Boundary | None) -> Any:
        """(Σ -log softmax(x · weightᵀ)[target], number of targets ≠ -100). gather: over which the rows are cut."""
        ...

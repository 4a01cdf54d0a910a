"""What an interpreter offers to a block's `forward`.

T is the interpreter's tensor: an array, a torch tensor, a value of an ONNX graph, a shape with a cost.
Shape suffixes: B batch, S sequence, D hidden, N query heads, K key/value heads, H head_dim, F feed-forward,
V vocabulary, L visible cache positions, P cache capacity.
"""

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from archwright.compiler.ir.block import Boundary
from archwright.compiler.ir.values import Mask, RopeTable

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Step(Generic[T]):
    """Where the tokens of one call stand.

    positions_BS: position of each token.
    write_index_B, kv_positions_L: with a cache, the row where the first token's key goes, and 0..L-1 for the rows that
    may be visible; both None without a cache.
    targets_BS: with targets the Program returns (loss_sum, num_tokens) instead of logits; -100 does not count.
    """

    positions_BS: T
    write_index_B: T | None = None
    kv_positions_L: T | None = None
    targets_BS: T | None = None


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

    def embed(self, ids_BS: T, weight_VD: T, *, reduce: Boundary | None) -> T:
        """Rows of a table. reduce: the mesh axis over which its rows are cut."""
        ...

    def rms_norm(self, x_BSD: T, weight_D: T, eps: float) -> T: ...

    def layer_norm(self, x_BSD: T, weight_D: T, bias_D: T | None, eps: float) -> T: ...

    def silu(self, x: T) -> T: ...

    def gelu(self, x: T, approximation: str) -> T:
        """x · Φ(x), or with `tanh` GPT-2's formula for it."""
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

    def linear_cross_entropy(self, x_BSD: T, weight_VD: T, targets_BS: T, *, gather: Boundary | None) -> Any:
        """(Σ -log softmax(x · weightᵀ)[target], number of targets ≠ -100). gather: over which the rows are cut."""
        ...

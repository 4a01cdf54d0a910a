"""Parameters: what a block learns, with logical axes instead of places."""

from dataclasses import dataclass
from math import prod
from typing import Literal

Axis = Literal["vocab", "positions", "embed", "heads", "kv_heads", "ffn", "head_dim"]


@dataclass(frozen=True, kw_only=True)
class Normal:
    """N(0, std²)."""

    std: float


@dataclass(frozen=True)
class Ones:
    """All ones (the weights of norms)."""


@dataclass(frozen=True)
class Zeros:
    """All zeros (biases)."""


Init = Normal | Ones | Zeros


@dataclass(frozen=True, kw_only=True)
class Split:
    """How one dim of a parameter lies on a mesh axis: in `parts` equal pieces, rank r using piece r · parts // degree.

    parts = degree is ordinary sharding. parts < degree happens to key/value heads when there are fewer of them than
    ranks: neighbouring ranks then use the same head.

        degree 4, parts 2:   rank 0 ┐          rank 2 ┐
                             rank 1 ┘ piece 0  rank 3 ┘ piece 1
    """

    mesh_axis: str
    dim: int
    degree: int
    parts: int

    def piece(self, rank: int) -> int:
        return rank * self.parts // self.degree

    def slices(self, shape: tuple[int, ...], rank: int) -> tuple[slice, ...]:
        """Where the piece of `rank` (a coordinate on the mesh axis) lies in the full tensor of `shape`."""
        size = shape[self.dim] // self.parts
        start = self.piece(rank) * size
        return tuple(slice(start, start + size) if dim == self.dim else slice(None) for dim in range(len(shape)))

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size // self.parts if dim == self.dim else size for dim, size in enumerate(shape))


@dataclass(frozen=True, kw_only=True)
class Param:
    """A learned tensor.

    shape: sizes. axes: the logical axis of each dim; the sharding table speaks of these.
    grain: elements of each dim that must stay together (head_dim on a heads axis), 1 where anything may be cut.
    share: a key; parameters of one Program with the same key are one tensor, owned by the first reader.
    split: None until `partition` writes it.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    init: Init
    grain: tuple[int, ...] = ()
    share: str | None = None
    split: Split | None = None

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_projection(self) -> bool:
        """A matrix between hidden states, not a vector and not a table of tokens or positions."""
        return len(self.axes) == 2 and self.axes[0] not in ("vocab", "positions")

    def units(self, dim: int) -> int:
        """Pieces that `dim` can be cut into at most."""
        return self.shape[dim] // (self.grain[dim] if self.grain else 1)

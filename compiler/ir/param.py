"""Parameters: what a block learns, with logical axes instead of places."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

Axis = Literal[
    "vocab", "positions", "embed", "heads", "kv_heads", "ffn", "head_dim", "expert", "router", "tokens", "one"
]
"""`expert`: the dim that stacks experts. `router`: the rows of a router, one an expert, which every rank needs.
`tokens` is no parameter's: a sharding table has it where the ranks of an axis have tokens of their own. `one`: a single
scale for all channels."""
Storage = Literal["int4", "int8", "float8"]
"""How a quantized matrix is stored: whole numbers of 4 or 8 bits, or 8-bit floats (E4M3)."""
STORED_BITS: dict[Storage, int] = {"int4": 4, "int8": 8, "float8": 8}
TABLE_AXES: tuple[Axis, ...] = ("vocab", "positions")
"""Of tables that are looked up by row. Their pieces may be filled up with rows that nobody reads."""


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
    ranks: neighbouring ranks then use the same head. Where a size is no multiple of `parts` (a table's rows), pieces
    are of equal size and the last ones end past the tensor, with rows that no checkpoint and no count knows.

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
        total = shape[self.dim]
        size = -(-total // self.parts)
        start = min(self.piece(rank) * size, total)
        stop = min(start + size, total)
        return tuple(slice(start, stop) if dim == self.dim else slice(None) for dim in range(len(shape)))

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-(-size // self.parts) if dim == self.dim else size for dim, size in enumerate(shape))


@dataclass(frozen=True, kw_only=True)
class Param:
    """A learned tensor.

    shape: sizes. axes: the logical axis of each dim; the sharding table speaks of these.
    grain: elements of each dim that must stay together (head_dim on a heads axis), 1 where anything may be cut.
    share: a key; parameters of one Program with the same key are one tensor, owned by the first reader.
    splits: written by `partition`, one for each mesh axis that cuts the tensor.
    partial: written by `partition`: the mesh axis whose ranks read the whole tensor, each for other tokens; its
    gradient is summed over that axis.
    storage: written by `quantize`: how the tensor is stored; None in the precision of the model.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    init: Init
    grain: tuple[int, ...] = ()
    share: str | None = None
    splits: tuple[Split, ...] = ()
    partial: str | None = None
    storage: Storage | None = None

    @property
    def split(self) -> Split | None:
        """How the tensor axis cuts it: the only cut that inference knows."""
        return next((split for split in self.splits if split.mesh_axis == "tensor"), None)

    def slices(self, ranks: Mapping[str, int]) -> tuple[slice, ...]:
        """Where a rank's part lies in the full tensor. ranks: mesh axis → the rank's coordinate on it."""
        result = [slice(None)] * len(self.shape)
        for split in self.splits:
            own = split.slices(self.shape, ranks[split.mesh_axis])
            result = [kept if part == slice(None) else part for kept, part in zip(result, own, strict=True)]
        return tuple(result)

    def pieces(self, ranks: Mapping[str, int]) -> tuple[int, ...]:
        """The number of a rank's piece in each split: ranks with equal numbers hold the same part."""
        return tuple(split.piece(ranks[split.mesh_axis]) for split in self.splits)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_projection(self) -> bool:
        """A matrix between hidden states: no vector, no table of tokens or positions, no stack of experts' matrices.

        Muon makes these orthogonal. It would need each expert's matrix apart, so stacks are AdamW's.
        """
        return len(self.axes) == 2 and self.axes[0] not in ("vocab", "positions")

    def units(self, dim: int) -> int:
        """Pieces that `dim` can be cut into at most."""
        return self.shape[dim] // (self.grain[dim] if self.grain else 1)

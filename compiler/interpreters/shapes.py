"""What `CostOps` computes with: shapes and where they lie on the mesh, and what an operation costs."""

from dataclasses import dataclass
from typing import Literal

from archwright.compiler.ir import Split

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


class Disagreement(Exception):
    """Two things in a block do not fit; `CostOps.scope` adds the block's path and raises an ArchwrightError."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


@dataclass(frozen=True, kw_only=True)
class Shaped:
    """A tensor without its numbers.

    sharded: the mesh axis over which the ranks hold different parts, None for a value that all ranks hold.
    entered: the mesh axis over which the gradient of this (replicated) value is summed.
    spread: the mesh axis whose ranks hold different tokens of it; `shape` counts all tokens.
    integer: whether it has no gradient.
    splits, partial: of a parameter, see `Param`; none for what is computed.
    """

    shape: tuple[int, ...]
    sharded: str | None = None
    entered: str | None = None
    spread: str | None = None
    integer: bool = False
    splits: tuple[Split, ...] = ()
    partial: str | None = None

    @property
    def split(self) -> Split | None:
        """How the tensor axis cuts a parameter."""
        return next((split for split in self.splits if split.mesh_axis == "tensor"), None)

    def __add__(self, other: "Shaped") -> "Shaped":
        return self._combine(other, "added")

    def __mul__(self, other: "Shaped") -> "Shaped":
        return self._combine(other, "multiplied")

    def _combine(self, other: "Shaped", word: str) -> "Shaped":
        if self.shape != other.shape:
            raise Disagreement("IR008", f"{list(self.shape)} and {list(other.shape)} are {word}")
        if (self.sharded, self.spread) != (other.sharded, other.spread):
            raise Disagreement("IR009", f"a value {place(self)} and one {place(other)} are {word}")
        other.plain()
        return self.plain()

    def plain(self) -> "Shaped":
        """This value, where every use of it must be the same on all ranks: it may not have entered a mesh axis."""
        if self.entered is not None:
            raise Disagreement(
                "IR009",
                f"a value that entered `{self.entered}` is used where all ranks compute the same: "
                "its gradient would be counted once a rank",
            )
        return self


def place(value: Shaped) -> str:
    if value.spread:
        return f"spread over the tokens of `{value.spread}`"
    return f"sharded over `{value.sharded}`" if value.sharded else "that all ranks hold"


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What the ranks of a mesh axis exchange in one operation. elements: of the whole tensor, on one rank."""

    kind: CollectiveKind
    mesh_axis: str
    elements: int
    backward: bool = False


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One operation of a forward. flops: all query-key pairs. causal_flops: those that the mask shows.

    collectives: of the forward and of the backward.
    """

    segment: str
    path: str
    op: str
    flops: int = 0
    causal_flops: int = 0
    collectives: tuple[Collective, ...] = ()


def read(param: Shaped, x: Shaped) -> None:
    """A parameter that meets tokens of which each rank has others has a gradient that is summed; any other has not."""
    if param.partial != x.spread and param.split is None:
        raise Disagreement("IR009", f"a parameter partial over {param.partial} meets a value {place(x)}")

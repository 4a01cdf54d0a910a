"""Blocks: frozen values that say what a layer computes, once for every interpreter."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from archwright.compiler.ir.param import Axis, Param


@dataclass(frozen=True, kw_only=True)
class State:
    """A tensor that a block keeps between the steps of a generation.

    axes: "batch" and "positions" are sized by whoever allocates; `sizes` gives the others and has 0 there.
    growth: linear = one row a token.
    """

    axes: tuple[Axis | Literal["batch"], ...]
    sizes: tuple[int, ...]
    growth: Literal["linear"] = "linear"


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A mesh axis where values that its ranks all hold meet values that they hold parts of.

    tokens: outside, each rank holds a piece of the sequence only (sequence parallelism, Korthikanti et al. 2022):
    entering gathers the pieces and reducing leaves each rank its own, where otherwise nothing and the whole sum are.
    outer: a second mesh axis that is joined to the first: the ranks of both compute parts, and one sum runs over all.
    The experts of a deployment are such parts, cut over `tensor` inside and spread over `expert`.

            outside              inside                  outside
            every rank: all  ──▶  parts of channels  ──▶  every rank: the sum          tokens=False
            a piece each  ─gather▶ parts of channels ─reduce-scatter▶ a piece each     tokens=True
    """

    mesh_axis: str
    tokens: bool = False
    outer: str | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes whose ranks compute parts, outermost first."""
        return (self.mesh_axis,) if self.outer is None else (self.outer, self.mesh_axis)

    @property
    def group(self) -> str:
        """A name for these ranks: that of the axis, or `expert+tensor`."""
        return "+".join(self.axes)

    def __str__(self) -> str:
        return f"{self.group} tokens" if self.tokens else self.group


def child(path: str) -> Any:
    """A child whose canonical name is `path` from the root, not its parent's path plus the field's name."""
    return field(metadata={"path": path})


@dataclass(frozen=True, kw_only=True)
class Block:
    """A layer as a value: its fields are parameters, child blocks and plain numbers; equal layers are equal values.

    enter: written by `partition`: the mesh axis over which this block's ranks compute different parts of the same
    input. The gradient of that input is summed over the axis.
    num_entering: how many of the values that the block is called with, from the first, enter.
    """

    num_entering: ClassVar[int] = 1

    enter: Boundary | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """forward(ops, m, x, ...): the mathematics, with `m` the interpreter's instance of this block."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def state(self) -> dict[str, State]:
        """Tensors that outlive a step, by name."""
        return {}

    def params(self) -> dict[str, Param]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Param)}

    def children(self) -> dict[str, "Block"]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Block)}

    def child_path(self, name: str, path: str) -> str:
        """Canonical path of the child `name` of this block at `path`."""
        absolute: str | None = next(f.metadata.get("path") for f in fields(self) if f.name == name)
        return absolute or (f"{path}.{name}" if path else name)

"""Programs: a list of segments that together map token ids to logits or to a loss."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from archwright.compiler.ir.block import Block, State
from archwright.compiler.ir.ops import Ops, Step
from archwright.compiler.ir.param import Param


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A block that a pipeline stage may end after. path: its canonical name, Hugging Face's where there is one."""

    path: str
    block: Block


@dataclass(frozen=True, kw_only=True)
class Site:
    """A parameter at its place. name: the canonical name of the tensor; owner: whether this place owns it."""

    name: str
    param: Param
    owner: bool


@dataclass(frozen=True, kw_only=True)
class Program:
    """Embedding, layers, head. A pipeline stage is a slice of the segments and itself a Program."""

    segments: tuple[Segment, ...]
    vocab_size: int
    max_positions: int

    def run(self, bind: Callable[[Segment], Callable[..., Any]], x: Any, step: Step[Any], penalty_B: Any = None) -> Any:
        """Apply the segments in order; `bind` gives the interpreter's instance of each.

        A layer gives x, or (x, penalty_B) where it has a router and the step has targets. The sum of the penalties goes
        to the final segment, whose path is empty. A pipeline stage without it gives (x, penalty_B) on as soon as there
        is a penalty, and the next one takes both.
        """
        for segment in self.segments:
            if not segment.path and penalty_B is not None:
                return bind(segment)(x, step, penalty_B)
            x = bind(segment)(x, step)
            if segment.path and isinstance(x, tuple):
                x, own_B = cast(tuple[Any, Any], x)
                penalty_B = own_B if penalty_B is None else penalty_B + own_B
        return x if penalty_B is None else (x, penalty_B)

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """Every block with its canonical path, parents first."""

        def visit(path: str, block: Block) -> Iterator[tuple[str, Block]]:
            yield path, block
            for name, sub in block.children().items():
                yield from visit(block.child_path(name, path), sub)

        for segment in self.segments:
            yield from visit(segment.path, segment.block)

    def sites(self) -> dict[str, Site]:
        """Every place where a parameter is read: "path.name" → Site. Shared ones carry the name of their owner."""
        owners: dict[str, str] = {}
        sites: dict[str, Site] = {}
        for path, block in self.blocks():
            for name, param in block.params().items():
                place = f"{path}.{name}" if path else name
                owner = place if param.share is None else owners.setdefault(param.share, place)
                sites[place] = Site(name=owner, param=param, owner=owner == place)
        return sites

    def params(self) -> dict[str, Param]:
        """Canonical name → parameter, shared ones once."""
        return {place: site.param for place, site in self.sites().items() if site.owner}

    @property
    def hidden_size(self) -> int:
        """Width of what passes between segments."""
        return next(
            size
            for param in self.params().values()
            for size, axis in zip(param.shape, param.axes, strict=True)
            if axis == "embed"
        )

    @property
    def spread(self) -> str | None:
        """The mesh axis whose ranks share the tokens of what passes between segments, if there is one."""
        return next((param.partial for param in self.params().values() if param.partial is not None), None)

    def num_params(self) -> int:
        return sum(param.size for param in self.params().values())

    def states(self) -> dict[str, dict[str, State]]:
        """Path of each block that keeps state → its states, in the order of the layers."""
        return {path: state for path, block in self.blocks() if (state := block.state())}


def instance_of(
    program: Program, ops: Ops[Any], sites: Mapping[str, Site] | None = None
) -> Callable[[Segment], Callable[..., Any]]:
    """The `bind` of the interpreters that need no module objects (NumPy, ONNX, cost).

    sites: of the whole Program where `program` is a stage of it, whose parameters keep their canonical names: alone,
    a head that is tied to the embedding of another stage would own its matrix.
    """
    from archwright.compiler.ir.scope import Instance

    named = program.sites() if sites is None else sites
    return lambda segment: Instance(segment.block, segment.path, ops, named)

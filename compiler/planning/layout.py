"""A model on a mesh, as the planner sees it: the kinds of segments, where they lie, and how large their parameters are.

Equal layers are equal values, so a model of 126 layers is three kinds of segments: what holds for one holds for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from archwright.compiler.blocks import GroupedQueryAttention
from archwright.compiler.ir import Degrees, Param, Plan, Program, Site, Split, Window
from archwright.compiler.passes import TRAINING_TABLE, partition
from archwright.compiler.passes.stages import cut_stages
from archwright.compiler.planning.tracing import SegmentTrace, trace

TABLES = {"vocab", "positions"}


@dataclass(frozen=True, kw_only=True)
class ParamSize:
    """One parameter on a rank. counted: elements of the model's parameter that the rank has before FSDP, without rows
    that only fill a table up. unsharded: stored elements before FSDP. stored: of masters after it.

    cast: whether the computation makes a copy in its dtype. states: tensors of the optimizer. expert: cut over experts.
    """

    name: str
    shape: tuple[int, ...]
    counted: int
    unsharded: int
    stored: int
    cast: bool
    states: int
    expert: bool
    partial: bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """degrees: the mesh. kinds: of each segment of the model, an index into `traces` and `params`.

    stages: see `Plan.stages`. tied: canonical name of the matrix that embedding and head share, if they do. head: it.
    masked: values of attention masks. reshard: whether FSDP frees a layer's weights between forward and backward.
    symmetric: whether tensor ranks exchange tokens by copies between their memories.
    """

    degrees: Degrees
    kinds: tuple[int, ...]
    stages: tuple[tuple[int, int], ...]
    traces: tuple[SegmentTrace, ...]
    params: tuple[tuple[ParamSize, ...], ...]
    tied: str | None
    head: Param
    sequence: int
    masked: int
    reshard: bool = True
    symmetric: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP is applied at all."""
        return self.degrees.shard * self.degrees.data_replicate > 1

    @property
    def gathers_once(self) -> bool:
        """Whether FSDP gathers weights once a step and reduces gradients once: in a pipeline, whose micro-batches
        would otherwise each pay for it."""
        return self.is_sharded and self.degrees.pipeline > 1

    def segments(self, stage: int) -> tuple[int, ...]:
        """Kinds of the segments of a stage, in order."""
        return self.kinds[slice(*self.stages[stage])]

    def stage_params(self, stage: int) -> list[ParamSize]:
        """The parameters of a stage, a shared one once."""
        found: list[ParamSize] = []
        is_first = stage == 0
        for kind in self.segments(stage):
            found += [each for each in self.params[kind] if not (is_first and self._is_copy(kind, each))]
        return found

    def _is_copy(self, kind: int, each: ParamSize) -> bool:
        return kind == self.kinds[-1] and each.name == self.tied

    def rank_stages(self, rank: int) -> range:
        """The stages of a pipeline rank."""
        return range(rank, len(self.stages), self.degrees.pipeline)

    @cached_property
    def groups(self) -> tuple[tuple[ParamSize, ...], ...]:
        """What FSDP gathers at once, for each kind; embedding and head are one group where they share a matrix."""
        first, last = self.kinds[0], self.kinds[-1]
        return tuple(
            tuple(each for each in params if not (self.tied and kind == last and each.name == self.tied))
            if kind == last and self.degrees.pipeline == 1 and first != last
            else params
            for kind, params in enumerate(self.params)
        )


def distinct(program: Program) -> tuple[Program, tuple[int, ...]]:
    """(a Program of one segment of each kind, in order of appearance; the kind of each segment of `program`)."""
    numbers: dict[object, int] = {}
    chosen = []
    for segment in program.segments:
        if segment.block not in numbers:
            numbers[segment.block] = len(numbers)
            chosen.append(segment)
    return replace(program, segments=tuple(chosen)), tuple(numbers[segment.block] for segment in program.segments)


class Layouts:
    """Lays one Program out on one mesh after another; what meshes have in common is worked out once."""

    def __init__(self, program: Program, *, sequence: int, muon: bool) -> None:
        self._program = program
        self._sequence = sequence
        self._muon = muon
        self._few, self._kinds = distinct(program)
        self._stages: dict[int, tuple[tuple[int, int], ...]] = {}
        self._placed: dict[Degrees, _Placed] = {}
        self._masked = _masked(self._few, sequence)

    def at(self, degrees: Degrees) -> Layout:
        """Raises ArchwrightError IR001 where an axis cannot be cut, IR012 where there are fewer layers than stages."""
        number = degrees.pipeline * degrees.stages_per_rank
        if number not in self._stages:
            self._stages[number] = cut_stages(self._program, number)
        placed = self._place(degrees)
        return Layout(
            degrees=degrees,
            kinds=self._kinds,
            stages=self._stages[number],
            traces=placed.traces,
            params=tuple(
                tuple(param_size(site.name, site.param, degrees, muon=self._muon) for site in kind)
                for kind in placed.sites
            ),
            tied=None if placed.head.owner else placed.head.name,
            head=placed.head.param,
            sequence=self._sequence,
            masked=self._masked,
        )

    def _place(self, degrees: Degrees) -> "_Placed":
        inner = Degrees(
            tensor=degrees.tensor, context=degrees.context, expert=degrees.expert, sequence=degrees.sequence,
            ring=degrees.ring,
        )  # fmt: skip
        if inner not in self._placed:
            placed = partition(self._few, inner, TRAINING_TABLE)
            sites = placed.program.sites()
            alone = (replace(placed.program, segments=(segment,)) for segment in placed.program.segments)
            self._placed[inner] = _Placed(
                traces=tuple(trace(placed.local, splits_of(placed), inner, self._sequence)),
                sites=tuple(tuple(sites[place] for place in program.sites()) for program in alone),
                head=sites["lm_head.weight"],
            )
        return self._placed[inner]


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """One segment of each kind, cut over the axes that cut models. sites: the parameters that each reads."""

    traces: tuple[SegmentTrace, ...]
    sites: tuple[tuple[Site, ...], ...]
    head: Site


def _masked(program: Program, sequence: int) -> int:
    """Values of the masks of a forward: S² for each kind of window that hides something; causal ones are none."""
    masks = {block.mask for _, block in program.blocks() if isinstance(block, GroupedQueryAttention)}
    return sum(sequence**2 for mask in masks if isinstance(mask, Window) and mask.size < sequence)


def param_size(name: str, param: Param, degrees: Degrees, *, muon: bool) -> ParamSize:
    """Parts of key/value heads that several ranks use are stored whole by each.

    FSDP cuts the first dim in equal parts, the last of them filled up; a rank that the cut leaves nothing still has
    room for a row. Experts are cut over the ranks that have the same ones.
    """
    cuts = [split for split in param.splits if split.parts == split.degree]
    shape = param.shape
    for split in cuts:
        shape = split.local_shape(shape)
    expert = any(split.mesh_axis == "expert" for split in cuts)
    ranks = degrees.shard // degrees.expert if expert else degrees.shard
    unsharded, rows = prod(shape), shape[:1]
    stored = -(-prod(rows) // ranks) * prod(shape[1:]) if len(shape) < 3 else -(-unsharded // ranks)
    return ParamSize(
        name=name,
        shape=shape,
        counted=min(unsharded, param.size),
        unsharded=unsharded,
        stored=stored,
        cast=not TABLES & set(param.axes),
        states=1 if muon and param.is_projection else 2,
        expert=expert,
        partial=param.partial is not None,
    )


def splits_of(placed: Plan) -> Mapping[str, tuple[Split, ...]]:
    return {name: site.param.splits for name, site in placed.program.sites().items()}

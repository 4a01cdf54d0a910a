"""The pipeline stages of a plan as graphs: which segments each has, and which tensors go in and out.

This is the only place that says it: the exporter declares these tensors, the network check expects them, and what runs
the graphs hands one stage's `hidden` to the next.

    stage 0                     stage 1 .. n-2                 stage n-1
    input_ids ──▶ hidden   ──▶  hidden ──▶ hidden.next    ──▶  hidden ──▶ logits
    each of them also: position_ids, write_index, kv_positions, and past.{layer}.* ──▶ present.{layer}.* of its layers

A last stage may be the head alone, where that is as much work as the layers of the others: it has none of the latter.
A graph cannot have an input and an output of one name, so a stage between two others gives `hidden.next`.
B batch, S sequence, L visible cache positions, D hidden, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from archwright.compiler.interpreters.onnx_dialects import PORTABLE, Dialect, dialect_of
from archwright.compiler.ir import Plan, Program, State
from archwright.compiler.ir.program import Site
from archwright.spec import Spec
from archwright.spec.models import Build, MoeFfn

IDS, HIDDEN, NEXT_HIDDEN, LOGITS, LOGIT_INDEX = "input_ids", "hidden", "hidden.next", "logits", "logit_index"
INDICES: Mapping[str, tuple[str, ...]] = {
    "position_ids": ("batch", "sequence"),
    "write_index": ("batch",),
    "kv_positions": ("positions",),
}
"""int64 inputs of every stage that has layers, with their sizes."""


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """What a build chooses about its graphs, beside precision and capacity.

    logits: `all` gives [B, S, V]; with `last` the input `logit_index` [B] says which token of each row they are wanted
    of, [B, 1, V]. moe: the form of experts, see `interpreters.onnx_moe`. dialect: which operators they are written in,
    and which matrices are one.
    """

    logits: Literal["all", "last"] = "all"
    moe: Literal["dense", "gathered"] = "dense"
    dialect: Dialect = PORTABLE


DEFAULT_OPTIONS = GraphOptions()


def graph_options(build: Build) -> GraphOptions:
    return GraphOptions(logits=build.logits, moe=build.moe.kind, dialect=dialect_of(build))


def gathered_values(spec: Spec) -> int:
    """Weights that graphs of gathered experts copy for each token, in the layer that copies most: three matrices of
    every expert that the token goes through; 0 of other graphs. Ranks that cut them copy their parts."""
    if spec.build.moe.kind != "gathered":
        return 0
    ffns = [run.layer.ffn for run in spec.model.runs]
    sizes = [ffn.experts_per_token * ffn.hidden_size for ffn in ffns if isinstance(ffn, MoeFfn)]
    return 3 * spec.model.hidden_size * max(sizes, default=0)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output of a graph. shape: static sizes, and the names of those that a call decides."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pipeline stage of one rank.

    program: its segments, of local sizes. sites: of the whole Program, whose names its parameters keep. caches:
    (path, state) → `{layer}.{state}`, the layers counted through the whole model. count: stages of the plan.
    """

    number: int
    program: Program
    sites: Mapping[str, Site]
    caches: Mapping[tuple[str, str], str]
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    @property
    def source(self) -> str:
        """The input that its segments begin with."""
        return IDS if self.is_first else HIDDEN

    @property
    def result(self) -> str:
        """The output that they end with."""
        return result_name(self.number, self.count)

    def params(self) -> set[str]:
        """Canonical names of the parameters that it stores; of a matrix that stages share, each has a copy."""
        return {self.sites[place].name for place in self.program.sites()}

    def inputs(self, *, precision: str, capacity: int, options: GraphOptions) -> dict[str, TensorSpec]:
        """In the order in which the graph takes them."""
        tokens, width = ("batch", "sequence"), self.program.hidden_size
        source = TensorSpec(dtype="int64", shape=tokens)
        if not self.is_first:
            source = TensorSpec(dtype=precision, shape=(*tokens, width))
        found = {self.source: source}
        if self.caches:
            found |= {name: TensorSpec(dtype="int64", shape=shape) for name, shape in INDICES.items()}
        if self.takes_index(options):
            found[LOGIT_INDEX] = TensorSpec(dtype="int64", shape=("batch",))
        return found | self._states("past", precision, capacity)

    def outputs(self, *, precision: str, capacity: int, options: GraphOptions) -> dict[str, TensorSpec]:
        """In the order in which the graph gives them; logits are float32 in every precision."""
        result = TensorSpec(dtype=precision, shape=("batch", "sequence", self.program.hidden_size))
        if self.is_last:
            tokens = 1 if self.takes_index(options) else "sequence"
            result = TensorSpec(dtype="float32", shape=("batch", tokens, self.program.vocab_size))
        return {self.result: result} | self._states("present", precision, capacity)

    def takes_index(self, options: GraphOptions) -> bool:
        """Whether it gives the logits of one token a row."""
        return self.is_last and options.logits == "last"

    def _states(self, prefix: str, precision: str, capacity: int) -> dict[str, TensorSpec]:
        states = self.program.states()
        return {
            f"{prefix}.{name}": TensorSpec(dtype=precision, shape=cache_shape(states[path][state], capacity))
            for (path, state), name in self.caches.items()
        }


def result_name(number: int, count: int) -> str:
    """What stage `number` of `count` gives beside its caches."""
    return LOGITS if number == count - 1 else NEXT_HIDDEN if number else HIDDEN


def whole_program(program: Program) -> Stage:
    """A Program that is one stage."""
    return Stage(number=0, program=program, sites=program.sites(), caches=cache_names(program))


def stage_of(plan: Plan, number: int) -> Stage:
    """A stage of a plan as one of its ranks has it."""
    program = plan.local_stage(number)
    paths = program.states().keys()
    return Stage(
        number=number,
        program=program,
        sites=plan.local.sites(),
        caches={key: name for key, name in cache_names(plan.local).items() if key[0] in paths},
        count=len(plan.stages),
    )


def stages_of(plan: Plan) -> tuple[Stage, ...]:
    return tuple(stage_of(plan, number) for number in range(len(plan.stages)))


def cache_names(program: Program) -> dict[tuple[str, str], str]:
    """(path, state) → `{layer}.{state}` of a whole Program: the caches in the order in which graphs have them."""
    return {
        (path, state): f"{layer}.{state}"
        for layer, (path, states) in enumerate(program.states().items())
        for state in states
    }


def cache_shape(state: State, capacity: int) -> tuple[int | str, ...]:
    known: dict[str, int | str] = {"batch": "batch", "positions": capacity}
    return tuple(known.get(axis, size) for axis, size in zip(state.axes, state.sizes, strict=True))

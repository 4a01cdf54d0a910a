"""The values of each segment's forward as a graph: what an operation reads, how large its result is, what it costs.

CostOps knows shapes and placements; this adds which value came from which. An operation that is not named in RULES is
taken for one whose backward needs everything that it read and made, and that nobody recomputes for free.

S sequence, D hidden, N query heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from archwright.compiler.interpreters.cost_ops import Collective, Cost, CostOps, CostScope, Shaped
from archwright.compiler.ir import Degrees, Param, Program, Split, Step


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the backward of an operation needs, of the values that it read and made.

    fusible: elementwise or a row at a time, so that a compiler recomputes its result from what it read for no traffic
    of its own. view: no new memory. eager_wide, eager_narrow: further copies of the result that an uncompiled operation
    keeps, in at least float32 and in the computation's dtype; eager_inputs: whether it then needs its inputs as well.
    compiled_copies: further copies that a compiled layer keeps. row_values: further float32 values a row.
    """

    inputs: bool = True
    output: bool = False
    fusible: bool = False
    view: bool = False
    eager_inputs: bool = True
    eager_wide: int = 0
    eager_narrow: int = 0
    compiled_copies: int = 0
    row_values: int = 0


_DEFAULT = Rule(output=True)
RULES: Mapping[str, Rule] = {
    "linear": Rule(),
    # A row is a head's token: the softmax's logarithm. The product that follows reads a copy.
    "attention": Rule(output=True, compiled_copies=1, row_values=1),
    "embed": Rule(inputs=False),
    "rms_norm": Rule(fusible=True, eager_inputs=False, eager_wide=1, eager_narrow=1, row_values=1),  # the root
    "layer_norm": Rule(fusible=True, eager_inputs=False, eager_wide=1, row_values=2),  # mean and deviation
    "silu": Rule(fusible=True),
    "gelu": Rule(fusible=True),
    "multiply": Rule(fusible=True),
    "add": Rule(inputs=False, fusible=True),
    "rope": Rule(inputs=False, fusible=True),
    "split_heads": Rule(view=True),
    "merge_heads": Rule(view=True),
    "kv_update": Rule(view=True),
    "enter": Rule(view=True),
    "exchange": Rule(inputs=False),
    "input": Rule(inputs=False),
    # Of a mixture of experts.
    "top_k": Rule(inputs=False),
    "scores": Rule(fusible=True, eager_inputs=False, eager_wide=1, row_values=1),  # of the router; a row's sum
    "penalty_scores": Rule(fusible=True, eager_inputs=False, eager_wide=2, row_values=2),  # again, and logsumexp
    "routing_weights": Rule(inputs=False, fusible=True, eager_wide=1),
    "router_penalty": Rule(inputs=False, fusible=True),
    "sum_over_targets": Rule(inputs=False),
    "permute": Rule(inputs=False),
    "expert_linear": Rule(),
    "expert_silu": Rule(),  # of experts that are spread over ranks, which torch.compile does not see into
    "expert_multiply": Rule(),
    "linear_cross_entropy": Rule(inputs=False),  # keeps the gradient of what it read in its place: `memory`
}


def rule_of(op: str) -> Rule:
    return RULES.get(op, _DEFAULT)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A value, for one sequence on one rank. inputs: the nodes that it was made of.

    elements, rows: of the value. weights: elements of the parameters that were read whole. flops, causal_flops: of the
    forward.
    """

    op: str
    path: str
    inputs: tuple[int, ...]
    elements: int
    rows: int
    weights: int = 0
    flops: float = 0
    causal_flops: float = 0


@dataclass(kw_only=True)
class SegmentTrace:
    """The graph of one segment: node 0 is its input, `output` the node that it hands on."""

    nodes: list[Node] = field(default_factory=list[Node])
    collectives: list[Collective] = field(default_factory=list[Collective])
    output: int = 0


@dataclass(frozen=True, kw_only=True)
class Traced(Shaped):
    """A value that knows its node."""

    ops: Any = field(default=None, compare=False, repr=False)
    node: int = field(default=0, compare=False)

    def __add__(self, other: Shaped) -> Shaped:
        return self.ops.record("add", (self, other), super().__add__(other))

    def __mul__(self, other: Shaped) -> Shaped:
        return self.ops.record("multiply", (self, other), super().__mul__(other))


@dataclass(frozen=True, kw_only=True)
class Weight(Shaped):
    """A parameter."""


class TraceOps(CostOps):
    """CostOps that draw the graph of each segment. Shapes are of whole sequences and, in channels, of one rank."""

    def __init__(self, splits: Mapping[str, tuple[Split, ...]], degrees: Degrees) -> None:
        super().__init__(splits)
        self.segments: list[SegmentTrace] = []
        self._degrees = degrees
        self._nested = False

    def begin(self, value: Shaped) -> Traced:
        """Start a segment on `value`."""
        self.segments.append(SegmentTrace())
        return self.new("input", (), value)

    def end(self, value: Any, costs: list[Cost]) -> None:
        segment = self.segments[-1]
        segment.output = value.node if isinstance(value, Traced) else len(segment.nodes) - 1
        share = self._degrees.context
        segment.collectives += [
            replace(each, elements=each.elements // share) for cost in costs for each in cost.collectives
        ]

    def param(self, name: str, param: Param) -> Weight:
        return Weight(**vars(super().param(name, param)))

    def new(self, op: str, inputs: tuple[int, ...], value: Shaped, **costs: Any) -> Traced:
        rows = prod(value.shape[:-1]) // self._share(value)
        width = value.shape[-1] if value.shape else 1
        path = self._paths[-1] if self._paths else ""
        nodes = self.segments[-1].nodes
        nodes.append(Node(op=op, path=path, inputs=inputs, elements=rows * width, rows=rows, **costs))
        return _at(value, self, len(nodes) - 1)

    def _share(self, value: Shaped) -> int:
        """Ranks that hold different tokens of a value."""
        return self._degrees.context * (self._degrees.tensor if value.spread else 1)

    def record(self, op: str, values: tuple[Any, ...], result: Any, costs: tuple[Cost, ...] = ()) -> Any:
        """The result of an operation, or each of several, as nodes."""
        if isinstance(result, tuple):
            spent = [costs, *[()] * (len(result) - 1)]
            return tuple(self.record(op, values, part, cost) for part, cost in zip(result, spent, strict=True))
        if not isinstance(result, Shaped):
            return result
        inputs = tuple(value.node for value in values if isinstance(value, Traced))
        if rule_of(op).view:
            same = isinstance(result, Traced) and not _is_exchanged(values, result)
            return result if same else self.new("exchange", inputs, result)
        share = self._degrees.context
        if op == "attention" and share > 1:
            inputs = (inputs[0], *(self._gathered(value) for value in values[1:3]))
        return self.new(
            op, inputs, result,
            weights=0 if op == "embed" else sum(prod(value.shape) for value in values if isinstance(value, Weight)),
            flops=sum(cost.flops for cost in costs) / share,
            causal_flops=sum(cost.causal_flops for cost in costs) / share,
        )  # fmt: skip

    def routing_weights(self, logits: Any, indices: Any, routing: Any) -> Any:
        result, costs = self._whole("routing_weights", (logits, indices, routing), {})
        return self.record("routing_weights", (self.record("scores", (logits,), logits),), result, costs)

    def router_penalty(self, logits: Any, *values: Any, **named: Any) -> Any:
        result, costs = self._whole("router_penalty", (logits, *values), named)
        return self.record("router_penalty", (self.record("penalty_scores", (logits,), logits),), result, costs)

    def experts(self, x: Any, weights: Any, indices: Any, gate: Any, up: Any, down: Any, **named: Any) -> Any:
        """A SwiGLU over a row for each token and each of its experts: S · X rows, of which the backward of the weighted
        sum needs the results besides.

        With the experts spread over ranks a rank gets as many rows as it sends, if they are evenly used.
        """
        result, costs = self._whole("experts", (x, weights, indices, gate, up, down), named)
        third = tuple(replace(cost, flops=cost.flops // 3, causal_flops=cost.causal_flops // 3) for cost in costs)
        rows = Shaped(shape=(*indices.shape, x.shape[-1]))
        inner = replace(rows, shape=(*indices.shape, gate.shape[1]))
        sorted_ = self.record("permute", (x,), rows)
        silu, multiply = ("silu", "multiply") if self._degrees.expert == 1 else ("expert_silu", "expert_multiply")
        gated = self.record(silu, (self.record("expert_linear", (sorted_, gate), inner, third),), inner)
        product = self.record(multiply, (gated, self.record("expert_linear", (sorted_, up), inner, third)), inner)
        back = self.record("permute", (self.record("expert_linear", (product, down), rows, third),), rows)
        return self.record("multiply", (back, weights), result)

    def _gathered(self, value: Traced) -> int:
        """Keys or values of a whole sequence, of which context ranks have pieces.

        A ring sends as much, and once more in the backward. What it hides behind attention is not taken off.
        """
        rows = prod(value.shape[:-1])
        elements = rows * value.shape[-1]
        segment = self.segments[-1]
        ring = self._degrees.ring
        gather = Collective(kind="all_gather", mesh_axis="context", elements=elements)
        again = [replace(gather, backward=True)] if ring else []
        segment.collectives += [gather, *again, replace(gather, kind="reduce_scatter", backward=True)]
        if ring:
            return value.node
        segment.nodes.append(
            Node(op="exchange", path=self._paths[-1], inputs=(value.node,), elements=elements, rows=rows)
        )
        return len(segment.nodes) - 1

    def traced(self, op: str, method: Callable[..., Any], values: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run an operation and record it; the operations that it is made of are not recorded."""
        if self._nested:
            return method(self, *values, **named)
        result, costs = self._whole(op, values, named)
        return self.record(op, (*values, *named.values()), result, costs)

    def _whole(self, op: str, values: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, tuple[Cost, ...]]:
        """(the result of an operation, what it and the operations that it is made of cost); none of them recorded."""
        self._nested, before = True, len(self.costs)
        try:
            result = getattr(CostOps, op)(self, *values, **named)
        finally:
            self._nested = False
        return result, tuple(self.costs[before:])


def _at(value: Shaped, ops: TraceOps, node: int) -> Traced:
    if isinstance(value, Traced):
        return replace(value, ops=ops, node=node)
    return Traced(**vars(value), ops=ops, node=node)


def _is_exchanged(values: tuple[Any, ...], result: Shaped) -> bool:
    """Whether ranks that held different tokens now hold all of them."""
    return any(isinstance(value, Traced) and value.spread != result.spread for value in values[:1])


def _wrap(op: str) -> None:
    method = getattr(CostOps, op)

    def call(self: TraceOps, *values: Any, **named: Any) -> Any:
        return self.traced(op, method, values, named)

    setattr(TraceOps, op, call)


for _name in dir(CostOps):
    if callable(getattr(CostOps, _name)) and not _name.startswith("_") and _name not in ("scope", *vars(TraceOps)):
        _wrap(_name)


def trace(
    program: Program, splits: Mapping[str, tuple[Split, ...]], degrees: Degrees, sequence: int
) -> list[SegmentTrace]:
    """One graph a segment, of a training forward over one sequence, for a rank of `degrees`.

    program: of local sizes, beginning with the embedding. splits: canonical name → how the parameter is cut.
    """
    ops = TraceOps(splits, degrees)
    tokens_BS = Shaped(shape=(1, sequence))
    step = Step[Shaped](positions_BS=tokens_BS, targets_BS=tokens_BS)
    sites = program.sites()
    x: Any = tokens_BS
    penalties: tuple[Any, ...] = ()  # what routers add to the loss; the last segment takes it
    for index, segment in enumerate(program.segments):
        before = len(ops.costs)
        x = ops.begin(x)
        if index == 0:
            x = tokens_BS
        x = CostScope(segment.block, segment.path, ops, sites)(x, step, *(() if segment.path else penalties))
        if segment.path and isinstance(x, tuple):
            x, *own = x
            penalties = tuple(Shaped(shape=each.shape) for each in own if each is not None) or penalties
        ops.end(x, ops.costs[before:])
    return ops.segments

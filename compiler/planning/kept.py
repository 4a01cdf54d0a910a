"""What a segment's forward keeps for its backward, and what the backward computes again.

e bytes a value of the computation, w = max(4, e) where the mathematics is at least float32.

    eager      every value that a backward reads (autograd's saved tensors), and the copies that a norm makes
    compiled   the cheapest set of values from which the others can be made again by elementwise work alone: a minimum
               cut, as torch.compile's partitioner chooses. It makes nothing again that a product of the backward reads
               whole (to be read, it would have to be written). For a Llama layer: the input, both norms' outputs and
               o_proj's (4·D), q, k, v, attention's output and its copy (3·N·H + 2·K·H), gate, up and their product
               (3·F), and roots and logarithms of rows: e·(4D + 3NH + 2KH + 3F) + w·(N + 2) a token
    full       the layer's input (Chen et al. 2016); everything else is computed again
    selective  the input, and the outputs of the operations that are named; everything else is computed again

B sequences, D hidden, F feed-forward, N query heads, K key/value heads, H head_dim.
"""

from dataclasses import dataclass

from archwright.compiler.planning.min_cut import cheapest_cut
from archwright.compiler.planning.tracing import Node, SegmentTrace, rule_of
from archwright.spec.models import Recompute


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Of one sequence on one rank. peak_bytes: while the backward of this segment runs, beside `kept_bytes`.

    again: the nodes that the backward computes again.
    """

    kept_bytes: int
    peak_bytes: int
    again: tuple[int, ...] = ()


def kept(trace: SegmentTrace, recompute: Recompute, *, compiled: bool, compute_bytes: int) -> Kept:
    """Of a layer. The first and the last segment keep what `everything` says, without recomputing."""
    everything = _cut_bytes(trace, compute_bytes) if compiled else eager_bytes(trace, compute_bytes)
    if recompute.kind == "none":
        return Kept(kept_bytes=everything, peak_bytes=0)
    named = set(recompute.keep) if recompute.kind == "selective" else set[str]()
    chosen = [index for index, node in enumerate(trace.nodes) if node.op in named]
    if compiled:
        needed = _needed(trace, eager=False)
        chosen = [index for index in chosen if _is_of_use(trace.nodes, index, needed)]
    kept_bytes = (trace.nodes[0].elements + sum(trace.nodes[index].elements for index in chosen)) * compute_bytes
    kept_bytes += sum(_row_bytes(trace.nodes[index], compute_bytes) for index in chosen)
    again = tuple(
        index for index, node in enumerate(trace.nodes) if node.op not in named and node.op not in ("input", "embed")
    )
    return Kept(kept_bytes=kept_bytes, peak_bytes=max(0, everything - kept_bytes), again=again)


def eager_bytes(trace: SegmentTrace, compute_bytes: int) -> int:
    """Bytes that autograd saves for one sequence, without parameters, integers, and what the loss forms."""
    wide = max(4, compute_bytes)
    total = compute_bytes * sum(trace.nodes[index].elements for index in _needed(trace, eager=True))
    for node in trace.nodes:
        rule = rule_of(node.op)
        total += node.elements * (rule.eager_wide * wide + rule.eager_narrow * compute_bytes)
        total += _row_bytes(node, compute_bytes)
    # The loss keeps the gradient of its input in that input's place.
    read = {node.inputs[0] for node in trace.nodes if node.op == "linear_cross_entropy"}
    return total + compute_bytes * sum(trace.nodes[index].elements for index in read)


def _cut_bytes(trace: SegmentTrace, compute_bytes: int) -> int:
    nodes = trace.nodes
    fixed = {index for index, node in enumerate(nodes) if not rule_of(node.op).fusible}
    for node in nodes:
        rule = rule_of(node.op)
        if rule.inputs and not rule.fusible:
            fixed |= set(node.inputs)
    chosen = cheapest_cut(
        [node.inputs for node in nodes], [node.elements for node in nodes], fixed, _needed(trace, eager=False)
    )
    elements = sum(nodes[index].elements * (1 + rule_of(nodes[index].op).compiled_copies) for index in chosen)
    return compute_bytes * elements + sum(_row_bytes(node, compute_bytes) for node in nodes)


def _row_bytes(node: Node, compute_bytes: int) -> int:
    return rule_of(node.op).row_values * node.rows * max(4, compute_bytes)


def _needed(trace: SegmentTrace, *, eager: bool) -> set[int]:
    """The nodes that backwards read."""
    needed: set[int] = set()
    for index, node in enumerate(trace.nodes):
        rule = rule_of(node.op)
        if rule.inputs and (rule.eager_inputs or not eager):
            needed |= set(node.inputs)
        if rule.output:
            needed.add(index)
    return needed


def _is_of_use(nodes: list[Node], start: int, needed: set[int]) -> bool:
    """Whether a node is needed, or something that is made of it."""
    descendants = {start}
    for index in range(start + 1, len(nodes)):
        if descendants & set(nodes[index].inputs):
            descendants.add(index)
    return bool(descendants & needed)

"""The order of a compiled layer's graph where tokens travel by copies (symmetric.py): a copy starts as soon as what it
carries is there, and products that nothing waits for, gradients of weights, follow it before its result is read.
"""

from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from archwright.compiler.distributed.symmetric import FETCH, GATHER, WAIT

_PRODUCT = torch.ops.aten.mm.default
_FLOPS_PER_BYTE = 2000
"""What an H100 computes while its links bring a byte: 700 TFLOP/s beside 350 GB/s, in whole products."""


class EarlyCopies(CustomGraphPass):
    """Order a graph of torch.compile: what the next copy carries, the copy, as many of the products that it overtook as
    take its time, what reads its result."""

    def __call__(self, graph: Graph) -> None:
        nodes = list(graph.nodes)
        place = {node: number for number, node in enumerate(nodes)}
        starts = {node for node in nodes if node.target in (GATHER, FETCH)}
        order = dict.fromkeys(node for node in nodes if node.op == "placeholder")

        def emit(wanted: Node) -> None:
            for node in sorted(_missing(wanted, order), key=place.__getitem__):
                if node.target == WAIT and node.args[0] in starts:
                    fill(node.args[0])
                order.setdefault(node)

        def fill(start: Any) -> None:
            flops = _FLOPS_PER_BYTE * _numel(start) * start.meta["val"].element_size()
            for node in nodes[: place[start]]:
                if flops > 0 and node.target == _PRODUCT and node not in order:
                    emit(node)
                    flops -= 2 * _numel(node) * _sizes(node.args[0])[1]

        for wanted in [*filter(starts.__contains__, nodes), *nodes]:
            if wanted.target != WAIT:
                emit(wanted)
        for before, after in pairwise(order):
            before.append(after)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


COMPILE_OPTIONS = {"post_grad_custom_post_pass": EarlyCopies(), "reorder_for_peak_memory": False}
"""Options of torch.compile that give the order, and that leave it."""


def _missing(wanted: Node, order: dict[Node, None]) -> set[Node]:
    """`wanted` and what it needs, as far as it is not in `order` yet."""
    found, unseen = set[Node](), [wanted]
    while unseen:
        node = unseen.pop()
        if node not in found and node not in order:
            found.add(node)
            unseen.extend(node.all_input_nodes)
    return found


def _sizes(node: Any) -> list[int]:
    """Of a value; those that vary count as they were when the graph was made."""
    return [size if isinstance(size, int) else size.node.hint for size in node.meta["val"].shape]


def _numel(node: Any) -> int:
    return prod(_sizes(node))

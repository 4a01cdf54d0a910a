"""What a segment does: FLOPs, bytes moved, and seconds by roofline, of one micro-batch on one rank.

Each matrix product takes the longer of its arithmetic and its memory traffic (Williams et al. 2009), at the fractions
of the peaks that large products and copies reach; elementwise work takes its traffic. A backward has two products for
each of the forward's.
"""

from dataclasses import dataclass

from archwright.compiler.planning.kept import Kept
from archwright.compiler.planning.layout import Layout
from archwright.compiler.planning.machines import Cluster
from archwright.compiler.planning.tracing import Node, SegmentTrace, rule_of

LOGITS_CHUNK_BYTES, CHUNK_MULTIPLE = 1 << 30, 128
"""Of one chunk's logits in the loss, and of its tokens; equal to `cross_entropy`'s, which needs torch."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a step is computed. sequences: of a micro-batch on a rank. compute_bytes, master_bytes: of a value.

    accumulates: whether gradients are added to those of micro-batches before. context: ranks that share a sequence.
    """

    cluster: Cluster
    sequences: int
    compute_bytes: int
    master_bytes: int
    precision: str
    compiled: bool
    accumulates: bool
    context: int = 1

    @property
    def peak_flops_per_s(self) -> float:
        return self.cluster.gpu.flops_per_s[self.precision]

    @property
    def bytes_per_s(self) -> float:
        return self.cluster.gpu.bandwidth_bytes_per_s * self.cluster.constants["bandwidth_fraction"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """flops: as the hardware does them, of what the mask shows. again_s: part of `backward_s` that recomputes."""

    forward_flops: float
    backward_flops: float
    again_flops: float
    moved_bytes: float
    forward_s: float
    backward_s: float
    again_s: float


def segment_work(layout: Layout, kind: int, kept: Kept, setting: Setting) -> Work:
    """One forward and one backward of a segment, without communication."""
    trace, constants = layout.traces[kind], setting.cluster.constants
    products = [index for index, node in enumerate(trace.nodes) if _is_product(node)]
    forward_s = sum(_product_s(trace, index, setting, 1) for index in products)
    backward_s = sum(_product_s(trace, index, setting, 2) for index in products)
    traffic = _elementwise_bytes(trace, setting) * setting.sequences
    product_bytes = sum(_product_bytes(trace, index, setting) for index in products)
    loss_flops, loss_bytes, loss_s = _loss(layout, trace, setting)
    cast_bytes, gradient_bytes = _weight_bytes(layout, kind, setting)
    again = [index for index in products if index in kept.again]
    again_flops = setting.sequences * sum(trace.nodes[index].causal_flops for index in again)
    again_bytes = traffic + sum(_product_bytes(trace, index, setting) for index in again) if kept.again else 0.0
    again_s = (
        sum(_product_s(trace, index, setting, 1) for index in again) + traffic / setting.bytes_per_s
        if kept.again
        else 0.0
    )
    flops = setting.sequences * sum(trace.nodes[index].causal_flops for index in products)
    back = constants["backward_traffic"]
    return Work(
        forward_flops=flops + loss_flops,
        backward_flops=2 * flops,
        again_flops=again_flops,
        moved_bytes=3 * product_bytes + (1 + back) * traffic + again_bytes + loss_bytes + cast_bytes + gradient_bytes,
        forward_s=forward_s + (traffic + cast_bytes) / setting.bytes_per_s + loss_s,
        backward_s=backward_s + (back * traffic + gradient_bytes) / setting.bytes_per_s + again_s,
        again_s=again_s,
    )


def _is_product(node: Node) -> bool:
    rule = rule_of(node.op)
    return not (rule.fusible or rule.view) and node.op not in ("input", "exchange", "linear_cross_entropy")


def _product_bytes(trace: SegmentTrace, index: int, setting: Setting) -> float:
    node = trace.nodes[index]
    values = node.elements + sum(trace.nodes[each].elements for each in node.inputs)
    return setting.compute_bytes * (setting.sequences * values + node.weights)


def _product_s(trace: SegmentTrace, index: int, setting: Setting, times: int) -> float:
    """times: 1 for a forward, 2 for a backward; attention's has 5 products for 2, since it forms the scores again."""
    node, constants = trace.nodes[index], setting.cluster.constants
    fraction, more = constants["matmul_fraction"], 1.0
    if node.op == "attention":
        fraction = constants["attention_fraction" if times == 1 else "attention_backward_fraction"]
        fraction *= constants["context_attention"] if setting.context > 1 else 1
        more = 1 if times == 1 else 5 / 4
    elif node.op == "expert_linear":
        fraction = constants["grouped_fraction"]
    flops_s = more * setting.sequences * node.causal_flops / (setting.peak_flops_per_s * fraction)
    bytes_s = _product_bytes(trace, index, setting) / setting.bytes_per_s
    return times * max(flops_s, bytes_s, constants["launch_s"])


def _elementwise_bytes(trace: SegmentTrace, setting: Setting) -> float:
    """Of a forward, for one sequence.

    Compiled: what fused operations read of products and write for products; what lies between stays in registers.
    """
    nodes, size = trace.nodes, setting.compute_bytes
    fusible = [index for index, node in enumerate(nodes) if rule_of(node.op).fusible]
    if not setting.compiled:
        passes = setting.cluster.constants["eager_passes"]
        return passes * size * sum(nodes[i].elements + sum(nodes[j].elements for j in nodes[i].inputs) for i in fusible)
    reads = {origin for index in fusible for origin in nodes[index].inputs if origin not in fusible}
    used = {origin for index, node in enumerate(nodes) if index not in fusible for origin in node.inputs}
    sums = {index for index in fusible if nodes[index].op == "add"}  # the residual stream is read again further on
    copied = sum(2 * rule_of(node.op).compiled_copies * node.elements for node in nodes)
    writes = [index for index in fusible if index in used or index in sums or index == trace.output]
    return size * (sum(nodes[i].elements for i in reads) + sum(nodes[i].elements for i in writes) +
                   sum(nodes[i].elements for i in sums) + copied)  # fmt: skip


def loss_chunk(layout: Layout, compute_bytes: int, tokens: int) -> int:
    """Tokens whose logits exist at a time, on a GPU."""
    fitting = LOGITS_CHUNK_BYTES // (local_head(layout)[0] * compute_bytes)
    return min(tokens, max(1, fitting // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)


def local_head(layout: Layout) -> tuple[int, int]:
    """Rows and columns of the head on a rank, before FSDP."""
    shape = layout.head.shape
    for split in layout.head.splits:
        shape = split.local_shape(shape)
    return shape[0], shape[1]


def _loss(layout: Layout, trace: SegmentTrace, setting: Setting) -> tuple[float, float, float]:
    """(FLOPs, bytes, seconds) of the loss and its gradients, all in the forward: three products.

    Of each logit, e bytes written by the product, read by two kernels, its gradient written and read by two products:
    6e. Of each value of the head, for each chunk: read by two products 2e, its gradient's sum read and written 2w.
    What products read and write is in their time. The kernels move 3e and take exponentials (`loss_passes`); the head's
    gradient is zeroed, and its copy made.
    """
    losses = [node for node in trace.nodes if node.op == "linear_cross_entropy" and node.flops]
    if not losses:
        return 0.0, 0.0, 0.0
    e, w = setting.compute_bytes, max(4, setting.compute_bytes)
    tokens = setting.sequences * layout.sequence // layout.degrees.context
    rows, columns = local_head(layout)
    chunks = -(-tokens // loss_chunk(layout, e, tokens))
    moved = tokens * rows * 6 * e + chunks * rows * columns * (2 * e + 2 * w)
    flops = 3 * setting.sequences * losses[0].flops
    passes = setting.cluster.constants["loss_passes"]
    between = tokens * rows * passes * e + rows * columns * (w + (0 if layout.is_sharded or e == w else e + w))
    product_s = flops / (setting.peak_flops_per_s * setting.cluster.constants["matmul_fraction"])
    return flops, moved, product_s + between / setting.bytes_per_s


def _weight_bytes(layout: Layout, kind: int, setting: Setting) -> tuple[float, float]:
    """(forward, backward): masters cast to the computation's dtype; gradients widened, and added to earlier ones.

    With FSDP: gathered weights copied to their places in the forward and again in the backward, gradients copied to the
    buffer that is reduced.
    """
    e, w = setting.compute_bytes, setting.master_bytes
    unsharded = sum(each.unsharded for each in layout.groups[kind])
    if layout.is_sharded:
        return 2 * e * unsharded, (3 * e + w) * unsharded
    cast = sum(each.unsharded for each in layout.params[kind] if each.cast) if e != w else 0
    widen = e + w if e != w else 0
    return (w + e) * cast, (widen + (3 * w if setting.accumulates else 0)) * unsharded

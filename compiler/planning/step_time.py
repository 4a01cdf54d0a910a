"""How long a training step takes: work and communication of each stage, the pipeline's schedule, the optimizer.

In a pipeline FSDP gathers a stage in its first forward and reduces in its last backward; otherwise every micro-batch
does both. What overlaps: FSDP gathers the next layer's weights and reduces the last one's gradients while a layer
computes (prefetch of one); what is longer than the computation beside it is exposed, and so are the first gather and
the last reduction. What is hidden takes multiprocessors and bandwidth from the computation, in proportion to its bytes:
`overlap_cost` of the time in which a link inside a node would carry them. Collectives of the axes `tensor`, `context`
and `expert` stand between operations and overlap nothing, but for gradients that tensor ranks add up by copies:
compiled layers go on with the gradients of their weights, and copy engines take no multiprocessor from them. Hand-offs
between stages delay the receiver only.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from archwright.compiler.planning.kept import Kept
from archwright.compiler.planning.layout import Layout, ParamSize
from archwright.compiler.planning.rings import (
    Group,
    collective_s,
    copied_s,
    groups,
    link_bytes_per_s,
    send_s,
    sent_bytes,
)
from archwright.compiler.planning.schedule import Task, alive, orders, simulate
from archwright.compiler.planning.work import Setting, Work, segment_work

_MOST_MICRO_BATCHES = 8
"""Times `pipeline` that are simulated; each one more takes as long as the slowest rank needs for it."""


@dataclass(kw_only=True)
class Exchange:
    """Of one axis, on one rank, in a step. total_s: by itself; exposed_s: what nothing overlaps."""

    bytes: float = 0
    total_s: float = 0
    exposed_s: float = 0

    def add(self, times: float, bytes_: float, total_s: float, exposed_s: float) -> None:
        self.bytes += times * bytes_
        self.total_s += times * total_s
        self.exposed_s += times * exposed_s


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Of one micro-batch. exchanges: by axis. once_s, once: what a step does once."""

    forward_s: float
    backward_s: float
    work: tuple[Work, ...]
    exchanges: Mapping[str, Exchange]
    once_s: float
    once: Mapping[str, Exchange]

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """step_s: expected. bubble: part of the pipeline's time in which the busiest rank waits.

    exchanges: by axis, of the rank that communicates most on it. tasks: the simulated schedule.
    """

    step_s: float
    pipeline_s: float
    optimizer_s: float
    bubble: float
    exchanges: Mapping[str, Exchange]
    stages: tuple[StageTime, ...]
    tasks: tuple[Task, ...] = field(repr=False, default=())


def step_time(
    layout: Layout, kept: tuple[Kept, ...], setting: Setting, *, micro_batches: int, schedule: str, muon: bool
) -> StepTime:
    degrees, cluster = layout.degrees, setting.cluster
    works = [segment_work(layout, kind, kept[kind], setting) for kind in range(len(layout.traces))]
    times: dict[tuple[int, ...], StageTime] = {}  # stages of the same kinds take the same time
    for stage in range(len(layout.stages)):
        kinds = layout.segments(stage)
        if kinds not in times:
            times[kinds] = _stage_time(layout, kinds, works, kept, setting)
    stages = [times[layout.segments(stage)] for stage in range(len(layout.stages))]
    group = groups(degrees)["pipeline"]
    hand_off = _hand_off_bytes(layout, setting)
    simulated = min(micro_batches, _MOST_MICRO_BATCHES * degrees.pipeline)
    plans = orders(schedule, degrees.pipeline, simulated, degrees.stages_per_rank)
    delay_s = send_s(hand_off, group, cluster)
    tasks = simulate(plans, [each.forward_s for each in stages], [each.backward_s for each in stages], delay_s)
    busy = [sum(stages[stage].total_s for stage in layout.rank_stages(rank)) for rank in range(degrees.pipeline)]
    makespan = max(task.stop_s for task in tasks) + max(
        sum(stages[stage].once_s for stage in layout.rank_stages(rank)) for rank in range(degrees.pipeline)
    )
    pipeline_s = makespan + (micro_batches - simulated) * max(busy)
    exchanges = _exchanges(layout, stages, micro_batches)
    if degrees.pipeline > 1:
        exchanges["pipeline"].add(2 * micro_batches * degrees.stages_per_rank, hand_off, delay_s, 0)
    optimizer_s = _once_a_step(layout, setting, exchanges, muon=muon)
    return StepTime(
        step_s=pipeline_s + optimizer_s + cluster.constants["step_overhead_s"],
        pipeline_s=pipeline_s,
        optimizer_s=optimizer_s,
        bubble=1 - micro_batches * max(busy) / pipeline_s,
        exchanges=exchanges,
        stages=tuple(stages),
        tasks=tuple(tasks),
    )


def _stage_time(
    layout: Layout, kinds: tuple[int, ...], works: list[Work], kept: tuple[Kept, ...], setting: Setting
) -> StageTime:
    exchanges: dict[str, Exchange] = defaultdict(Exchange)
    forward = [works[kind].forward_s + _blocking(layout, kind, setting, exchanges, "forward") for kind in kinds]
    backward = [works[kind].backward_s + _blocking(layout, kind, setting, exchanges, "backward") for kind in kinds]
    for position, kind in enumerate(kinds):
        if kept[kind].again:  # what is computed again is exchanged again
            backward[position] += _blocking(layout, kind, setting, exchanges, "again", kept[kind])
    forward_s, backward_s, once_s = sum(forward), sum(backward), 0.0
    once: dict[str, Exchange] = defaultdict(Exchange)
    if layout.is_sharded:
        found = once if layout.gathers_once else exchanges
        more = _sharding(layout, kinds, forward, backward, setting, found)
        if layout.gathers_once:
            once_s = sum(more)
        else:
            forward_s, backward_s = forward_s + more[0], backward_s + more[1]
    return StageTime(
        forward_s=forward_s, backward_s=backward_s, work=tuple(works[kind] for kind in kinds), exchanges=exchanges,
        once_s=once_s, once=once,
    )  # fmt: skip


def _blocking(
    layout: Layout, kind: int, setting: Setting, exchanges: dict[str, Exchange], direction: str,
    kept: Kept | None = None,
) -> float:  # fmt: skip
    """Seconds of the collectives inside a segment.

    direction: forward, backward, or again: those of a forward that is repeated. Where products are kept, so are the
    sums of them over ranks. Pieces of a sequence are not its first dim, so that a copy puts them together or apart;
    those of context ranks, another one in the order of positions.
    """
    total_s, found = 0.0, groups(layout.degrees)
    trace = layout.traces[kind]
    sums_again = kept is not None and any(trace.nodes[index].op == "linear" for index in kept.again)
    for each in trace.collectives:
        if direction == "again" and each.kind != "all_gather" and not sums_again:
            continue
        if each.backward == (direction == "backward"):
            group, size = found[each.mesh_axis], each.elements * setting.sequences * setting.compute_bytes
            copied = layout.symmetric and each.mesh_axis == "tensor" and each.kind in ("all_gather", "reduce_scatter")
            seconds = (copied_s if copied else collective_s)(each.kind, size, group, setting.cluster)
            hidden = copied and setting.compiled and each.backward and each.kind == "reduce_scatter"
            exposed = 0.0 if hidden else seconds
            exchanges[each.mesh_axis].add(1, sent_bytes(each.kind, size, group.degree), seconds, exposed)
            copies = 0 if each.kind not in ("all_gather", "reduce_scatter") else 1 + (each.mesh_axis == "context")
            total_s += exposed + copies * 2 * size / setting.bytes_per_s
    return total_s


@dataclass(kw_only=True)
class _Sharded:
    """Of one segment under FSDP: its gather and its reduction, each by itself, and what they send."""

    gather_s: float = 0
    reduce_s: float = 0
    gather_bytes: float = 0
    reduce_bytes: float = 0


def _sharding(
    layout: Layout, kinds: tuple[int, ...], forward: list[float], backward: list[float], setting: Setting,
    exchanges: dict[str, Exchange],
) -> tuple[float, float]:  # fmt: skip
    """Exposed seconds of FSDP in forward and backward.

    Forward: the gather of segment i + 1 runs beside segment i. Backward, from the last segment: beside segment i run
    the gather of i - 1 (not of the head and the embedding, which are kept, nor without `reshard`) and the reduction of
    i + 1.
    """
    ends, nothing = {layout.kinds[0], layout.kinds[-1]}, _Sharded()
    repeats = [kind not in ends and layout.reshard and not layout.gathers_once for kind in kinds]
    found = [
        _gather_and_reduce(layout.groups[kind], layout, setting, exchanges, again=again)
        for kind, again in zip(kinds, repeats, strict=True)
    ]
    cost_s = setting.cluster.constants["overlap_cost"] / link_bytes_per_s(setting.cluster)
    ahead, behind = [*found[1:], nothing], [*found[1:], nothing]
    before = [each if again else nothing for each, again in zip([nothing, *found], [False, *repeats], strict=True)]
    exposed_forward, exposed_backward = found[0].gather_s, found[0].reduce_s
    for i in range(len(kinds)):
        exposed_forward += max(ahead[i].gather_s - forward[i], cost_s * ahead[i].gather_bytes)
        beside_s = before[i].gather_s + behind[i].reduce_s
        exposed_backward += max(beside_s - backward[i], cost_s * (before[i].gather_bytes + behind[i].reduce_bytes))
    exchanges["data_shard"].exposed_s += exposed_forward + exposed_backward
    return exposed_forward, exposed_backward


def _gather_and_reduce(
    params: tuple[ParamSize, ...], layout: Layout, setting: Setting, exchanges: dict[str, Exchange], *, again: bool
) -> _Sharded:
    """An all-gather in the computation's dtype, and a reduce-scatter in float32 or wider; copies over `data_replicate`
    then add up what they have of the result."""
    groups_, cluster, wide = groups(layout.degrees), setting.cluster, setting.master_bytes
    found = _Sharded()
    for name, is_expert in (("shard", False), ("expert_shard", True)):
        size = sum(each.unsharded for each in params if each.expert == is_expert)
        if not size:
            continue
        group = groups_[name]
        narrow, copies = size * setting.compute_bytes, groups_["data_replicate"]
        for kind, bytes_, ranks, times in (
            ("all_gather", narrow, group, 2 if again else 1),
            ("reduce_scatter", size * wide, group, 1),
            ("all_reduce", size * wide / group.degree, copies, 1),
        ):
            seconds, sent = collective_s(kind, bytes_, ranks, cluster), sent_bytes(kind, bytes_, ranks.degree)
            exchanges[ranks.axis].add(times, sent, seconds, 0)
            if kind == "all_gather":
                found.gather_s, found.gather_bytes = found.gather_s + seconds, found.gather_bytes + sent
            else:
                found.reduce_s, found.reduce_bytes = found.reduce_s + seconds, found.reduce_bytes + sent
    return found


def _hand_off_bytes(layout: Layout, setting: Setting) -> float:
    """[b, S / (context · tensor where tokens are spread), D] in the computation's dtype: what a layer hands on."""
    layer = layout.traces[layout.kinds[1]]
    return layer.nodes[layer.output].elements * setting.sequences * setting.compute_bytes


def _exchanges(layout: Layout, stages: list[StageTime], micro_batches: int) -> dict[str, Exchange]:
    result: dict[str, Exchange] = defaultdict(Exchange)
    for rank in range(layout.degrees.pipeline):
        mine: dict[str, Exchange] = defaultdict(Exchange)
        for stage in layout.rank_stages(rank):
            for axis, each in stages[stage].exchanges.items():
                mine[axis].add(micro_batches, each.bytes, each.total_s, each.exposed_s)
            for axis, each in stages[stage].once.items():
                mine[axis].add(1, each.bytes, each.total_s, each.exposed_s)
        for axis, each in mine.items():
            if each.bytes >= result[axis].bytes:
                result[axis] = each
    return result


def _once_a_step(layout: Layout, setting: Setting, exchanges: dict[str, Exchange], *, muon: bool) -> float:
    """Optimizer pass; gradients of parameters that tensor ranks read in pieces, and of a matrix that stages share."""
    found, cluster, wide = groups(layout.degrees), setting.cluster, setting.master_bytes
    stages = range(len(layout.stages))
    per_rank = [
        [each for stage in layout.rank_stages(rank) for each in layout.stage_params(stage)]
        for rank in range(layout.degrees.pipeline)
    ]
    stored = max(sum(each.stored for each in params) for params in per_rank)
    seconds = stored * cluster.constants["optimizer_bytes"] * wide / 4 / setting.bytes_per_s
    partial = max(sum(each.stored for each in params if each.partial) for params in per_rank) * wide
    if partial:
        partial_s = collective_s("all_reduce", partial, found["tensor"], cluster)
        exchanges["tensor"].add(1, sent_bytes("all_reduce", partial, found["tensor"].degree), partial_s, partial_s)
        seconds += partial_s
    if layout.tied and len(stages) > 1:
        size = next(each.stored for each in layout.params[layout.kinds[0]] if each.name == layout.tied) * wide
        pair = Group(axis="pipeline", degree=2, stride=found["pipeline"].stride * (layout.degrees.pipeline - 1))
        shared_s = collective_s("all_reduce", size, pair, cluster)
        exchanges["pipeline"].add(1, sent_bytes("all_reduce", size, 2), shared_s, shared_s)
        seconds += shared_s
    return seconds + (_muon_s(per_rank, layout, setting, exchanges) if muon else 0.0)


def _muon_s(per_rank: list[list[ParamSize]], layout: Layout, setting: Setting, exchanges: dict[str, Exchange]) -> float:
    """Every rank gathers each matrix's update and makes the whole of it orthogonal: 5 iterations on r x c, r ≤ c, of
    2r²c + 2r³ + 2r²c FLOPs (Jordan et al. 2024)."""
    group, worst = groups(layout.degrees)["shard"], 0.0
    for params in per_rank:
        flops, size = 0.0, 0
        for each in params:
            if each.states == 1:
                short, long = sorted(each.shape[:2])
                flops += 5 * (4 * short**2 * long + 2 * short**3)
                size += each.unsharded
        rate = setting.peak_flops_per_s * setting.cluster.constants["matmul_fraction"]
        gather_s = collective_s("all_gather", size * setting.master_bytes, group, setting.cluster)
        worst = max(worst, flops / rate + gather_s)
    return worst


def most_alive(layout: Layout, held: Sequence[float], *, micro_batches: int, schedule: str) -> list[tuple[float, bool]]:
    """For each pipeline rank: see `alive`. held: bytes of each stage's forward."""
    degrees = layout.degrees
    simulated = min(micro_batches, _MOST_MICRO_BATCHES * degrees.pipeline) if schedule != "gpipe" else micro_batches
    plans = orders(schedule, degrees.pipeline, simulated, degrees.stages_per_rank)
    return [alive(order, held) for order in plans]

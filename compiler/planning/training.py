"""The estimate of a training step on a mesh: memory of each pipeline rank, time, and what bounds it."""

from dataclasses import dataclass, replace

from archwright.compiler.ir import Degrees
from archwright.compiler.planning.kept import Kept
from archwright.compiler.planning.layout import Layout
from archwright.compiler.planning.machines import Cluster
from archwright.compiler.planning.memory import (
    BYTES,
    States,
    TrainingMemory,
    kept_by_kind,
    states,
    total_bytes,
    training_memory,
)
from archwright.compiler.planning.rings import groups
from archwright.compiler.planning.step_time import StepTime, step_time
from archwright.compiler.planning.work import Setting
from archwright.spec.models import Parallel, Train


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """memory, states: of each pipeline rank. sequences: of a micro-batch on a rank. time: None without a machine.

    bound_s: no step can take less: published peaks, arithmetic and memory traffic fully overlapped, no communication.
    flops, moved_bytes: of a step, of the rank that has most; recomputation included.
    """

    layout: Layout
    kept: tuple[Kept, ...]
    memory: tuple[TrainingMemory, ...]
    states: tuple[States, ...]
    sequences: int
    time: StepTime | None
    bound_s: float | None
    flops: float | None
    moved_bytes: float | None

    @property
    def degrees(self) -> Degrees:
        return self.layout.degrees

    @property
    def largest_bytes(self) -> int:
        return max(total_bytes(memory) for memory in self.memory)

    def position(self, rank: int) -> int:
        """The pipeline rank of a rank of the mesh: that axis is the outermost."""
        return rank * self.degrees.pipeline // self.degrees.world

    def fits(self, cluster: Cluster) -> bool:
        return self.largest_bytes <= cluster.capacity_bytes


def sequences_of(train: Train, degrees: Degrees) -> int:
    """Of a micro-batch on a rank, rounded up."""
    return -(-train.batch_size // (degrees.data * train.micro_batches))


def schedule_of(parallel: Parallel, degrees: Degrees) -> str:
    """Without a pipeline, micro-batches follow each other as a 1F1B pipeline of one rank does them."""
    return parallel.schedule.kind if degrees.pipeline > 1 else "1f1b"


def _as_trained(layout: Layout, parallel: Parallel, cluster: Cluster | None) -> Layout:
    """What the section says beside the degrees. Without a machine, tensor ranks have one host."""
    degrees = layout.degrees
    near = cluster is None or groups(degrees)["tensor"].is_within_node(cluster.gpu.node_size)
    copies = degrees.sequence and degrees.tensor > 1 and near and parallel.symmetric_memory is not False
    return replace(layout, reshard=parallel.reshard, symmetric=copies)


def memory_of(
    layout: Layout, parallel: Parallel, train: Train, cluster: Cluster | None
) -> tuple[tuple[Kept, ...], tuple[TrainingMemory, ...]]:
    """What each kind of segment keeps, and the memory of each pipeline rank."""
    layout = _as_trained(layout, parallel, cluster)
    compiled = train.compile is not False  # auto: on a GPU, and a plan is of GPUs
    kept = kept_by_kind(layout, train, compiled=compiled)
    memory = training_memory(
        layout, train, kept, sequences=sequences_of(train, layout.degrees),
        schedule=schedule_of(parallel, layout.degrees), constants=cluster.constants if cluster else None,
    )  # fmt: skip
    return kept, memory


def estimate(layout: Layout, parallel: Parallel, train: Train, cluster: Cluster | None) -> Estimate:
    """Of training the model of a layout on its mesh."""
    layout = _as_trained(layout, parallel, cluster)
    degrees, muon = layout.degrees, train.optimizer.kind == "muon"
    compute, master = BYTES[train.precision], max(4, BYTES[train.precision])
    compiled, sequences = train.compile is not False, sequences_of(train, degrees)
    schedule = schedule_of(parallel, degrees)
    kept, memory = memory_of(layout, parallel, train, cluster)
    every = tuple(states(layout, rank, master) for rank in range(degrees.pipeline))
    if cluster is None:
        time = bound_s = flops = moved = None
    else:
        setting = Setting(
            cluster=cluster, sequences=sequences, compute_bytes=compute, master_bytes=master,
            precision=train.precision, compiled=compiled, accumulates=train.micro_batches > 1,
            context=degrees.context,
        )  # fmt: skip
        time = step_time(layout, kept, setting, micro_batches=train.micro_batches, schedule=schedule, muon=muon)
        flops, moved = _most_work(layout, time, train, cluster, every)
        bound_s = max(_bound_s(layout, time, train, cluster, rank, every[rank]) for rank in range(degrees.pipeline))
    return Estimate(
        layout=layout, kept=kept, memory=memory, states=every, sequences=sequences, time=time, bound_s=bound_s,
        flops=flops, moved_bytes=moved,
    )  # fmt: skip


def _most_work(
    layout: Layout, time: StepTime, train: Train, cluster: Cluster, every: tuple[States, ...]
) -> tuple[float, float]:
    """(FLOPs, bytes moved) of a step on the rank that has most of each."""
    flops, moved = [], []
    for rank, whole in enumerate(every):
        work = [each for stage in layout.rank_stages(rank) for each in time.stages[stage].work]
        flops.append(sum(each.forward_flops + each.backward_flops + each.again_flops for each in work))
        values = whole.weights_bytes / max(4, BYTES[train.precision])
        update = values * cluster.constants["optimizer_bytes"]
        moved.append(train.micro_batches * sum(each.moved_bytes for each in work) + update)
    return train.micro_batches * max(flops), max(moved)


def _bound_s(layout: Layout, time: StepTime, train: Train, cluster: Cluster, rank: int, whole: States) -> float:
    """The roofline (Williams et al. 2009): max(FLOPs / peak, bytes / bandwidth) of a rank.

    Of the FLOPs those that the mask shows, without recomputation; of the bytes those of the optimizer (weights,
    gradients and states read, all but the gradients written) and of the weights, read twice by each micro-batch.
    """
    gpu, work = cluster.gpu, [each for stage in layout.rank_stages(rank) for each in time.stages[stage].work]
    flops = train.micro_batches * sum(each.forward_flops + each.backward_flops for each in work)
    update = 2 * whole.weights_bytes + whole.gradients_bytes + 2 * whole.optimizer_bytes
    weights = sum(each.unsharded for stage in layout.rank_stages(rank) for each in layout.stage_params(stage))
    reads = 2 * train.micro_batches * weights * BYTES[train.precision]
    return max(flops / gpu.flops_per_s[train.precision], (update + reads) / gpu.bandwidth_bytes_per_s)

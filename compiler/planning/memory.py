"""What a rank keeps in memory: plain Python, exact for parameters and states, derived for activations."""

from dataclasses import dataclass, fields
from math import prod

from archwright.compiler.ir import Plan, Program
from archwright.compiler.planning.constants import DEFAULTS, Constants
from archwright.compiler.planning.kept import Kept, kept
from archwright.compiler.planning.layout import Layout, ParamSize
from archwright.compiler.planning.step_time import most_alive
from archwright.compiler.planning.work import local_head, loss_chunk
from archwright.spec.models import Build, KeepAll, Train

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on one rank at the fullest moment of a training step, and which moment that is.

        loss      all activations of the micro-batches in flight, and the loss at work
        backward  the same activations, the last layers' weights and gradients, and what is computed again
        end       of the last backward: all gradients, and those of the first segment before they are reduced

    weights: masters (float32 under bfloat16). compute_weights: copies in the computation's dtype, made where they are
    used and kept for the backward; with FSDP, what is gathered. gradients: those that are there at that moment.
    unsharded_gradients: FSDP's, before they are reduced. working: what lives only while one layer is computed.
    context, nccl, allocator: constants of the table.
    """

    moment: str
    weights_bytes: int
    compute_weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    working_bytes: int
    unsharded_gradients_bytes: int
    context_bytes: int
    nccl_bytes: int
    allocator_bytes: int


@dataclass(frozen=True, kw_only=True)
class InferenceMemory:
    """Bytes on one rank of a deployment. The few MB of activations and the back end's own workspace are not counted."""

    weights_bytes: int
    kv_cache_bytes: int
    context_bytes: int = 0
    nccl_bytes: int = 0


def total_bytes(memory: TrainingMemory | InferenceMemory) -> int:
    return sum(parts(memory).values())


def parts(memory: TrainingMemory | InferenceMemory) -> dict[str, int]:
    return {each.name: getattr(memory, each.name) for each in fields(memory) if each.name.endswith("_bytes")}


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of one pipeline rank, whole: masters, gradients, states of the optimizer. num_params: counted once each."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    num_params: int


def states(layout: Layout, rank: int, master_bytes: int) -> States:
    """Weights and gradients take one master value a parameter, AdamW's moments two, Muon's momentum one."""
    params = rank_params(layout, rank)
    stored = sum(each.stored for each in params) * master_bytes
    ranks = {False: layout.degrees.shard, True: layout.degrees.shard // layout.degrees.expert}
    return States(
        weights_bytes=stored,
        gradients_bytes=stored,
        optimizer_bytes=sum(each.stored * each.states for each in params) * master_bytes,
        num_params=sum(-(-each.counted // ranks[each.expert]) for each in params),
    )


def rank_params(layout: Layout, rank: int) -> list[ParamSize]:
    return [each for stage in layout.rank_stages(rank) for each in layout.stage_params(stage)]


def kept_by_kind(layout: Layout, train: Train, *, compiled: bool) -> tuple[Kept, ...]:
    """Embedding and head keep everything and are not compiled."""
    compute, ends = BYTES[train.precision], (layout.kinds[0], layout.kinds[-1])
    return tuple(
        kept(trace, KeepAll(kind="none"), compiled=False, compute_bytes=compute)
        if kind in ends
        else kept(trace, train.activation_checkpointing, compiled=compiled, compute_bytes=compute)
        for kind, trace in enumerate(layout.traces)
    )


def training_memory(
    layout: Layout, train: Train, kept: tuple[Kept, ...], *, sequences: int, schedule: str,
    constants: Constants | None = None,
) -> tuple[TrainingMemory, ...]:  # fmt: skip
    """Of each pipeline rank. sequences: of one micro-batch on one rank; constants: None counts none of them."""
    held = [
        float(sequences * sum(kept[kind].kept_bytes for kind in layout.segments(stage)))
        for stage in range(len(layout.stages))
    ]
    masks = layout.masked * BYTES[train.precision]
    alive = most_alive(layout, held, micro_batches=train.micro_batches, schedule=schedule)
    return tuple(
        _fullest(layout, train, kept, rank, sequences, (round(most) + masks, after), constants)
        for rank, (most, after) in enumerate(alive)
    )


def _fullest(
    layout: Layout, train: Train, kept: tuple[Kept, ...], rank: int, sequences: int, alive: tuple[int, bool],
    constants: Constants | None,
) -> TrainingMemory:  # fmt: skip
    compute, master = BYTES[train.precision], max(4, BYTES[train.precision])
    whole, (activations, after) = states(layout, rank, master), alive
    copies = _copies_bytes(layout, rank, compute, master, constants)
    gradients, first = _unsharded_gradients(layout, rank, compute, constants)
    forming, scaling = _loss_bytes(layout, sequences, compute) if _has_head(layout, rank) else (0, 0)
    there = whole.gradients_bytes if (after or train.micro_batches > 1) and not layout.gathers_once else 0
    working = sequences * _working_bytes(layout, rank, kept, compute)
    moments = {
        "loss": (copies, there, activations, forming, 0, 0),
        "backward": (copies, there, activations, scaling, working, gradients),
        "end": (copies if layout.is_sharded else 0, whole.gradients_bytes, 0, 0, working, max(gradients, first)),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    copies, there, activations, logits, working, gradients = moments[moment]
    found = constants or {"context_bytes": 0, "nccl_bytes": 0, "allocator_slack": 0}
    allocated = whole.weights_bytes + whole.optimizer_bytes + sum(moments[moment])
    return TrainingMemory(
        moment=moment, weights_bytes=whole.weights_bytes, compute_weights_bytes=copies, gradients_bytes=there,
        optimizer_bytes=whole.optimizer_bytes, activations_bytes=activations, logits_bytes=logits,
        working_bytes=working, unsharded_gradients_bytes=gradients, context_bytes=round(found["context_bytes"]),
        nccl_bytes=round(found["nccl_bytes"] * _communicators(layout)),
        allocator_bytes=round(found["allocator_slack"] * allocated),
    )  # fmt: skip


def _communicators(layout: Layout) -> int:
    """One for each axis that has ranks, FSDP's joint one where it joins axes, and the whole world's."""
    sizes = [degree for degree in layout.degrees.sizes.values() if degree > 1]
    joins = sum(getattr(layout.degrees, axis) > 1 for axis in ("expert", "data_shard", "context")) > 1
    return len(sizes) + (1 if joins else 0) + (1 if len(sizes) > 1 else 0)


def _has_head(layout: Layout, rank: int) -> bool:
    return len(layout.stages) - 1 in layout.rank_stages(rank)


def _layer_sizes(layout: Layout, rank: int) -> list[int]:
    """Unsharded elements of each layer on a rank."""
    ends = (layout.kinds[0], layout.kinds[-1])
    return [
        sum(each.unsharded for each in layout.params[kind])
        for stage in layout.rank_stages(rank)
        for kind in layout.segments(stage)
        if kind not in ends
    ]


def _copies_bytes(layout: Layout, rank: int, compute: int, master: int, constants: Constants | None) -> int:
    """Copies of matrices in the computation's dtype; with FSDP: the gathered layers, embedding and head.

    A pipeline gathers its stages once a step and keeps them.
    """
    if not layout.is_sharded:
        cast = sum(each.unsharded for each in rank_params(layout, rank) if each.cast)
        return cast * compute if compute != master else 0
    number = None if layout.gathers_once else round((constants or DEFAULTS)["gathered_layers"])
    layers = sorted(_layer_sizes(layout, rank), reverse=True)[:number]
    return compute * (sum(layers) + _ends_size(layout, rank))


def _ends_size(layout: Layout, rank: int) -> int:
    """Unsharded elements of embedding and head on a rank."""
    everything = sum(each.unsharded for each in rank_params(layout, rank))
    return everything - sum(_layer_sizes(layout, rank))


def _unsharded_gradients(layout: Layout, rank: int, compute: int, constants: Constants | None) -> tuple[int, int]:
    """FSDP's gradients before they are reduced, in the computation's dtype and widened: (layers', the embedding's).

    A pipeline adds up whole wide gradients, and reduces them in the last backward.
    """
    if not layout.is_sharded:
        return 0, 0
    found, wide = constants or DEFAULTS, max(4, compute)
    if layout.gathers_once:
        whole = wide * sum(each.unsharded for each in rank_params(layout, rank))
        return whole, whole
    largest = max(_layer_sizes(layout, rank), default=0)
    layers = round(largest * (found["gradient_layers"] * compute + found["reduced_layers"] * wide))
    table = sum(each.unsharded for each in layout.params[layout.kinds[0]]) if rank == 0 else 0
    return layers, table * (compute + wide)


def _working_bytes(layout: Layout, rank: int, kept: tuple[Kept, ...], compute: int) -> int:
    """Of one sequence: what the hungriest layer computes again, and gradients of three of its largest values (those of
    a product and of the two factors)."""
    kinds = {kind for stage in layout.rank_stages(rank) for kind in layout.segments(stage)}
    kinds -= {layout.kinds[0], layout.kinds[-1]}
    largest = {kind: max(node.elements for node in layout.traces[kind].nodes) for kind in kinds}
    return max((kept[kind].peak_bytes + 3 * compute * largest[kind] for kind in kinds), default=0)


def _loss_bytes(layout: Layout, sequences: int, compute: int) -> tuple[int, int]:
    """(while the loss forms its gradient, while the backward hands it on).

    Forming: one chunk of logits and their gradient in the computation's dtype; the head's gradient, V · D wide values;
    under bfloat16 the head's copy in that dtype. Handing on: the head's gradient, and with FSDP a narrow copy of it and
    the wide input of the reduction.
    """
    wide = max(4, compute)
    rows, columns = local_head(layout)
    tokens = sequences * layout.sequence // layout.degrees.context
    narrow = 0 if compute == wide else compute
    copy = 0 if layout.is_sharded else narrow
    forming = loss_chunk(layout, compute, tokens) * rows * 2 * compute + rows * columns * (wide + copy)
    return forming, rows * columns * (wide + (narrow + wide if layout.is_sharded else 0))


def inference_memory(plan: Plan, build: Build, constants: Constants | None = None) -> InferenceMemory:
    """Local weights in the precision of the build, and a cache of max_batch rows of max_positions tokens."""
    rows = build.max_batch * cache_positions(plan.program, build)
    return InferenceMemory(
        weights_bytes=plan.local.num_params() * BYTES[build.precision],
        kv_cache_bytes=rows * kv_bytes_per_token(plan.local, build.precision),
        context_bytes=round(constants["context_bytes"]) if constants else 0,
        nccl_bytes=round(constants["nccl_bytes"]) if constants and plan.degrees.world > 1 else 0,
    )


def cache_positions(program: Program, build: Build) -> int:
    return build.max_positions or program.max_positions


def kv_bytes_per_token(program: Program, precision: str) -> int:
    """Bytes that one token adds to all caches: per layer 2 · kv_heads · head_dim values."""
    values = (
        prod(size or 1 for size in state.sizes) for states in program.states().values() for state in states.values()
    )
    return sum(values) * BYTES[precision]

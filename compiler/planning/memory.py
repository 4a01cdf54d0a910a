"""What a rank keeps in memory: plain Python, exact for parameters and states, derived for activations."""

from dataclasses import dataclass, fields
from math import prod

from archwright.compiler.ir import STORED_BITS, Param, Plan, Program
from archwright.compiler.planning.constants import Constants
from archwright.compiler.planning.kept import Kept, kept
from archwright.compiler.planning.layout import Layout, ParamSize
from archwright.compiler.planning.step_time import most_alive
from archwright.compiler.planning.work import local_head, loss_chunk
from archwright.spec.models import Build, KeepAll, Train

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on one rank at the fullest moment of a training step, and which moment that is.

        loss         all activations of the micro-batches in flight, and the loss at work
        backward     of the last layer: the same activations, the head's gradient, and what is computed again
        first layer  its last backward: what it keeps and computes again, and the gradients of all that follow
        end          of the last backward: all gradients, and the embedding's before it is added to them or reduced

    weights: masters (float32 under bfloat16). compute_weights: copies in the computation's dtype, made where they are
    used and kept for the backward; with FSDP, what is gathered. gradients: those that are there at that moment.
    unsharded_gradients: FSDP's, before they are reduced. working: what lives only while one layer is computed.
    windows: what tensor ranks lend each other. context, nccl, allocator: constants of the table.
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
    windows_bytes: int
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
    compute, stages = BYTES[train.precision], range(len(layout.stages))
    copies = [_made_copies(layout, stage, kept, compute) for stage in stages]
    held = [sequences * sum(kept[kind].kept_bytes for kind in layout.segments(stage)) for stage in stages]
    masks = layout.masked * compute
    alive = most_alive(layout, held, micro_batches=train.micro_batches, schedule=schedule)
    made = most_alive(layout, copies, micro_batches=train.micro_batches, schedule=schedule)
    return tuple(
        _fullest(layout, train, kept, rank, sequences, (round(most) + masks, round(made[rank][0]), after), constants)
        for rank, (most, after) in enumerate(alive)
    )


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """What there is at one moment, in bytes, beside masters and the optimizer's states; see TrainingMemory."""

    copies: int
    gradients: int
    activations: int = 0
    logits: int = 0
    working: int = 0
    unsharded: int = 0

    @property
    def total(self) -> int:
        return self.copies + self.gradients + self.activations + self.logits + self.working + self.unsharded


def _fullest(
    layout: Layout, train: Train, kept: tuple[Kept, ...], rank: int, sequences: int, alive: tuple[int, int, bool],
    constants: Constants | None,
) -> TrainingMemory:  # fmt: skip
    whole = states(layout, rank, max(4, BYTES[train.precision]))
    moments = _moments(layout, train, kept, rank, sequences, alive, whole)
    moment = max(moments, key=lambda name: moments[name].total)
    slack = "allocator_slack" if layout.degrees.expert == 1 else "expert_slack"
    most, found = moments[moment], constants or {"context_bytes": 0, "nccl_bytes": 0, slack: 0}
    allocated = whole.weights_bytes + whole.optimizer_bytes + most.total
    streams = max(0, _streams_bytes(layout, rank, BYTES[train.precision]) - most.unsharded) if constants else 0
    return TrainingMemory(
        moment=moment, weights_bytes=whole.weights_bytes, compute_weights_bytes=most.copies,
        gradients_bytes=most.gradients, optimizer_bytes=whole.optimizer_bytes, activations_bytes=most.activations,
        logits_bytes=most.logits, working_bytes=most.working, unsharded_gradients_bytes=most.unsharded,
        windows_bytes=_windows_bytes(layout, sequences, BYTES[train.precision]),
        context_bytes=round(found["context_bytes"]), nccl_bytes=round(found["nccl_bytes"] * _communicators(layout)),
        allocator_bytes=round(found[slack] * allocated) + streams,
    )  # fmt: skip


def _moments(
    layout: Layout, train: Train, kept: tuple[Kept, ...], rank: int, sequences: int, alive: tuple[int, int, bool],
    whole: States,
) -> dict[str, _Moment]:  # fmt: skip
    """By name. alive: bytes of activations and of copies of weights, and whether a backward has been done by then."""
    compute, (activations, made, after) = BYTES[train.precision], alive
    wide, adds = max(4, compute), after or train.micro_batches > 1
    there = whole.gradients_bytes if adds and not layout.gathers_once else 0
    copies = _copies(layout, rank, kept, compute, made)
    head, tokens = _head_size(layout, rank), sequences * layout.sequence // layout.degrees.context
    forming = _loss_bytes(layout, tokens, compute) if head else 0
    # Under FSDP a head of its own is reduced at once. A shared one's gradient waits for the embedding's.
    handed = head * (compute if layout.is_sharded and layout.tied else wide)
    waits = handed if layout.tied and rank == 0 and (layout.is_sharded or there) else 0
    working = sequences * _working_bytes(layout, rank, kept, compute)
    layers, table_grads, table = _unsharded_gradients(layout, rank, compute)
    first = layout.segments(rank)[: 1 if rank else 2]
    opening = sequences * sum(kept[kind].kept_bytes for kind in first)
    return {
        "loss": _Moment(copies=copies["loss"], gradients=there, activations=activations, logits=forming),
        "backward": _Moment(
            copies=copies["backward"], gradients=there, activations=activations, logits=handed, working=working,
            unsharded=layers,
        ),
        "first layer": _Moment(
            copies=copies["first layer"], gradients=0 if layout.gathers_once else whole.gradients_bytes,
            activations=opening, logits=waits, working=working, unsharded=layers,
        ),
        "end": _Moment(
            copies=copies["end"], gradients=whole.gradients_bytes, logits=waits,
            working=tokens * layout.head.shape[1] * (compute + wide) if rank == 0 else 0,
            unsharded=table_grads if layout.is_sharded else table * wide if layout.tied or there else 0,
        ),
    }  # fmt: skip


def _windows_bytes(layout: Layout, sequences: int, compute: int) -> int:
    """Two halves, each for the rows of the hidden values that a tensor rank adds up for the others."""
    if not layout.symmetric:
        return 0
    degrees, hidden = layout.degrees, layout.head.shape[1]
    rows = sequences * layout.sequence // degrees.context
    return 2 * (degrees.tensor - 1) * (rows // degrees.tensor) * hidden * compute


def _communicators(layout: Layout) -> int:
    """Of a rank: the world's, one for each axis that has ranks, FSDP's joint one where it joins axes; in a pipeline one
    for each neighbour and direction, and that of a shared matrix."""
    degrees = layout.degrees
    axes = [axis for axis, degree in degrees.sizes.items() if degree > 1 and axis != "pipeline"]
    joins = sum(axis in axes for axis in ("expert", "data_shard", "context")) > 1
    neighbours = min(2, degrees.pipeline - 1)
    pipeline = 2 * neighbours + (layout.tied is not None) if neighbours else 0
    return (degrees.world > 1) + len(axes) + joins + pipeline


def _head_size(layout: Layout, rank: int) -> int:
    """Elements of the head on a rank, before FSDP; 0 where another has it."""
    rows, columns = local_head(layout)
    return rows * columns if len(layout.stages) - 1 in layout.rank_stages(rank) else 0


def _layer_sizes(layout: Layout, rank: int) -> list[int]:
    """Unsharded elements of each layer on a rank."""
    ends = (layout.kinds[0], layout.kinds[-1])
    return [
        sum(each.unsharded for each in layout.params[kind])
        for stage in layout.rank_stages(rank)
        for kind in layout.segments(stage)
        if kind not in ends
    ]


def _copies(layout: Layout, rank: int, kept: tuple[Kept, ...], compute: int, made: int) -> dict[str, int]:
    """Weights in the computation's dtype at each moment: copies of masters, or what FSDP has gathered.

    A layer that is computed again copies its weights again. FSDP gathers embedding and head for the whole step and one
    layer ahead of the one that is computed; without `reshard` every layer stays. A pipeline gathers its stages once a
    step and keeps them.
    """
    if not layout.is_sharded:
        kinds = {kind for stage in layout.rank_stages(rank) for kind in layout.segments(stage)}
        largest = max((_cast_bytes(layout, kind, compute) for kind in kinds), default=0)
        again = largest if any(kept[kind].again for kind in kinds) else 0
        return {"loss": made, "backward": made + again, "first layer": largest, "end": 0}
    layers, ends = sorted(_layer_sizes(layout, rank), reverse=True), _ends_size(layout, rank)
    every, two, one = (compute * (sum(layers[:number]) + ends) for number in (None, 2, 1))
    if layout.gathers_once:
        return dict.fromkeys(("loss", "backward", "first layer", "end"), every)
    loss, backward = (one, two) if layout.reshard else (every, every)
    return {"loss": loss, "backward": backward, "first layer": two, "end": compute * ends}


def _made_copies(layout: Layout, stage: int, kept: tuple[Kept, ...], compute: int) -> int:
    """Of a stage's weights, in the computation's dtype: each forward makes them, and keeps them for its backward."""
    kinds = [kind for kind in layout.segments(stage) if not kept[kind].again]
    return 0 if layout.is_sharded else sum(_cast_bytes(layout, kind, compute) for kind in kinds)


def _cast_bytes(layout: Layout, kind: int, compute: int) -> int:
    """Nothing where masters are as wide as the computation."""
    return compute * sum(each.unsharded for each in layout.params[kind] if each.cast) if compute < 4 else 0


def _ends_size(layout: Layout, rank: int) -> int:
    """Unsharded elements of embedding and head on a rank."""
    everything = sum(each.unsharded for each in rank_params(layout, rank))
    return everything - sum(_layer_sizes(layout, rank))


def _unsharded_gradients(layout: Layout, rank: int, compute: int) -> tuple[int, int, int]:
    """(FSDP's gradients of layers before they are reduced, those of the embedding in bytes; its elements).

    FSDP2 has one layer's in the computation's dtype, and widened those that it reduces and those reduced before, whose
    memory it frees when the next are ready. Of a shared matrix the two readers' gradients are narrow.
    A pipeline adds up whole wide gradients, and reduces them in the last backward.
    """
    wide = max(4, compute)
    table = sum(each.unsharded for each in layout.params[layout.kinds[0]]) if rank == 0 else 0
    if not layout.is_sharded:
        return 0, 0, table
    if layout.gathers_once:
        whole = wide * sum(each.unsharded for each in rank_params(layout, rank))
        return whole, whole, table
    largest = max(_layer_sizes(layout, rank), default=0)
    return largest * (compute + 2 * wide), table * (compute + wide), table


def _streams_bytes(layout: Layout, rank: int, compute: int) -> int:
    """What FSDP2 gathers and reduces through, on streams of its own whose memory no other stream can use.

    Of the largest group of n elements over r ranks: input and output of the gather, e·n·(1 + 1 / r), of the reduction,
    w·n·(1 + 1 / r).
    """
    if not layout.is_sharded:
        return 0
    kinds = {kind for stage in layout.rank_stages(rank) for kind in layout.segments(stage)}
    largest = max(sum(each.unsharded for each in layout.groups[kind]) for kind in kinds)
    return (compute + max(4, compute)) * (largest + largest // layout.degrees.shard)


def _working_bytes(layout: Layout, rank: int, kept: tuple[Kept, ...], compute: int) -> int:
    """Of one sequence: what the hungriest layer computes again, and gradients of three of its largest values (those of
    a product and of the two factors)."""
    kinds = {kind for stage in layout.rank_stages(rank) for kind in layout.segments(stage)}
    kinds -= {layout.kinds[0], layout.kinds[-1]}
    largest = {kind: max(node.elements for node in layout.traces[kind].nodes) for kind in kinds}
    return max((kept[kind].peak_bytes + 3 * compute * largest[kind] for kind in kinds), default=0)


def _loss_bytes(layout: Layout, tokens: int, compute: int) -> int:
    """While the loss forms its gradients.

    A chunk of logits and their gradient in the computation's dtype, from the second chunk on beside the gradient of the
    one before; the gradient of what the loss reads; the head's gradient, V · D wide values; under bfloat16 the head's
    copy in that dtype.
    """
    wide = max(4, compute)
    rows, columns = local_head(layout)
    copy = 0 if layout.is_sharded or compute == wide else compute
    chunk = loss_chunk(layout, compute, tokens)
    chunks = (2 if chunk == tokens else 3) * chunk * rows * compute
    return chunks + tokens * columns * compute + rows * columns * (wide + copy)


def inference_memory(
    plan: Plan, build: Build, constants: Constants | None = None, *, stage: int = 0
) -> InferenceMemory:
    """Of a rank of a pipeline stage: its weights as they are stored (of a matrix that embedding and head share, the
    first and the last stage each have a copy), and a cache of max_batch rows of max_positions tokens for its layers."""
    rows, program = build.max_batch * cache_positions(plan.program, build), plan.local_stage(stage)
    return InferenceMemory(
        weights_bytes=sum(_stored_bytes(param, build.precision) for param in program.params().values()),
        kv_cache_bytes=rows * kv_bytes_per_token(program, build.precision),
        context_bytes=round(constants["context_bytes"]) if constants else 0,
        nccl_bytes=round(constants["nccl_bytes"]) if constants and plan.degrees.world > 1 else 0,
    )


def _stored_bytes(param: Param, precision: str) -> int:
    """Of a quantized matrix in its own type."""
    return param.size * BYTES[precision] if param.storage is None else -(-param.size * STORED_BITS[param.storage] // 8)


def cache_positions(program: Program, build: Build) -> int:
    return build.max_positions or program.max_positions


def kv_bytes_per_token(program: Program, precision: str) -> int:
    """Bytes that one token adds to all caches: per layer 2 · kv_heads · head_dim values."""
    values = (
        prod(size or 1 for size in state.sizes) for states in program.states().values() for state in states.values()
    )
    return sum(values) * BYTES[precision]

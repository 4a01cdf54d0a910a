"""What a spec will take, before anything runs: parameters, FLOPs, memory, a bound on time. Neither torch nor numpy."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from archwright.compiler.interpreters.cost_ops import run_cost
from archwright.compiler.ir import Plan, Split
from archwright.compiler.machines import Cluster, parse_cluster
from archwright.compiler.memory import (
    BYTES,
    InferenceMemory,
    TrainingMemory,
    cache_positions,
    inference_memory,
    kv_bytes_per_token,
    stored_size,
    training_memory,
)
from archwright.compiler.passes import degrees_of, run_passes
from archwright.spec import ArchwrightError, Spec
from archwright.spec.models import Train


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Of the whole model, for each token of a sequence of `sequence` tokens.

    training = 6 · (parameters that multiply, head included, embedding table excluded)
             + 12 · layers · heads · head_dim · sequence

    2 a multiply-add, the backward twice the forward; every query meets every key. `_causal`: 6 in place of 12.
    Recomputed activations do not count. forward: a third of each.
    """

    sequence: int
    training: int
    training_causal: int
    forward: int
    forward_causal: int


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """The answer of `plan`. kind: training with `train:` in the spec, inference without.

    memory: of each rank of the mesh (all are alike). degrees: the mesh. replicas: meshes that run side by side.
    step_s: no step can take less than this (see `_bound_s`); None without a machine. fits: None without a machine.
    """

    name: str
    kind: str
    degrees: dict[str, int]
    replicas: int
    num_params: int
    num_params_per_rank: int
    flops: TokenFlops
    kv_precision: str
    kv_bytes_per_token: int
    memory: tuple[TrainingMemory | InferenceMemory, ...]
    cluster: Cluster | None
    step_s: float | None
    step: str
    fits: bool | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """The form that `plan --output-format json` prints."""
        cluster = self.cluster
        return {
            "name": self.name,
            "kind": self.kind,
            "degrees": self.degrees,
            "replicas": self.replicas,
            "gpus": cluster
            and {"count": cluster.count, "name": cluster.name, "memory_bytes": cluster.gpu.memory_bytes},
            "parameters": {"total": self.num_params, "per_rank": self.num_params_per_rank},
            "memory": {
                "per_rank": [
                    {"rank": rank, **asdict(memory), "total_bytes": total_bytes(memory)}
                    for rank, memory in enumerate(self.memory)
                ]
            },
            "flops": {
                "sequence": self.flops.sequence,
                "per_token": self.flops.training,
                "per_token_causal": self.flops.training_causal,
                "forward_per_token": self.flops.forward,
                "forward_per_token_causal": self.flops.forward_causal,
            },
            "kv_cache": {"precision": self.kv_precision, "bytes_per_token": self.kv_bytes_per_token},
            "time": {"step_s": self.step_s, "step": self.step},
            "fits": self.fits,
            "notes": list(self.notes),
        }


def total_bytes(memory: TrainingMemory | InferenceMemory) -> int:
    return sum(asdict(memory).values())


def plan(
    spec: Spec,
    *,
    gpus: str | None = None,
    dump_after: str | None = None,
    write: Callable[[str], None] = print,
) -> PlanReport:
    """Plan the training of a spec that has `train:`, the deployment of one that has not.

    gpus: the machine, as in `8xH100`, for `fits` and `step_s`; `parallel.data_shard: auto` fills it (1 without it).
    dump_after, write: see `run_passes`.
    Raises ArchwrightError IR0nn where the model cannot be placed, PLAN001 for an unknown machine, PLAN002 where the
    mesh does not fit it.
    """
    cluster = None if gpus is None else parse_cluster(gpus)
    degrees = degrees_of(spec.parallel if spec.train else spec.build.parallel)
    placed = run_passes(spec, degrees, dump_after=dump_after, write=write)
    if spec.train is None:
        return _plan_inference(spec, placed, cluster)
    return _plan_training(spec, spec.train, placed, cluster)


def _plan_training(spec: Spec, train: Train, placed: Plan, cluster: Cluster | None) -> PlanReport:
    tensor, replicate = placed.degrees.tensor, spec.parallel.data_replicate
    shard = _data_shard(spec, tensor * replicate, cluster)
    data = shard * replicate
    notes: list[str] = []
    if data > 1:
        notes.append(f"data degree {data}: this version plans it and does not train on it yet")
    if train.batch_size % (data * train.micro_batches):
        notes.append(
            f"train.batch_size ({train.batch_size}) is no multiple of {data} data ranks x {train.micro_batches} "
            "micro-batches; planned as if rounded up"
        )
    sequences = -(-train.batch_size // (data * train.micro_batches))
    memory = training_memory(placed, train, data_shard=shard, sequences=sequences)
    step_s = None if cluster is None else _training_bound_s(placed, train, cluster, memory, sequences)
    return _report(
        spec, placed, cluster, memory,
        kind="training", degrees={"tensor": tensor, "data_shard": shard, "data_replicate": replicate}, replicas=1,
        sequence=train.sequence_length, step_s=step_s, step=f"an optimizer step of {train.batch_size} sequences",
        num_params_per_rank=sum(-(-stored_size(param) // shard) for param in placed.program.params().values()),
        notes=tuple(notes),
    )  # fmt: skip


def _plan_inference(spec: Spec, placed: Plan, cluster: Cluster | None) -> PlanReport:
    world = placed.degrees.world
    if cluster is not None and cluster.count % world:
        raise ArchwrightError(
            "PLAN002",
            f"{cluster.count} GPUs are no multiple of build.parallel.tensor ({world})",
            where="--gpus",
            help=f"use --gpus {_next_multiple(cluster.count, world)}x{cluster.name}",
        )
    build, positions = spec.build, cache_positions(placed.program, spec.build)
    memory = inference_memory(placed, build)
    step_s = None if cluster is None else _decode_bound_s(placed, spec, cluster, memory)
    return _report(
        spec, placed, cluster, memory,
        kind="inference", degrees={"tensor": world}, replicas=cluster.count // world if cluster else 1,
        sequence=positions, step_s=step_s, step=f"one token for {build.max_batch} rows at position {positions}",
        num_params_per_rank=placed.local.num_params(), notes=(),
    )  # fmt: skip


def _report(
    spec: Spec,
    placed: Plan,
    cluster: Cluster | None,
    memory: TrainingMemory | InferenceMemory,
    *,
    sequence: int,
    degrees: dict[str, int],
    **rest: object,
) -> PlanReport:
    world = 1
    for degree in degrees.values():
        world *= degree
    return PlanReport(
        name=spec.name,
        degrees=degrees,
        num_params=placed.program.num_params(),
        flops=_flops(placed, sequence),
        kv_precision=spec.build.precision,
        kv_bytes_per_token=kv_bytes_per_token(placed.program, spec.build.precision),
        memory=(memory,) * world,
        cluster=cluster,
        fits=None if cluster is None else total_bytes(memory) <= cluster.gpu.memory_bytes,
        **rest,  # pyright: ignore[reportArgumentType]
    )


def _data_shard(spec: Spec, others: int, cluster: Cluster | None) -> int:
    """The degree of `data_shard`; `others`: the product of the other degrees."""
    given = spec.parallel.data_shard
    if cluster is None:
        return 1 if given == "auto" else given
    shard = cluster.count // others if given == "auto" else given
    if shard * others != cluster.count:
        world = others if given == "auto" else others * given
        need = "a multiple of " if given == "auto" else ""
        raise ArchwrightError(
            "PLAN002",
            f"the mesh of `parallel` needs {need}{world} GPUs, and --gpus says {cluster.count}",
            where="--gpus",
            help=f"use --gpus {_next_multiple(cluster.count, world) if need else world}x{cluster.name}",
        )
    return shard


def _next_multiple(count: int, factor: int) -> int:
    return -(-count // factor) * factor


def _flops(placed: Plan, sequence: int) -> TokenFlops:
    cost = run_cost(placed.program, batch=1, sequence=sequence)
    forward, causal = cost.flops // sequence, cost.causal_flops // sequence
    return TokenFlops(
        sequence=sequence, training=3 * forward, training_causal=3 * causal, forward=forward, forward_causal=causal
    )


def _bound_s(flops: int, moved_bytes: int, cluster: Cluster, precision: str) -> float:
    """The roofline (Williams et al. 2009): max(FLOPs / peak, bytes / bandwidth).

    A bound from below: published peaks, arithmetic and memory fully overlapped, no communication, no launch overhead.
    One H100 reaches about 79% of this peak on a large matrix product.
    """
    gpu = cluster.gpu
    return max(flops / gpu.flops_per_s[precision], moved_bytes / gpu.bandwidth_bytes_per_s)


def _training_bound_s(placed: Plan, train: Train, cluster: Cluster, memory: TrainingMemory, sequences: int) -> float:
    """Three forwards' worth of visible FLOPs; the optimizer reads weights, gradients and states and writes all but the
    gradients back, and each micro-batch reads the weights in its forward and in its backward."""
    cost = run_cost(placed.local, batch=sequences, sequence=train.sequence_length, splits=_splits(placed))
    update = 2 * memory.weights_bytes + memory.gradients_bytes + 2 * memory.optimizer_bytes
    reads = 2 * placed.local.num_params() * BYTES[train.precision] * train.micro_batches
    return _bound_s(3 * cost.causal_flops * train.micro_batches, update + reads, cluster, train.precision)


def _decode_bound_s(placed: Plan, spec: Spec, cluster: Cluster, memory: InferenceMemory) -> float:
    """One token for each row of a full batch at the end of a full cache: all weights and the whole cache are read."""
    positions = cache_positions(placed.program, spec.build)
    cost = run_cost(placed.local, batch=spec.build.max_batch, sequence=1, visible=positions, splits=_splits(placed))
    return _bound_s(cost.causal_flops, total_bytes(memory), cluster, spec.build.precision)


def _splits(placed: Plan) -> dict[str, tuple[Split, ...]]:
    return {name: site.param.splits for name, site in placed.program.sites().items()}

"""`plan`: what a spec will take, before anything runs."""

from collections.abc import Callable
from dataclasses import replace

from archwright.compiler.interpreters.cost_ops import run_cost
from archwright.compiler.ir import Degrees, Plan, Program
from archwright.compiler.passes import (
    INFERENCE_TABLE,
    PASSES,
    TRAINING_TABLE,
    build_passes,
    degrees_of,
    lower,
    run_passes,
)
from archwright.compiler.passes.quantize import num_weights
from archwright.compiler.planning.changes import cheapest_change, with_settings
from archwright.compiler.planning.inference import estimate_inference
from archwright.compiler.planning.layout import Layouts, distinct
from archwright.compiler.planning.machines import Cluster, parse_cluster
from archwright.compiler.planning.memory import cache_positions, kv_bytes_per_token, total_bytes
from archwright.compiler.planning.report import PlanReport, TokenFlops
from archwright.compiler.planning.training import estimate
from archwright.spec import ArchwrightError, Spec
from archwright.spec.checks import RULES
from archwright.spec.models import LayerRun, Train


def plan(
    spec: Spec,
    *,
    gpus: str | Cluster | None = None,
    dump_after: str | None = None,
    write: Callable[[str], None] = print,
) -> PlanReport:
    """Plan the training of a spec that has `train:`, the deployment of one that has not.

    gpus: the machine, as in `8xH100`, for `fits` and times; an axis of `parallel` that is `auto` fills it (1 without).
    dump_after, write: see `run_passes`.
    Raises ArchwrightError IR0nn where the model cannot be placed, PLAN001 for an unknown machine, PLAN002 where the
    mesh does not fit it, SPEC0nn where what `auto` becomes breaks a rule.
    """
    cluster = parse_cluster(gpus) if isinstance(gpus, str) else gpus
    degrees = degrees_of(spec.parallel if spec.train else spec.build.parallel, cluster.count if cluster else 1)
    table = TRAINING_TABLE if spec.train else INFERENCE_TABLE
    if cluster is not None:
        _check_mesh(spec, degrees, cluster)
    if spec.train is None or dump_after is not None:
        passes = PASSES if spec.train else build_passes(spec)
        placed = run_passes(spec, degrees, table, passes=passes, dump_after=dump_after, write=write)
    if spec.train is None:
        return _plan_inference(spec, placed, cluster)
    run_passes(_one_of_each(spec), replace(degrees, pipeline=1, stages_per_rank=1), table)
    return _plan_training(spec, spec.train, degrees, cluster)


def _one_of_each(spec: Spec) -> Spec:
    """The spec with each kind of layer once, and the last one last: equal layers are verified once."""
    layers = [run.layer for run in spec.model.runs]
    stack = dict.fromkeys([*(layer for layer in layers if layer != layers[-1]), layers[-1]])
    runs = tuple(LayerRun(layer=layer) for layer in stack)
    return spec.model_copy(update={"model": spec.model.model_copy(update={"layers": runs, "layer": None})})


def _plan_training(spec: Spec, train: Train, degrees: Degrees, cluster: Cluster | None) -> PlanReport:
    program = lower(spec)
    layouts = Layouts(program, sequence=train.sequence_length, muon=train.optimizer.kind == "muon")
    found = estimate(layouts.at(degrees), spec.parallel, train, cluster)
    fits = found.fits(cluster) if cluster else None
    pieces = degrees.data * train.micro_batches
    notes: list[str] = []
    if train.batch_size % pieces:
        notes.append(
            f"train.batch_size ({train.batch_size}) is no multiple of {degrees.data} data ranks x "
            f"{train.micro_batches} micro-batches; planned as if rounded up"
        )
    return PlanReport(
        name=spec.name, kind="training", degrees=degrees.sizes, replicas=1,
        num_params=program.num_params(), num_params_per_rank=max(each.num_params for each in found.states),
        flops=_flops(program, train.sequence_length), kv_precision=spec.build.precision,
        kv_bytes_per_token=kv_bytes_per_token(program, spec.build.precision),
        memory=tuple(found.memory[found.position(rank)] for rank in range(degrees.world)),
        cluster=cluster, step=f"an optimizer step of {train.batch_size} sequences",
        tokens_per_step=found.sequences * pieces * train.sequence_length, training=found, inference=None, fits=fits,
        change=cheapest_change(spec, layouts, degrees, cluster) if cluster and not fits else None,
        notes=tuple(notes), precision=train.precision,
    )  # fmt: skip


def _plan_inference(spec: Spec, placed: Plan, cluster: Cluster | None) -> PlanReport:
    world, build = placed.degrees.world, spec.build
    found = estimate_inference(placed, build, cluster)
    positions = cache_positions(placed.program, build)
    return PlanReport(
        name=spec.name, kind="inference", degrees=_build_degrees(placed.degrees),
        replicas=cluster.count // world if cluster else 1,
        num_params=num_weights(placed.program),
        num_params_per_rank=max(num_weights(placed.local_stage(stage)) for stage in range(len(placed.stages))),
        flops=_flops(placed.program, positions), kv_precision=build.precision,
        kv_bytes_per_token=kv_bytes_per_token(placed.program, build.precision), 
        memory=tuple(found.memory[placed.coordinates(rank)["pipeline"]] for rank in range(world)),
        cluster=cluster, step=f"one token for {build.max_batch} rows at position {positions}",
        tokens_per_step=build.max_batch, training=None, inference=found,
        fits=None if cluster is None else max(map(total_bytes, found.memory)) <= cluster.capacity_bytes,
        change=None, notes=(), precision=build.precision,
    )  # fmt: skip


def _build_degrees(degrees: Degrees) -> dict[str, int]:
    """Of a deployment, outermost first: `tensor`, and the others where there are several ranks."""
    sizes = {axis: degrees.sizes[axis] for axis in ("pipeline", "expert", "tensor")}
    return {axis: degree for axis, degree in sizes.items() if degree > 1 or axis == "tensor"}


def _check_mesh(spec: Spec, degrees: Degrees, cluster: Cluster) -> None:
    world, count = degrees.world, cluster.count
    if spec.train is None:
        if count % world:
            raise ArchwrightError(
                "PLAN002",
                f"{count} GPUs are no multiple of the {world} ranks of build.parallel",
                where="--gpus",
                help=f"use --gpus {_next_multiple(count, world)}x{cluster.name}",
            )
        return
    if world == count:
        _check_rules(spec, degrees)
        return
    fixed = degrees_of(spec.parallel, 1).world
    is_auto = any(getattr(spec.parallel, axis) == "auto" for axis in degrees.sizes)
    need, use = ("a multiple of ", _next_multiple(count, fixed)) if is_auto else ("", fixed)
    raise ArchwrightError(
        "PLAN002",
        f"the mesh of `parallel` needs {need}{fixed} GPUs, and --gpus says {count}",
        where="--gpus",
        help=f"use --gpus {use}x{cluster.name}",
    )


def _check_rules(spec: Spec, degrees: Degrees) -> None:
    """The rules of the language where `auto` has become a number; an uneven batch is planned as if rounded up."""
    filled = with_settings(spec, {f"parallel.{axis}": degree for axis, degree in degrees.sizes.items()})
    for rule in RULES:
        for finding in rule(filled):
            if finding.code != "SPEC045":
                raise ArchwrightError(finding.code, finding.message, where=finding.path, help=finding.help)


def _next_multiple(count: int, factor: int) -> int:
    return -(-count // factor) * factor


def _flops(program: Program, sequence: int) -> TokenFlops:
    """One segment of each kind stands for all."""
    few, kinds = distinct(program)
    cost = run_cost(few, batch=1, sequence=sequence)
    parts = [cost.of(segment) for segment in few.segments]
    flops, causal = sum(parts[kind].flops for kind in kinds), sum(parts[kind].causal_flops for kind in kinds)
    forward, forward_causal = flops // sequence, causal // sequence
    return TokenFlops(
        sequence=sequence, training=3 * forward, training_causal=3 * forward_causal, forward=forward,
        forward_causal=forward_causal,
    )  # fmt: skip

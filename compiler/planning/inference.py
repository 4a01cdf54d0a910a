"""What a deployment takes: weights, cache, and how fast it can decode and prefill."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from archwright.compiler.interpreters.cost_ops import ProgramCost, run_cost
from archwright.compiler.ir import Degrees, Plan
from archwright.compiler.planning.layout import splits_of
from archwright.compiler.planning.machines import Cluster
from archwright.compiler.planning.memory import (
    BYTES,
    InferenceMemory,
    cache_positions,
    inference_memory,
    kv_bytes_per_token,
    total_bytes,
)
from archwright.compiler.planning.rings import Group, collective_s, groups, send_s
from archwright.spec.models import Build


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """A pipeline stage: its segments [start, stop) of the model, and its part of the expected times."""

    segments: tuple[int, int]
    decode_s: float | None = None
    prefill_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Inference:
    """memory: of a rank of each pipeline stage. largest_batch: rows that fit, by length of the cache; None without a
    machine.

    decode_s: one token for `max_batch` rows at the end of a full cache; prefill_s: one row that fills the cache. Both
    expected, and beside each the bound that published peaks give. A token passes every stage, so both are sums over
    `stages`: a pipeline holds larger models and, with several batches on their way, answers more of them at once; one
    token is no sooner there. Between two stages every rank hands on `decode_hand_off_bytes` a decode step.
    """

    memory: tuple[InferenceMemory, ...]
    stages: tuple[StageTimes, ...]
    decode_hand_off_bytes: int
    prefill_hand_off_bytes: int
    largest_batch: dict[int, int] | None
    decode_s: float | None = None
    decode_bound_s: float | None = None
    prefill_s: float | None = None
    prefill_bound_s: float | None = None

    def to_json(self) -> dict[str, object]:
        content = asdict(self)
        for name in ("memory", "stages", "decode_hand_off_bytes", "prefill_hand_off_bytes"):
            del content[name]
        content["largest_batch"] = self.largest_batch and [
            {"positions": positions, "batch": batch} for positions, batch in self.largest_batch.items()
        ]
        return content

    def pipeline_json(self) -> dict[str, object] | None:
        if len(self.stages) == 1:
            return None
        return {
            "decode_hand_off_bytes": self.decode_hand_off_bytes,
            "prefill_hand_off_bytes": self.prefill_hand_off_bytes,
            "stages": [
                {
                    "stage": number, "rank": number, "segments": list(each.segments), "decode_s": each.decode_s,
                    "prefill_s": each.prefill_s,
                }
                for number, each in enumerate(self.stages)
            ],
        }  # fmt: skip


def estimate_inference(placed: Plan, build: Build, cluster: Cluster | None) -> Inference:
    constants = cluster.constants if cluster else None
    numbers = range(len(placed.stages))
    memory = tuple(inference_memory(placed, build, constants, stage=number) for number in numbers)
    positions, row_bytes = cache_positions(placed.program, build), _hidden_bytes(placed, build)
    handed = {"decode_hand_off_bytes": build.max_batch * row_bytes, "prefill_hand_off_bytes": positions * row_bytes}
    if cluster is None:
        stages = tuple(StageTimes(segments=segments) for segments in placed.stages)
        return Inference(memory=memory, stages=stages, largest_batch=None, **handed)
    estimates = [_estimate_stage(placed, number, build, cluster, memory[number]) for number in numbers]
    pipeline, hops = groups(placed.degrees)["pipeline"], len(placed.stages) - 1
    return Inference(
        memory=memory,
        stages=tuple(each.times for each in estimates),
        largest_batch=_largest_batches(placed, build, cluster, memory),
        decode_s=sum(each.decode_s for each in estimates)
        + hops * send_s(handed["decode_hand_off_bytes"], pipeline, cluster),
        decode_bound_s=sum(each.decode_bound_s for each in estimates),
        prefill_s=sum(each.prefill_s for each in estimates)
        + hops * send_s(handed["prefill_hand_off_bytes"], pipeline, cluster),
        prefill_bound_s=sum(each.prefill_bound_s for each in estimates),
        **handed,
    )


def _hidden_bytes(placed: Plan, build: Build) -> int:
    """What one token takes between two stages; nothing where there is one."""
    return placed.program.hidden_size * BYTES[build.precision] if len(placed.stages) > 1 else 0


@dataclass(frozen=True, kw_only=True)
class _StageEstimate:
    times: StageTimes
    decode_s: float
    decode_bound_s: float
    prefill_s: float
    prefill_bound_s: float


def _estimate_stage(
    placed: Plan, number: int, build: Build, cluster: Cluster, memory: InferenceMemory
) -> _StageEstimate:
    program, splits = placed.local_stage(number), splits_of(placed)
    positions, last = cache_positions(placed.program, build), build.logits == "last"
    decode = run_cost(program, batch=build.max_batch, sequence=1, visible=positions, splits=splits)
    prefill = run_cost(program, batch=1, sequence=positions, last=last, splits=splits)
    whole, weights = memory.weights_bytes + memory.kv_cache_bytes, memory.weights_bytes
    decode_s, prefill_s = (
        _expected_s(cost, moved, build, cluster, placed.degrees)
        for cost, moved in ((decode, whole), (prefill, weights))
    )
    return _StageEstimate(
        times=StageTimes(segments=placed.stages[number], decode_s=decode_s, prefill_s=prefill_s),
        decode_s=decode_s,
        decode_bound_s=_bound_s(decode, whole, build, cluster),
        prefill_s=prefill_s,
        prefill_bound_s=_bound_s(prefill, weights, build, cluster),
    )


def _largest_batches(
    placed: Plan, build: Build, cluster: Cluster, memory: tuple[InferenceMemory, ...]
) -> dict[int, int]:
    """Rows that fit beside the weights of every stage, for the cache's length and its halves down to an eighth."""
    longest = cache_positions(placed.program, build)
    lengths = dict.fromkeys(max(1, longest >> shift) for shift in range(4))
    sizes = [
        (
            cluster.capacity_bytes - (total_bytes(each) - each.kv_cache_bytes),
            kv_bytes_per_token(placed.local_stage(number), build.precision),
        )
        for number, each in enumerate(memory)
    ]
    return {length: min(max(0, room // (token * length)) for room, token in sizes) for length in lengths}


def _bound_s(cost: ProgramCost, moved_bytes: int, build: Build, cluster: Cluster) -> float:
    """max(FLOPs / peak, bytes / bandwidth) (Williams et al. 2009): weights and cache are read once."""
    gpu = cluster.gpu
    return max(cost.causal_flops / gpu.flops_per_s[build.precision], moved_bytes / gpu.bandwidth_bytes_per_s)


def _groups(degrees: Degrees) -> Mapping[str, Group]:
    """The ranks that add up, by the name of their boundary; those of both axes of a stage are neighbours."""
    joint = Group(axis="expert", degree=degrees.expert * degrees.tensor, stride=1)
    return groups(degrees) | {"expert+tensor": joint}


def _expected_s(cost: ProgramCost, moved_bytes: int, build: Build, cluster: Cluster, degrees: Degrees) -> float:
    """The same at the fractions of the peaks that are reached, and the collectives between."""
    gpu, constants, found = cluster.gpu, cluster.constants, _groups(degrees)
    flops_s = cost.causal_flops / (gpu.flops_per_s[build.precision] * constants["matmul_fraction"])
    bytes_s = moved_bytes / (gpu.bandwidth_bytes_per_s * constants["bandwidth_fraction"])
    exchanged_s = sum(
        collective_s(each.kind, each.elements * BYTES[build.precision], found[each.mesh_axis], cluster)
        for each in cost.collectives
        if not each.backward
    )
    return max(flops_s, bytes_s) + exchanged_s

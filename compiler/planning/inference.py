"""What a deployment takes: weights, cache, and how fast it can decode and prefill."""

from dataclasses import asdict, dataclass

from archwright.compiler.interpreters.cost_ops import ProgramCost, run_cost
from archwright.compiler.ir import Plan
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
from archwright.compiler.planning.rings import collective_s, groups
from archwright.spec.models import Build


@dataclass(frozen=True, kw_only=True)
class Inference:
    """memory: of each rank. largest_batch: rows that fit, by length of the cache; None without a machine.

    decode_s: one token for `max_batch` rows at the end of a full cache; prefill_s: one row that fills the cache. Both
    expected, and beside each the bound that published peaks give.
    """

    memory: InferenceMemory
    largest_batch: dict[int, int] | None
    decode_s: float | None = None
    decode_bound_s: float | None = None
    prefill_s: float | None = None
    prefill_bound_s: float | None = None

    def to_json(self) -> dict[str, object]:
        content = asdict(self)
        del content["memory"]
        content["largest_batch"] = self.largest_batch and [
            {"positions": positions, "batch": batch} for positions, batch in self.largest_batch.items()
        ]
        return content


def estimate_inference(placed: Plan, build: Build, cluster: Cluster | None) -> Inference:
    memory = inference_memory(placed, build, cluster.constants if cluster else None)
    if cluster is None:
        return Inference(memory=memory, largest_batch=None)
    positions = cache_positions(placed.program, build)
    splits, rows = splits_of(placed), build.max_batch
    decode = run_cost(placed.local, batch=rows, sequence=1, visible=positions, splits=splits)
    prefill = run_cost(placed.local, batch=1, sequence=positions, splits=splits)
    whole, weights = memory.weights_bytes + memory.kv_cache_bytes, memory.weights_bytes
    return Inference(
        memory=memory,
        largest_batch=_largest_batches(placed, build, cluster, memory),
        decode_s=_expected_s(decode, whole, build, cluster, placed),
        decode_bound_s=_bound_s(decode, whole, build, cluster),
        prefill_s=_expected_s(prefill, weights, build, cluster, placed),
        prefill_bound_s=_bound_s(prefill, weights, build, cluster),
    )


def _largest_batches(placed: Plan, build: Build, cluster: Cluster, memory: InferenceMemory) -> dict[int, int]:
    """Rows that fit beside the weights, for the cache's length and its halves down to an eighth."""
    room = cluster.capacity_bytes - (total_bytes(memory) - memory.kv_cache_bytes)
    token, longest = kv_bytes_per_token(placed.local, build.precision), cache_positions(placed.program, build)
    lengths = dict.fromkeys(max(1, longest >> shift) for shift in range(4))
    return {length: max(0, room // (token * length)) for length in lengths}


def _bound_s(cost: ProgramCost, moved_bytes: int, build: Build, cluster: Cluster) -> float:
    """max(FLOPs / peak, bytes / bandwidth) (Williams et al. 2009): weights and cache are read once."""
    gpu = cluster.gpu
    return max(cost.causal_flops / gpu.flops_per_s[build.precision], moved_bytes / gpu.bandwidth_bytes_per_s)


def _expected_s(cost: ProgramCost, moved_bytes: int, build: Build, cluster: Cluster, placed: Plan) -> float:
    """The same at the fractions of the peaks that are reached, and the collectives between."""
    gpu, constants, found = cluster.gpu, cluster.constants, groups(placed.degrees)
    flops_s = cost.causal_flops / (gpu.flops_per_s[build.precision] * constants["matmul_fraction"])
    bytes_s = moved_bytes / (gpu.bandwidth_bytes_per_s * constants["bandwidth_fraction"])
    exchanged_s = sum(
        collective_s(each.kind, each.elements * BYTES[build.precision], found[each.mesh_axis], cluster)
        for each in cost.collectives
        if not each.backward
    )
    return max(flops_s, bytes_s) + exchanged_s

"""Every number of the planner that is measured or agreed, none derived. One table, so that one place is calibrated.

`--machines FILE.yaml` may give other values under `constants:`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

KIB, MIB = 1 << 10, 1 << 20
RUNS = "benchmarks/results/2026-11-25-plan-truth.json: H100s, torch 2.11, 2026-11-25"
STEP = "llama3.2-1b, 4 x 4,096 tokens, bf16, one H100, torch 2.11, 2026-11-25"


@dataclass(frozen=True, kw_only=True)
class Constant:
    """status: measured (source says where), published, or estimate (awaits a measurement)."""

    value: float
    unit: str
    source: str
    status: Literal["measured", "published", "estimate"]


def _estimate(value: float, unit: str, source: str) -> Constant:
    return Constant(value=value, unit=unit, source=source, status="estimate")


def _measured(value: float, unit: str, source: str) -> Constant:
    return Constant(value=value, unit=unit, source=source, status="measured")


TABLE: Mapping[str, Constant] = MappingProxyType(
    {
        # Memory.
        "reserved_bytes": _measured(590 * MIB, "bytes", "H100: 81,559 MiB reported, 79.1 GiB seen by torch"),
        "context_bytes": _estimate(640 * MIB, "bytes", "CUDA context, kernels and cuBLAS workspaces of a process"),
        "nccl_bytes": _measured(600 * MIB, "bytes/communicator", f"fitted to device less allocated bytes, {RUNS}"),
        "allocator_slack": _measured(0.04, "fraction", f"reserved above allocated, fitted to {RUNS}"),
        "expert_slack": _measured(
            0.23, "fraction", f"the same of experts that are spread, whose sizes change in every step, one of {RUNS}"
        ),
        # Arithmetic and memory traffic.
        "matmul_fraction": _measured(759 / 989, "of peak", f"160 ms of products in a step of {STEP}"),
        "grouped_fraction": _estimate(
            0.55, "of peak", "a product for each expert in one kernel, torch.nn.functional.grouped_mm"
        ),
        "attention_fraction": _measured(
            423 / 989, "of peak", f"cuDNN, causal, heads of 64, 10.4 ms in a step of {STEP}"
        ),
        "attention_backward_fraction": _measured(323 / 989, "of peak", f"34.1 ms with its helpers in a step of {STEP}"),
        "context_attention": _measured(
            0.5, "of attention's", f"FlashAttention 2 and keys in order, fitted to one of {RUNS}"
        ),
        "bandwidth_fraction": _measured(3008 / 3350, "of published", "device-to-device copy, one H100, 2026-11-22"),
        "eager_passes": _estimate(1.5, "of one read and write", "uncompiled elementwise work makes extra passes"),
        "backward_traffic": _measured(2.8, "of forward", f"fitted: the 35 ms that all else leaves in a step of {STEP}"),
        "loss_passes": _measured(4, "of reading or writing a logit", f"loss kernels 6.7 ms in a step of {STEP}"),
        "optimizer_bytes": _measured(41.9, "bytes/parameter", f"fused AdamW 15.3 ms, norm 1.9 ms in a step of {STEP}"),
        "launch_s": _estimate(4e-6, "s/operation", "kernels that are launched faster than they run cost nothing"),
        "step_overhead_s": _estimate(2e-3, "s/step", "data, synchronisation and logging of a step"),
        # Communication.
        "nvlink_fraction": _measured(
            329 / 450, "of published", "1 GiB all-reduce, bus, such a pair of H100s, 2026-11-13"
        ),
        "ramp_bytes": _estimate(
            16e6, "bytes", "200 to 250 GB/s of NCCL in collectives of 67 MB, two H100s, 2026-11-25"
        ),
        "copy_fraction": _measured(
            357 / 450, "of published", "33.5 MB in 94 µs in a training step, two H100s, symmetric memory, 2026-11-26"
        ),
        "barrier_s": _measured(5e-6, "s", "of two ranks' symmetric memory in a training step, median, 2026-11-26"),
        "overlap_cost": _estimate(1.0, "of a link's time", f"as if nothing were hidden; a fit gives 1.8, {RUNS}"),
        "network_fraction": _estimate(0.85, "of published", "bus bandwidth of NCCL rings between nodes"),
        "node_latency_s": _estimate(3e-6, "s/hop", "a hop of a ring within a node"),
        "network_latency_s": _estimate(10e-6, "s/hop", "a hop of a ring between nodes"),
        "collective_s": _measured(16e-6, "s", "8 KB all-reduce, two H100s in a CUDA graph: 17.9 µs, less two hops"),
    }
)


Constants = Mapping[str, float]

DEFAULTS: Constants = MappingProxyType({name: constant.value for name, constant in TABLE.items()})

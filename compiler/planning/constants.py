"""Every number of the planner that is measured or agreed, none derived. One table, so that one place is calibrated.

`--machines FILE.yaml` may give other values under `constants:`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

KIB, MIB = 1 << 10, 1 << 20


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
        "nccl_bytes": _estimate(256 * MIB, "bytes/communicator", "NCCL's channels and buffers on NVLink machines"),
        "allocator_slack": _estimate(0.04, "fraction", "reserved above allocated in PyTorch's caching allocator"),
        # Arithmetic and memory traffic.
        "matmul_fraction": _measured(783 / 989, "of peak", "8192³ bf16 product on one H100, torch 2.11, 2026-11-22"),
        "attention_fraction": _estimate(0.50, "of peak", "fused attention forward, cuDNN and FlashAttention 2 on H100"),
        "attention_backward_fraction": _estimate(0.40, "of peak", "fused attention backward"),
        "bandwidth_fraction": _measured(3008 / 3350, "of published", "device-to-device copy, one H100, 2026-11-22"),
        "eager_passes": _estimate(1.5, "of one read and write", "uncompiled elementwise work makes extra passes"),
        "backward_traffic": _estimate(2.0, "of forward", "elementwise backward: reads saved and gradient, writes one"),
        "optimizer_bytes": _estimate(32, "bytes/parameter", "fused AdamW with clipping: 7 float32 words; norm: 1"),
        "launch_s": _estimate(4e-6, "s/operation", "kernels that are launched faster than they run cost nothing"),
        "step_overhead_s": _estimate(2e-3, "s/step", "data, synchronisation and logging of a step"),
        # Communication.
        "nvlink_fraction": _estimate(0.75, "of published", "bus bandwidth of NCCL rings within a node"),
        "network_fraction": _estimate(0.85, "of published", "bus bandwidth of NCCL rings between nodes"),
        "node_latency_s": _estimate(3e-6, "s/hop", "a hop of a ring within a node"),
        "network_latency_s": _estimate(10e-6, "s/hop", "a hop of a ring between nodes"),
        "collective_s": _measured(16e-6, "s", "8 KB all-reduce, two H100s in a CUDA graph: 17.9 µs, less two hops"),
    }
)


Constants = Mapping[str, float]

DEFAULTS: Constants = MappingProxyType({name: constant.value for name, constant in TABLE.items()})

"""Published peaks of the GPUs that `plan` knows. One file, so that a figure is never written twice."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from archwright.spec import ArchwrightError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Vendor's data sheet, dense (no structured sparsity).

    memory_bytes: as sold, in decimal GB; the driver shows about 6% more, which leaves room for its own context, NCCL's
    buffers and the allocator. flops_per_s: by precision; float32 without TF32, as PyTorch multiplies by default.
    """

    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]


def _gpu(memory_gb: int, bandwidth_tb_per_s: float, half: float, single: float, double: float) -> Gpu:
    tera = {"bfloat16": half, "float16": half, "float32": single, "float64": double}
    return Gpu(
        memory_bytes=memory_gb * 10**9,
        bandwidth_bytes_per_s=bandwidth_tb_per_s * 1e12,
        flops_per_s=MappingProxyType({precision: peak * 1e12 for precision, peak in tera.items()}),
    )


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "H100": _gpu(80, 3.35, 989, 67, 67),  # SXM5, 80 GB HBM3
        "H200": _gpu(141, 4.8, 989, 67, 67),  # SXM, 141 GB HBM3e
        "A100": _gpu(80, 2.039, 312, 19.5, 19.5),  # SXM4, 80 GB HBM2e
    }
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`count` GPUs of one kind."""

    count: int
    name: str

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.name]


def parse_cluster(text: str) -> Cluster:
    """`512xH100` → 512 H100s; `H100` is one. Raises ArchwrightError PLAN001 for anything else."""
    match = re.fullmatch(r"(?:([1-9]\d{0,6})[xX])?([A-Za-z]\w*)", text.strip())
    name = match[2].upper() if match else ""
    if match is None or name not in GPUS:
        known = ", ".join(GPUS)
        raise ArchwrightError(
            "PLAN001",
            f"`{text}` is not COUNTxGPU",
            where="--gpus",
            help=f"for example 8xH100; known are {known}",
        )
    return Cluster(count=int(match[1] or 1), name=name)

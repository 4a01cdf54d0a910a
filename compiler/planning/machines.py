"""Published figures of the GPUs that `plan` knows, and machines that users describe themselves in YAML."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from archwright.compiler.planning.constants import DEFAULTS, MIB, Constants
from archwright.spec import ArchwrightError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Vendor's data sheet, dense (no structured sparsity).

    memory_bytes: what the driver reports in all. flops_per_s: by precision; float32 without TF32, as PyTorch multiplies
    by default. link_bytes_per_s: of NVLink (PCIe where there is none) from one GPU to the others of its node, one
    direction. network_bytes_per_s: of the adapter that a GPU has for itself in the vendor's reference machine.
    """

    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    link_bytes_per_s: float
    node_size: int
    network_bytes_per_s: float


def make_gpu(
    memory_mib: float,
    bandwidth_tb_per_s: float,
    tflops: tuple[float, float, float],
    link_gb_per_s: float,
    node_size: int,
    network_gbit_per_s: float,
) -> Gpu:
    """tflops: of half precisions, float32, float64."""
    half, single, double = (value * 1e12 for value in tflops)
    return Gpu(
        memory_bytes=round(memory_mib * MIB),
        bandwidth_bytes_per_s=bandwidth_tb_per_s * 1e12,
        flops_per_s=MappingProxyType({"bfloat16": half, "float16": half, "float32": single, "float64": double}),
        link_bytes_per_s=link_gb_per_s * 1e9,
        node_size=node_size,
        network_bytes_per_s=network_gbit_per_s * 1e9 / 8,
    )


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        # MiB of the driver; TB/s; TFLOP/s half, float32, float64; GB/s one way; GPUs a node; Gbit/s a GPU.
        "B200": make_gpu(183359, 8.0, (2250, 75, 37), 900, 8, 400),  # HGX B200, NVLink 5
        "H200": make_gpu(143771, 4.8, (989, 67, 67), 450, 8, 400),  # SXM, NVLink 4
        "H100": make_gpu(81559, 3.35, (989, 67, 67), 450, 8, 400),  # SXM5, HBM3, NVLink 4
        "A100": make_gpu(81920, 2.039, (312, 19.5, 19.5), 300, 8, 200),  # SXM4 80 GB, NVLink 3
        "A100_40GB": make_gpu(40960, 1.555, (312, 19.5, 19.5), 300, 8, 200),  # SXM4
        "L40S": make_gpu(46068, 0.864, (362.05, 91.6, 1.4), 32, 8, 200),  # PCIe 4
        "A10": make_gpu(23028, 0.600, (125, 31.2, 0.49), 32, 4, 100),  # PCIe 4
        "L4": make_gpu(23034, 0.300, (121, 30.3, 0.49), 32, 4, 100),  # PCIe 4
        "RTX5090": make_gpu(32607, 1.792, (209.5, 104.8, 1.6), 64, 4, 25),  # PCIe 5; half with float32 sums
        "RTX4090": make_gpu(24564, 1.008, (165.2, 82.6, 1.3), 32, 4, 25),  # PCIe 4; half with float32 sums
        "V100": make_gpu(32768, 0.900, (125, 15.7, 7.8), 150, 8, 100),  # SXM2 32 GB, NVLink 2
    }
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`count` GPUs of one kind. constants: see `constants.TABLE`."""

    count: int
    name: str
    gpu: Gpu
    constants: Constants = field(default_factory=lambda: DEFAULTS)

    @property
    def capacity_bytes(self) -> int:
        """Of one GPU, what programs can have."""
        return self.gpu.memory_bytes - round(self.constants["reserved_bytes"])


def parse_cluster(text: str, gpus: Mapping[str, Gpu] = GPUS, constants: Constants = DEFAULTS) -> Cluster:
    """`512xH100` → 512 H100s; `H100` is one, and a million are too many.

    Raises ArchwrightError PLAN001 for anything else.
    """
    match = re.fullmatch(r"(?:([1-9]\d{0,5})[xX])?([A-Za-z][\w-]*)", text.strip())
    names = {name.upper(): name for name in gpus}
    name = names.get(match[2].upper()) if match else None
    if match is None or name is None:
        raise ArchwrightError(
            "PLAN001",
            f"`{text}` is not COUNTxGPU",
            where="--gpus",
            help=f"for example 8xH100, of at most 999,999; known are {', '.join(gpus)}; --machines FILE adds others",
        )
    return Cluster(count=int(match[1] or 1), name=name, gpu=gpus[name], constants=constants)

"""Times, memory, kernels, and what a machine is. Steps are functions without arguments; devices may run behind."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from archwright.trainers.launch import World

Step = Callable[[], None]
PACKAGES = ("archwright", "numpy", "torch", "triton")
VARIABLES = (
    "NCCL_NVLS_ENABLE",
    "NCCL_MIN_CTAS",
    "NCCL_MAX_CTAS",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
TOP_KERNELS = 40


@dataclass(kw_only=True)
class Timing:
    """blocks_s: seconds a step in each block, the device waited for at its ends only. steps_s: between the returns of
    two steps, which may be before the device is done. memory: bytes; see `peaks`. ranks: `own` of every rank."""

    blocks_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    warmup_s: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def own(self) -> dict[str, Any]:
        return {"median_step_s": self.median_s, **self.memory}

    @property
    def median_s(self) -> float:
        """Of the blocks where there are several, of the steps of a single one otherwise."""
        return statistics.median(self.blocks_s if len(self.blocks_s) > 1 else self.steps_s)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def in_use(device: torch.device) -> int:
    """What the driver says is taken of the device's memory, by whatever process."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def peaks(device: torch.device) -> dict[str, int]:
    """Largest bytes since the last reset: in tensors, and taken from the device. On a CPU of the process, ever."""
    if device.type == "cuda":
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
            "device_bytes": in_use(device),
        }
    return {"peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}


def block(step: Step, device: torch.device, timing: Timing, steps: int) -> None:
    """Run and time `steps` steps."""
    wait(device)
    started = last = time.perf_counter()
    for _ in range(steps):
        step()
        now = time.perf_counter()
        timing.steps_s.append(now - last)
        last = now
    wait(device)
    ended = time.perf_counter()
    timing.steps_s[-1] += ended - last
    timing.blocks_s.append((ended - started) / steps)


def warm_up(step: Step, device: torch.device, timing: Timing, steps: int) -> None:
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    timing.warmup_s = time.perf_counter() - started


def time_steps(step: Step, device: torch.device, *, warmup: int, steps: int) -> Timing:
    """One contestant alone."""
    timing = Timing()
    warm_up(step, device, timing, warmup)
    first = peaks(device)
    reset_peaks(device)
    block(step, device, timing, steps)
    timing.memory = peaks(device) | {f"warmup_{name}": value for name, value in first.items()}
    return timing


def time_in_turns(
    contestants: Sequence[Step], device: torch.device, *, warmup: int, steps: int, blocks: int
) -> list[Timing]:
    """Several contestants in one process: blocks of each in turn, so that the machine's moods are shared.

    The peak is over what all keep between their steps: each contestant's own keep has to be added.
    """
    timings = [Timing() for _ in contestants]
    for step, timing in zip(contestants, timings, strict=True):
        warm_up(step, device, timing, warmup)
    for _ in range(blocks):
        for step, timing in zip(contestants, timings, strict=True):
            reset_peaks(device)
            before = allocated(device)
            block(step, device, timing, steps)
            if device.type == "cuda":
                added = peaks(device)["peak_allocated_bytes"] - before
                timing.memory["peak_added_bytes"] = max(added, timing.memory.get("peak_added_bytes", 0))
    return timings


def gather_from_ranks(world: World, value: Any) -> list[Any]:
    """The value of every rank, in every rank."""
    if world.size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def summary(timing: Timing) -> dict[str, Any]:
    """A timing as JSON has it."""
    result: dict[str, Any] = {
        "median_step_s": round(timing.median_s, 6),
        "mean_step_s": round(statistics.mean(timing.blocks_s), 6),
        "block_step_s": [round(seconds, 6) for seconds in timing.blocks_s],
        "step_s": [round(seconds, 6) for seconds in timing.steps_s],
        "warmup_s": round(timing.warmup_s, 3),
        "memory": timing.memory,
    }
    return result | ({"ranks": timing.ranks} if timing.ranks else {})


def profile(step: Step, device: torch.device) -> dict[str, Any]:
    """The kernels of one step (the operators on a CPU), longest first. busy_ms: their sum, idle time left out."""
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    wait(device)
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        wait(device)
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    rows = [
        (event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3, event.count)
        for event in recorded.key_averages()
        if event.device_type == wanted
    ]
    rows.sort(key=lambda row: -row[1])
    return {
        "busy_ms": round(sum(ms for _, ms, _ in rows), 3),
        "kernels": [{"name": name[:140], "ms": round(ms, 3), "count": count} for name, ms, count in rows[:TOP_KERNELS]],
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    hardware: dict[str, Any] = {"processor": _processor()}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        hardware |= {"gpu": found.name, "gpu_memory_bytes": found.total_memory, "gpus": torch.cuda.device_count()}
        nccl: Any = torch.cuda.nccl.version()
        versions |= {"cuda": torch.version.cuda, "nccl": list(nccl), "cudnn": torch.backends.cudnn.version()}
    return {
        "platform": platform.platform(),
        "hardware": hardware,
        "versions": versions,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()

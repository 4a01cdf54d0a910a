"""Which precision this CPU trains faster in."""

import time
from pathlib import Path

import torch

from archwright.spec.files import atomic_write


def faster_precision(folder: Path) -> str:
    """`bfloat16` where a bfloat16 matmul takes at most half the time of a float32 one (CPUs with such instructions).

    The answer is kept in the folder, so that a run that goes on keeps its precision.
    """
    kept = folder / "precision.txt"
    if not kept.exists():
        atomic_write(kept, "bfloat16" if 2 * _best_s(torch.bfloat16) < _best_s(torch.float32) else "float32")
    return kept.read_text()


def _best_s(dtype: torch.dtype) -> float:
    a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 704, dtype=dtype)
    seconds: list[float] = []
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return min(seconds)

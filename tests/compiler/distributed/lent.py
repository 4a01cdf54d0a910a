"""Windows in the memory of one host, for ranks that are threads or processes of a CPU."""

import threading
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from archwright.compiler.distributed import symmetric

Tensor = torch.Tensor


class _Later(dist.Work):
    """Copies at the last moment that is allowed: when they are waited for."""

    def __init__(self, copy: Callable[[], None]) -> None:
        super().__init__()
        self._copy: Callable[[], None] | None = copy

    def wait(self, timeout: Any = None) -> bool:
        copy, self._copy = self._copy, None
        if copy is not None:
            copy()
        return True


class LentWindow(symmetric.Window):
    """memories, barrier: how the ranks get at each other's bytes, and wait for each other."""

    def __init__(self, group: Any, memories: Callable[[int], list[Tensor]], barrier: Callable[[], Any]) -> None:
        self._memories, self._together = memories, barrier
        super().__init__(group)

    def fetch(self, result: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        def copy() -> None:
            for to, source in pairs:
                to.copy_(source)

        self._last = _Later(copy)
        symmetric._register(result, self._last)

    def _open(self) -> None:
        self._last = _Later(lambda: None)

    def _settle(self) -> None:
        self._last.wait()

    def _allocate(self) -> None:
        self._together()
        self._bytes = self._memories(2 * self._half_bytes)
        self._together()

    def _barrier(self) -> None:
        self._together()

    def _view(self, rank: int, shape: torch.Size, dtype: torch.dtype, start: int) -> Tensor:
        return self._bytes[rank].view(dtype)[start : start + prod(shape)].view(shape)


def open_in_files(group: dist.ProcessGroup, folder: Path) -> None:
    """A window for a group of processes, through files that they all map."""

    def memories(num_bytes: int) -> list[Tensor]:
        names = [folder / f"{'-'.join(map(str, ranks))}-{rank}-{num_bytes}" for rank in ranks]
        return [torch.from_file(str(name), shared=True, size=num_bytes, dtype=torch.uint8) for name in names]

    ranks = dist.get_process_group_ranks(group)
    symmetric._WINDOWS[group.group_name] = LentWindow(group, memories, lambda: dist.barrier(group))


def open_in_threads(groups: Sequence[Any]) -> None:
    """Windows for ranks that are threads; of each its own stand-in for a group."""
    barrier = threading.Barrier(len(groups))
    shared: dict[int, list[Tensor]] = {}
    lock = threading.Lock()

    def memories(num_bytes: int) -> list[Tensor]:
        with lock:
            return shared.setdefault(num_bytes, [torch.zeros(num_bytes, dtype=torch.uint8) for _ in groups])

    for group in groups:
        symmetric._WINDOWS[group.group_name] = LentWindow(group, memories, lambda: barrier.wait(timeout=60))

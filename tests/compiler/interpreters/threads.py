"""Ranks as threads of one process: collectives that exchange tensors in memory."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any, TypeVar

import torch

Answer = TypeVar("Answer")
_OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"sum": torch.add, "max": torch.maximum}


class Group:
    """A group of `size` threads. Stands where `torch.distributed.ProcessGroup` does."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._barrier = threading.Barrier(size, timeout=30)
        self._slots: list[torch.Tensor] = [torch.empty(0)] * size
        self._here = threading.local()

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._here.rank

    def all_reduce(self, x: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        self._slots[self.rank()] = x
        self._barrier.wait()
        result = reduce(_OPERATIONS[operation], self._slots[1:], self._slots[0].clone())
        self._barrier.wait()
        return result

    def run(self, work: Callable[[int], Answer]) -> list[Answer]:
        """What `work(rank)` gives in each thread."""

        def start(rank: int) -> Answer:
            self._here.rank = rank
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self._size) as pool:
            return [future.result() for future in [pool.submit(start, rank) for rank in range(self._size)]]


def all_reduce(x: torch.Tensor, group: Any, operation: str = "sum") -> torch.Tensor:
    """In the place of `collectives.all_reduce`."""
    return group.all_reduce(x, operation)

"""Tensor ranks of one host exchange tokens by copies between their GPUs' memories instead of by NCCL. Copy engines make
them, so that matrix products keep all multiprocessors, and the links run at full speed (torch's symmetric memory).

A rank writes what others need into its window, memory that all of them can read. After a barrier each copies what is
meant for it, on a stream of its own. A window has two halves, used in turn: a rank that passes the barrier of one
exchange knows that its peers have read what it lent for the one before the last.

n rows of a rank's piece, T ranks.
"""

import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch.distributed import ProcessGroup

Tensor = torch.Tensor
_ALIGNED = 512
# How an operator of one's own takes part in `wait_tensor`, the only wait that torch.compile knows; without type stubs.
_register: Callable[[Tensor, dist.Work], None] = getattr(torch._C, "_distributed_c10d")._register_work  # noqa: B009
WAIT = torch.ops._c10d_functional.wait_tensor.default


class _Copied(dist.Work):
    """That what a stream had been given at `event` is done."""

    def __init__(self) -> None:
        super().__init__()
        self.event = torch.cuda.Event()

    def wait(self, timeout: Any = None) -> bool:
        self.event.wait()
        return True


class Window:
    """What this rank lends to the others of `group`. They all call the same methods in the same order."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank, self.degree = group, group.rank(), group.size()
        self._half, self._half_bytes = 0, 0
        self._views: dict[tuple[Any, ...], Tensor] = {}
        self._open()

    @property
    def others(self) -> list[int]:
        """The other ranks, so ordered that at any time each is read by one."""
        return [(self.rank + step) % self.degree for step in range(1, self.degree)]

    def lend(self, pieces: Sequence[Tensor]) -> None:
        """Let the others read these, all of one shape and type."""
        self._settle()
        num_bytes = len(pieces) * pieces[0].nbytes
        if num_bytes > self._half_bytes:
            self._half_bytes = -(-num_bytes // _ALIGNED) * _ALIGNED
            self._views.clear()
            self._allocate()
        self._half = 1 - self._half
        for number, piece in enumerate(pieces):
            self.lent(self.rank, number, piece).copy_(piece)
        self._barrier()

    def lent(self, rank: int, number: int, like: Tensor) -> Tensor:
        """Piece `number` of what a rank lends, as a view of that rank's memory."""
        key = rank, number, self._half, like.shape, like.dtype
        if key not in self._views:
            start = self._half * self._half_bytes // like.element_size() + number * like.numel()
            self._views[key] = self._view(rank, like.shape, like.dtype, start)
        return self._views[key]

    def fetch(self, result: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy (to, from) beside the current stream, once that one has come here; who waits for `result` waits for it.

        Streams and events are made once, and set without a context manager: at this rate the processor's time counts.
        """
        self._arrived.record()
        self._arrived.wait(self._stream)
        main = torch.cuda.current_stream()
        torch.cuda.set_stream(self._stream)
        try:
            for to, source in pairs:
                to.copy_(source)
        finally:
            torch.cuda.set_stream(main)
        self._last = self._copied[self._half]
        self._last.event.record(self._stream)
        _register(result, self._last)

    def _open(self) -> None:
        self._stream, self._arrived = torch.cuda.Stream(), torch.cuda.Event()
        self._copied = _Copied(), _Copied()
        self._last = self._copied[0]
        self._memory: Any = None
        self._half_bytes = _ALIGNED
        self._allocate()

    def _settle(self) -> None:
        self._last.event.wait()

    def _allocate(self) -> None:
        """Both halves. What peers may still read is given up when all have come here."""
        torch.cuda.synchronize()
        if self._memory is not None:
            self._barrier()
            torch.cuda.synchronize()
        self._tensor = symmetric_memory.empty(2 * self._half_bytes, dtype=torch.uint8, device=torch.device("cuda"))
        self._memory = symmetric_memory.rendezvous(self._tensor, self.group.group_name)

    def _barrier(self) -> None:
        self._memory.barrier(channel=0)

    def _view(self, rank: int, shape: torch.Size, dtype: torch.dtype, start: int) -> Tensor:
        return self._memory.get_buffer(rank, shape, dtype, start)


_WINDOWS: dict[str, Window] = {}
"""By name of their group."""


def open_window(group: ProcessGroup) -> str | None:
    """From now on the group's tokens travel by copies; or why they cannot.

    Every process of the world calls this, for its own group, and all get one answer.
    """
    here = socket.gethostname(), torch.cuda.current_device()
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, here, group=group)
    problem = _agreed(_obstacle(here, places))
    if problem is None:
        try:
            window = Window(group)
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
        else:
            _WINDOWS[group.group_name] = window
        problem = _agreed(problem)
    if problem is not None:
        close_window(group)
    return problem


def close_window(group: ProcessGroup) -> None:
    """The group's tokens travel by its own collectives again; also where it has no window."""
    _WINDOWS.pop(group.group_name, None)


def _obstacle(here: tuple[str, int], places: list[tuple[str, int]]) -> str | None:
    """Of (host, GPU) of this rank and of all."""
    host, gpu = here
    for other_host, other in places:
        if other_host != host:
            return f"they are on several hosts, {host} and {other_host}"
        if other != gpu and not torch.cuda.can_device_access_peer(gpu, other):
            return f"GPU {gpu} cannot read the memory of GPU {other}"
    return None


def _agreed(problem: str | None) -> str | None:
    """The first rank's of those that have one."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), None)


def has_window(group: ProcessGroup) -> bool:
    return group.group_name in _WINDOWS


def all_gather(piece: Tensor, group: ProcessGroup) -> Tensor:
    """[n, ...] → [T n, ...]"""
    return WAIT(GATHER(piece, group.group_name))


def reduce_scatter(whole: Tensor, group: ProcessGroup) -> Tensor:
    """[T n, ...] → this rank's rows [n, ...] of the sum, added in at least float32."""
    fetched = WAIT(FETCH(whole, group.group_name))
    own = whole.chunk(group.size())[group.rank()]
    narrow = own.dtype.itemsize < 4
    total = own.float() if narrow else own
    for part in fetched.unbind():
        total = total + part
    # Never by a cast that changes nothing: torch.compile of 2.11 loses the gradients of a Function that returns one.
    return total.to(own.dtype) if narrow else total


# Not by torch.library.custom_op, whose checks take a processor longer than the copies take the link.
_library = torch.library.Library("archwright", "FRAGMENT")
_library.define("gather(Tensor piece, str group) -> Tensor")
_library.define("fetch(Tensor whole, str group) -> Tensor")


@torch.library.impl(_library, "gather", "CompositeExplicitAutograd")
def _gather(piece: Tensor, group: str) -> Tensor:
    """[n, ...] → [T n, ...], to be waited for."""
    window = _WINDOWS[group]
    window.lend((piece,))
    whole = piece.new_empty(window.degree * piece.shape[0], *piece.shape[1:])
    rows = whole.chunk(window.degree)
    window.fetch(whole, [(rows[rank], window.lent(rank, 0, piece)) for rank in window.others])
    rows[window.rank].copy_(piece)
    return whole


@torch.library.impl(_library, "fetch", "CompositeExplicitAutograd")
def _fetch(whole: Tensor, group: str) -> Tensor:
    """[T n, ...] → what the others have of this rank's rows [T - 1, n, ...], to be waited for."""
    window = _WINDOWS[group]
    rows = whole.chunk(window.degree)
    window.lend([row for rank, row in enumerate(rows) if rank != window.rank])
    fetched = whole.new_empty(window.degree - 1, *rows[0].shape)
    sources = [window.lent(rank, window.rank - (window.rank > rank), rows[0]) for rank in window.others]
    window.fetch(fetched, list(zip(fetched.unbind(), sources, strict=True)))
    return fetched


@torch.library.register_fake("archwright::gather")
def _(piece: Tensor, group: str) -> Tensor:
    return piece.new_empty(_WINDOWS[group].degree * piece.shape[0], *piece.shape[1:])


@torch.library.register_fake("archwright::fetch")
def _(whole: Tensor, group: str) -> Tensor:
    degree = _WINDOWS[group].degree
    return whole.new_empty(degree - 1, whole.shape[0] // degree, *whole.shape[1:])


GATHER, FETCH = torch.ops.archwright.gather.default, torch.ops.archwright.fetch.default
"""The operators as graphs have them."""

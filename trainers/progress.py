"""How far long work is: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_SECONDS_A_LINE = 10.0


@contextmanager
def byte_progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many more bytes are done. Writes to standard error."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total_bytes)
            yield lambda num_bytes: bar.advance(task, num_bytes)
    else:
        yield _Lines(what, total_bytes).advance


class _Lines:
    """A line now and then."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what = what
        self._total = max(1, total_bytes)
        self._done = 0
        self._next = time.monotonic() + _SECONDS_A_LINE

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS_A_LINE
            megabytes = f"{self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB"
            print(f"{self._what}: {megabytes} ({100 * self._done / self._total:.0f}%)", file=sys.stderr, flush=True)

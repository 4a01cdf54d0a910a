"""What `build` is doing: plain lines, and on a terminal a bar for TensorRT's phases."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from archwright.compiler.targets.tensorrt_progress import Phase


@dataclass(frozen=True, kw_only=True)
class Reporter:
    """say: of a step of the build; watch: of a phase of an engine's, from TensorRT's threads."""

    say: Callable[[str], None] = lambda message: None
    watch: Callable[[Phase], None] = lambda phase: None


@contextmanager
def reporter_to(stream: TextIO) -> Iterator[Reporter]:
    """Lines `build: ...` on a stream; where it is a terminal, a bar while an engine is built, else a line a step."""
    if stream.isatty():
        bar = _Bar(Console(file=stream))
        try:
            yield Reporter(say=bar.say, watch=bar.watch)
        finally:
            bar.close()  # it hides the cursor
        return

    def say(message: str) -> None:
        print(f"build: {message}", file=stream, flush=True)

    def watch(phase: Phase) -> None:
        if phase.steps is not None and phase.done:
            say(f"TensorRT: {phase.name.lower()}, step {phase.done} of {phase.steps}")

    yield Reporter(say=say, watch=watch)


class _Bar:
    """A bar that appears with a phase and vanishes with its end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def say(self, message: str) -> None:
        self.close()
        self._console.print(f"build: {message}", highlight=False, markup=False)

    def watch(self, phase: Phase) -> None:
        if phase.steps is None:
            self.close()
            return
        if self._progress is None:
            columns = (TextColumn("  {task.description}"), BarColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task(phase.name, total=phase.steps)
            self._progress.start()
        self._progress.update(self._task, completed=phase.done)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

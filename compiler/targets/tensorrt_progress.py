"""What TensorRT is doing while it builds: its phases to whoever watches, its messages to a log, and a way to stop."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from archwright.spec.files import atomic_write

Watch = Callable[["Phase"], None]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Where an outermost phase of a build stands. steps: None once it has ended."""

    name: str
    done: int
    steps: int | None


@dataclass(kw_only=True)
class BuildLog:
    """The messages of one build, a line each, as they came. Times stand in it, so no two builds give the same.

    folder: of the artifact, whose place on this machine is left out.
    """

    folder: Path | None = None
    lines: list[str] = field(default_factory=list[str])

    def add(self, severity: str, message: str) -> None:
        text = message if self.folder is None else message.replace(f"{self.folder}/", "")
        self.lines += [f"{severity:<8} {line.rstrip()}" for line in text.splitlines() if line.strip()]

    def write(self, path: Path) -> None:
        atomic_write(path, "".join(f"{line}\n" for line in self.lines))


@cache
def shared_logger(trt: ModuleType) -> Any:
    """One logger a process: TensorRT keeps the first it sees and complains about others.

    `messages` collects errors; `log_to`, where it is set, receives everything from INFO on.
    """
    shown = {
        getattr(trt.ILogger, name): name.lower().replace("internal_", "")
        for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")
        if hasattr(trt.ILogger, name)
    }

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []
            self.log_to: BuildLog | None = None

        def log(self, severity: Any, msg: str) -> None:
            name = shown.get(severity)
            if name == "error":
                self.messages.append(msg.strip())
            if name is not None and self.log_to is not None:
                self.log_to.add(name, msg)

    return Collector()


def monitor(trt: ModuleType, watch: Watch, stop: threading.Event) -> Any:
    """TensorRT's IProgressMonitor: tells `watch` of the outermost phases, and ends the build once `stop` is set.

    TensorRT calls it from several threads.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self._lock = threading.Lock()
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = num_steps
                self._tell(Phase(name=phase_name, done=0, steps=num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                self._tell(Phase(name=phase_name, done=step + 1, steps=self._steps[phase_name]))
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if (steps := self._steps.pop(phase_name, None)) is not None:
                self._tell(Phase(name=phase_name, done=steps, steps=None))

        def _tell(self, phase: Phase) -> None:
            with self._lock:
                watch(phase)

    return Monitor()


def interruptible(call: Callable[[], Any], stop: threading.Event) -> Any:
    """The result of `call`, which runs in a thread of its own, so that Ctrl-C is noticed while C++ code computes.

    Interrupted, it sets `stop`, waits until `call` has ended, and raises KeyboardInterrupt.
    """
    results: list[Any] = []
    failures: list[BaseException] = []
    ended = threading.Event()  # not `is_alive`, which is false while a thread that was interrupted in `start` begins

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    def wait() -> None:
        while not ended.wait(0.2):  # a wait without a limit would hold the signal back
            pass

    try:
        threading.Thread(target=run, name="tensorrt-build").start()
        wait()
    except KeyboardInterrupt:
        stop.set()
        wait()
        raise
    if failures:
        raise failures[0]
    return results[0]

"""What `train` shows: a progress line on a terminal, plain lines elsewhere, and always plain lines in log.txt."""

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_COLUMNS = (
    TextColumn("step"),
    MofNCompleteColumn(),
    BarColumn(),
    TextColumn("{task.fields[text]}"),
    TextColumn("ETA"),
    TimeRemainingColumn(),
)


class Reporter:
    """Shows a training of `steps` steps, of which `done` are behind."""

    def __init__(self, run: Path, *, steps: int, done: int, log_every: int) -> None:
        self._log = (run / "log.txt").open("a")
        self._steps, self._log_every = steps, log_every
        self._first, self._started = done, time.monotonic()
        self._bar = Progress(*_COLUMNS, console=Console()) if sys.stdout.isatty() else None
        if self._bar is not None:
            self._task = self._bar.add_task("train", total=steps, completed=done, text="")
            self._bar.start()

    def say(self, text: str) -> None:
        """A line for the console and the log."""
        self._log.write(text + "\n")
        self._log.flush()
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def step(self, record: dict[str, Any]) -> None:
        step = record["step"]
        text = f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        if "validation_loss" in record:
            bits = record.get("validation_bits_per_byte")
            extra = f"  {bits:.4f} bits/byte" if bits is not None else ""
            self.say(f"step {step}/{self._steps}  validation loss {record['validation_loss']:.4f}{extra}")
        if step % self._log_every == 0 or step == self._steps:
            norm, rate = f"{record['grad_norm']:.3f}", f"{record['learning_rate']:.2e}"
            line = f"step {step}/{self._steps}  {text}  grad norm {norm}  lr {rate}  ETA {self._eta(step)}"
            self._log.write(line + "\n")
            self._log.flush()
            if self._bar is None:
                print(line, flush=True)

    def _eta(self, step: int) -> str:
        done = max(1, step - self._first)
        seconds = round((time.monotonic() - self._started) / done * (self._steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._log.close()

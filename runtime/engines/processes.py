"""Starts the ranks: one in a thread of this process, several in a process each, as NCCL wants them."""

import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from archwright.runtime.engines.mailbox import Mailbox, Message, ThreadMailbox, read_message, write_message
from archwright.runtime.engines.ranks import Ranks, RankServer
from archwright.spec import ArchwrightError

CUDA = "archwright.runtime.engines.cuda:machine"
_END_S = 5.0


class ProcessMailbox:
    """A rank in a process (`engines.worker`). Its stderr is this process's."""

    def __init__(self, command: list[str]) -> None:
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends the ranks.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._answers: queue.Queue[Message] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while (message := read_message(self._process.stdout)) is not None:
            self._answers.put(message)
        status = self._process.wait()
        message = f"the rank's process ended with status {status}"
        error = {"code": "RUN048", "message": message, "where": None, "help": "its own words stand above, on stderr"}
        self._answers.put(Message(kind="error", fields=error))

    def post(self, message: Message) -> None:
        assert self._process.stdin is not None
        try:
            write_message(self._process.stdin, message)
        except BrokenPipeError:
            pass  # the reader tells how the process ended

    def take(self, timeout_s: float) -> Message | None:
        try:
            return self._answers.get(timeout=timeout_s) if timeout_s > 0 else self._answers.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """A rank that waits for others in a collective does not end by itself."""
        self._process.kill()
        self._process.wait(_END_S)
        self._reader.join(_END_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass  # what it did not read


def start_ranks(world: int, machine: str = CUDA) -> Ranks:
    """The ranks of an artifact, not opened yet. machine: see `engines.worker`.

    Raises ArchwrightError RUN048 where processes cannot be started.
    """
    if world == 1:
        from archwright.runtime.engines.cuda import machine as cuda

        return Ranks([ThreadMailbox(lambda: RankServer(lambda place: cuda(place, 1, "")).handle, 0)])
    folder = tempfile.TemporaryDirectory(prefix="archwright-ranks-")
    mailboxes: list[Mailbox] = []
    try:
        for rank in range(world):
            mailboxes.append(ProcessMailbox(_command(rank, world, Path(folder.name) / "rendezvous", machine)))
    except OSError as error:
        for mailbox in mailboxes:
            mailbox.close()
        message = f"a process for each of {world} ranks cannot be started: {error.strerror or error}"
        raise ArchwrightError("RUN048", message, help="free memory or processes, and try again") from error
    return _Started(mailboxes, release=folder.cleanup)


def _command(rank: int, world: int, rendezvous: Path, machine: str) -> list[str]:
    values: dict[str, Any] = {"rank": rank, "world": world, "rendezvous": rendezvous, "machine": machine}
    options = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "archwright.runtime.engines.worker", *options]


class _Started(Ranks):
    """Ranks whose rendezvous goes when they end."""

    def __init__(self, mailboxes: list[Mailbox], *, release: Callable[[], None]) -> None:
        super().__init__(mailboxes)
        self._release = release

    def close(self) -> None:
        super().close()
        self._release()

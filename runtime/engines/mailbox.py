"""Messages to a rank and back: a kind, plain JSON fields and named arrays. Nothing is pickled, and nothing executed."""

import json
import queue
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from archwright.spec import ArchwrightError

Array = NDArray[Any]
_LENGTH = struct.Struct("<Q")
_TYPES = ("int64", "float32")


@dataclass(frozen=True, kw_only=True)
class Message:
    kind: str
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    arrays: dict[str, Array] = field(default_factory=dict[str, Array])


def failure(error: BaseException) -> Message:
    """The answer of a rank that failed."""
    if isinstance(error, ArchwrightError):
        found = {"code": error.code, "message": error.message, "where": error.where, "help": error.help}
    else:
        found = {"code": "RUN048", "message": f"{type(error).__name__}: {error}", "where": None, "help": None}
    return Message(kind="error", fields=found)


def raise_failure(message: Message, rank: int) -> None:
    """Raise what `failure` told of."""
    found = message.fields
    where = found["where"] or f"rank{rank}"
    raise ArchwrightError(found["code"], found["message"], where=where, help=found["help"])


def write_message(stream: IO[bytes], message: Message) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in message.arrays.items()}
    assert all(str(array.dtype) in _TYPES for array in arrays.values())
    shapes = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    header = json.dumps({"kind": message.kind, "fields": message.fields, "arrays": shapes}).encode()
    stream.write(_LENGTH.pack(len(header)) + header)
    for array in arrays.values():
        stream.write(array.tobytes())
    stream.flush()


def read_message(stream: IO[bytes]) -> Message | None:
    """The next message; None at the end of the stream."""
    size = stream.read(_LENGTH.size)
    if len(size) < _LENGTH.size:
        return None
    header = json.loads(stream.read(_LENGTH.unpack(size)[0]))
    arrays: dict[str, Array] = {}
    for name, (dtype, shape) in header["arrays"].items():
        assert dtype in _TYPES
        count = int(np.prod(shape, dtype=np.int64))
        content = stream.read(count * np.dtype(dtype).itemsize)
        arrays[name] = np.frombuffer(content, dtype).reshape(shape)
    return Message(kind=header["kind"], fields=header["fields"], arrays=arrays)


class Mailbox(Protocol):
    """A rank that does what it is told, in order, and answers every message once."""

    def post(self, message: Message) -> None: ...

    def take(self, timeout_s: float) -> Message | None:
        """The next answer; None where there is none within the time."""
        ...

    def close(self) -> None:
        """End the rank, whatever it is doing."""
        ...


class ThreadMailbox:
    """A rank in a thread of this process. handle: answers a message; made in the thread by `start`.

    A thread that hangs cannot be ended; it does not keep the process alive either.
    """

    def __init__(self, start: Callable[[], Callable[[Message], Message]], rank: int) -> None:
        self._posted: queue.Queue[Message | None] = queue.Queue()
        self._answers: queue.Queue[Message] = queue.Queue()
        threading.Thread(target=self._serve, args=(start,), name=f"rank{rank}", daemon=True).start()

    def _serve(self, start: Callable[[], Callable[[Message], Message]]) -> None:
        handle = start()
        while (message := self._posted.get()) is not None:
            try:
                answer = handle(message)
            except Exception as error:
                answer = failure(error)
            self._answers.put(answer)

    def post(self, message: Message) -> None:
        self._posted.put(message)

    def take(self, timeout_s: float) -> Message | None:
        try:
            return self._answers.get(timeout=timeout_s) if timeout_s > 0 else self._answers.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        self._posted.put(None)

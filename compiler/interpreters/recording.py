"""Any interpreter, with the result of every operation kept: what `verify --bisect` compares.

All interpreters run the same `forward`, so the i-th result of one belongs to the i-th result of every other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from archwright.compiler.ir import Ops

OPERATIONS = frozenset(name for name in vars(Ops) if not name.startswith("_")) - {"dequantize"}
"""What is recorded, beside the arithmetic of blocks; the rest (parameters, scopes) is passed through."""


@dataclass(frozen=True)
class Recorded:
    """An interpreter's value on its way through the blocks."""

    value: Any
    recording: "Recording"

    def __add__(self, other: Any) -> "Recorded":
        return self.recording.note(self.value + plain(other))

    def __mul__(self, other: Any) -> "Recorded":
        return self.recording.note(self.value * plain(other))


class Recording:
    """Stands in for an interpreter's ops.

    results: what they gave since `begin`, in program order. With `instead` the blocks go on with these values in place
    of the results, so that no operation inherits another's error.
    """

    def __init__(self, ops: Any) -> None:
        self._ops = ops
        self.begin()

    def begin(self, instead: Sequence[Any] | None = None) -> None:
        """Forget what was recorded, before the Program is run once more."""
        self.results: list[Any] = []
        self._instead = instead

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._ops, name)
        if name not in OPERATIONS:
            return value

        def run(*args: Any, **options: Any) -> Recorded:
            return self.note(value(*map(plain, args), **{key: plain(each) for key, each in options.items()}))

        return run

    def given(self, value: Any) -> Recorded:
        """A value that no operation made: what a pipeline stage is handed."""
        return Recorded(value, self)

    def note(self, value: Any) -> Recorded:
        self.results.append(value)
        value = value if self._instead is None else self._instead[len(self.results) - 1]
        return Recorded(value, self)


def plain(value: Any) -> Any:
    """The interpreter's own value."""
    return value.value if isinstance(value, Recorded) else value

"""What a rank needs of its device and of the other ranks. The methods of an engine are TensorRT's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from archwright.compiler.targets.tensorrt_loader import Flavor

Array = NDArray[Any]


class Memory(Protocol):
    """Bytes on a device."""

    @property
    def address(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...


class Device(Protocol):
    """A device with one stream, on which everything happens in order."""

    @property
    def description(self) -> str: ...

    @property
    def stream(self) -> int:
        """Its handle, as TensorRT takes it."""
        ...

    def allocate(self, num_bytes: int) -> Any:
        """Zeroed memory: a masked cache row has weight 0, but 0 · NaN would be NaN."""
        ...

    def write(self, memory: Any, array: Array) -> None:
        """Copy an array to the beginning of `memory`."""
        ...

    def read(self, memory: Any, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        """Wait for the stream, and copy from the beginning of `memory`."""
        ...

    def deserialize(self, content: bytes, *, library: Flavor, host_code: bool) -> Any:
        """TensorRT's ICudaEngine. Raises ArchwrightError RUN045 where TensorRT refuses it.

        library: `tensorrt` or `tensorrt_rtx`, which built it. host_code: whether the engine brings code for the host
        along, as version-compatible ones do.
        """
        ...

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what `enqueue` puts on the stream as a CUDA graph, without running it; the result replays it."""
        ...


class Peers(Protocol):
    """The other ranks. Every rank makes the same calls in the same order."""

    def communicator(self, ranks: Sequence[int]) -> Any:
        """A capsule of the ncclComm_t over these ranks, this one among them."""
        ...

    def send(self, memory: Any, num_bytes: int, to: int) -> None: ...

    def receive(self, memory: Any, num_bytes: int, source: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands: rank r computes stage r // per_stage, with the `per_stage` ranks of that stage."""

    rank: int
    stages: int
    per_stage: int

    @property
    def stage(self) -> int:
        return self.rank // self.per_stage

    @property
    def group(self) -> tuple[int, ...]:
        """The ranks of this stage."""
        first = self.stage * self.per_stage
        return tuple(range(first, first + self.per_stage))

    @property
    def before(self) -> int | None:
        """The rank that hands over what this one begins with."""
        return None if self.stage == 0 else self.rank - self.per_stage

    @property
    def after(self) -> int | None:
        return None if self.stage == self.stages - 1 else self.rank + self.per_stage

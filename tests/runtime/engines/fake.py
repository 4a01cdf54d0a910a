"""Ranks without a GPU: host memory, and engines that compute a rank's Program with the NumPy interpreter.

A fake engine has TensorRT's methods (ICudaEngine, IExecutionContext), and reads and writes at the addresses that are
bound: whatever is bound wrongly gives wrong numbers. Ranks are threads; their all-reduce is a barrier.
"""

import ctypes
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from archwright.compiler.interpreters.numpy_ops import NumpyOps
from archwright.compiler.ir import Plan, Step
from archwright.compiler.ir.program import instance_of
from archwright.compiler.targets.stages import Stage
from archwright.runtime.engines.binding import BindingTable
from archwright.runtime.engines.device import Array, Place
from archwright.spec.models import Profile

PATIENCE_S = 20.0
"""How long a thread of a rank waits for another before it ends, so that no test leaves threads behind for ever."""


class HostMemory:
    def __init__(self, num_bytes: int) -> None:
        self._bytes = np.zeros(max(1, num_bytes), np.uint8)
        self.address, self.num_bytes = self._bytes.ctypes.data, num_bytes


def at(address: int, shape: Sequence[int], dtype: Any) -> Array:
    """The array that lies at an address."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_ubyte * num_bytes).from_address(address), dtype).reshape(shape)


@dataclass
class World:
    """What the ranks of an artifact share. engines: what rank r deserializes."""

    per_stage: int
    engines: list["FakeEngine"] = field(default_factory=list)
    _groups: dict[int, tuple[threading.Barrier, list[Any]]] = field(default_factory=dict)
    _sent: dict[tuple[int, int], "queue.Queue[bytes]"] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def group(self, stage: int) -> tuple[threading.Barrier, list[Any]]:
        with self._lock:
            new = (threading.Barrier(self.per_stage), [None] * self.per_stage)
            return self._groups.setdefault(stage, new)

    def line(self, source: int, to: int) -> "queue.Queue[bytes]":
        with self._lock:
            return self._sent.setdefault((source, to), queue.Queue())

    def machine(self, place: Place) -> tuple["FakeDevice", "FakePeers"]:
        return FakeDevice(self.engines[place.rank]), FakePeers(self, place)


@dataclass
class FakeCommunicator:
    """Sums over the ranks of a stage; each waits for the others."""

    world: World
    place: Place

    def meet(self) -> None:
        self.world.group(self.place.stage)[0].wait(PATIENCE_S)

    def all_reduce(self, x: Array) -> Array:
        barrier, slots = self.world.group(self.place.stage)
        slots[self.place.rank % self.place.per_stage] = x
        barrier.wait(PATIENCE_S)
        total = sum(slots[1:], slots[0])
        barrier.wait(PATIENCE_S)
        return total


@dataclass
class FakePeers:
    world: World
    place: Place

    def communicator(self, ranks: Sequence[int]) -> FakeCommunicator:
        assert self.place.rank in ranks
        return FakeCommunicator(self.world, self.place)

    def send(self, memory: HostMemory, num_bytes: int, to: int) -> None:
        self.world.line(self.place.rank, to).put(at(memory.address, [num_bytes], np.uint8).tobytes())

    def receive(self, memory: HostMemory, num_bytes: int, source: int) -> None:
        content = self.world.line(source, self.place.rank).get(timeout=PATIENCE_S)
        at(memory.address, [num_bytes], np.uint8)[:] = np.frombuffer(content, np.uint8)


@dataclass
class FakeDevice:
    """stream: a number, as TensorRT takes it; everything happens at once."""

    engine: "FakeEngine"
    stream: int = 77
    description: str = "host memory"
    replays: int = 0
    _recording: list[Callable[[], None]] | None = None

    def allocate(self, num_bytes: int) -> HostMemory:
        return HostMemory(num_bytes)

    def write(self, memory: HostMemory, array: Array) -> None:
        assert array.nbytes <= memory.num_bytes
        at(memory.address, array.shape, array.dtype)[...] = array

    def read(self, memory: HostMemory, shape: Sequence[int], dtype: Any) -> Array:
        return at(memory.address, shape, dtype).copy()

    def deserialize(self, content: bytes, *, library: str, host_code: bool) -> "FakeEngine":
        assert content and not host_code, "an engine file is not empty"
        self.engine.device = self
        return self.engine

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self._recording = recorded = []
        enqueue()
        self._recording = None

        def replay() -> None:
            self.replays += 1
            for call in recorded:
                call()

        return replay

    def run(self, call: Callable[[], None]) -> None:
        """Now, or with every replay of what is being captured."""
        if self._recording is None:
            call()
        else:
            self._recording.append(call)


class RankOps(NumpyOps):
    """The oracle's ops for local sizes: what is cut over ranks is summed through the communicator."""

    def __init__(self, weights: Mapping[str, Array], cache: dict[tuple[str, str], Array], communicator: Any) -> None:
        super().__init__(weights, cache)
        self._communicator = communicator

    def linear(self, x: Array, weight: Array, bias: Any, *, reduce: Any, gather: Any = None) -> Array:
        y = x @ weight.T
        if reduce is not None:
            if self._communicator is None:  # NCCL waits for ever
                threading.Event().wait(PATIENCE_S)
                raise RuntimeError("no communicator")
            y = self._communicator.all_reduce(y)
        return y if bias is None else y + bias


def named(name: str) -> Any:
    """A member of one of TensorRT's enumerations, of which only the name is read."""
    return SimpleNamespace(name=name)


@dataclass
class FakeEngine:
    """TensorRT's ICudaEngine. stage: of the rank, of local sizes. table: read off the graph that the exporter wrote."""

    stage: Stage
    weights: Mapping[str, Array]
    table: BindingTable
    profiles: Sequence[Profile]
    device: Any = None

    @property
    def num_io_tensors(self) -> int:
        return len(self.table.bindings)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.table.bindings)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return named("INPUT" if self.table.bindings[name].is_input else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        return named(self.table.bindings[name].engine_type)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(dim, str) else dim for dim in self.table.bindings[name].dims)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return next((past for past, present in self.table.caches.items() if present == name), None)

    def create_execution_context(self) -> "FakeContext":
        return FakeContext(self)


class FakeContext:
    """TensorRT's IExecutionContext."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile: Profile | None = None
        self.communicator: FakeCommunicator | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == self.engine.device.stream
        self.profile = self.engine.profiles[index]
        return True

    def set_communicator(self, communicator: FakeCommunicator) -> bool:
        communicator.meet()
        self.communicator = communicator
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        assert self.profile is not None
        for dim, size in zip(self.engine.table.bindings[name].dims, shape, strict=True):
            if isinstance(dim, str):
                limits = getattr(self.profile, dim)
                if not limits.min <= size <= limits.max:
                    return False
            elif dim != size:
                return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.table.bindings

    def is_stream_capturable(self, stream: int) -> bool:
        return stream == self.engine.device.stream

    def execute_async_v3(self, stream: int) -> bool:
        inputs = {name for name, binding in self.engine.table.bindings.items() if binding.is_input}
        if stream != self.engine.device.stream or inputs != self.shapes.keys():
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)  # a captured graph keeps those of its capture
        self.engine.device.run(lambda: self._compute(shapes, addresses))
        return True

    def _compute(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        engine, table = self.engine, self.engine.table

        def array(name: str, shape: Sequence[int]) -> Array:
            # The engine has types of its own: what is bound as another type is read as this one.
            types = {"INT64": np.dtype(np.int64), "FLOAT": np.dtype(np.float32), "HALF": np.dtype(np.float16)}
            kind = table.bindings[name].engine_type
            return at(addresses[name], shape, types.get(kind, table.bindings[name].dtype))

        given = {name: array(name, shape) for name, shape in shapes.items()}
        cache = {key: given[f"past.{name}"].astype(np.float64) for key, name in engine.stage.caches.items()}
        step = Step(
            positions_BS=given["position_ids"],
            write_index_B=given["write_index"],
            kv_positions_L=given["kv_positions"],
            logit_index_B=given.get("logit_index"),
        )
        source = given["hidden"].astype(np.float64) if table.takes_hidden else given["input_ids"]
        ops = RankOps(engine.weights, cache, self.communicator)
        program = engine.stage.program
        y = program.run(instance_of(program, ops, engine.stage.sites), source, step)
        array(table.output, y.shape)[...] = y
        for key, name in engine.stage.caches.items():
            array(f"present.{name}", cache[key].shape)[...] = cache[key]


def local_weights(plan: Plan, weights: Any, rank: int) -> dict[str, Array]:
    """What a rank of a tensor group has of every parameter."""
    found: dict[str, Array] = {}
    for name, param in plan.program.params().items():
        whole = weights.read(name)
        found[name] = whole if param.split is None else whole[param.split.slices(param.shape, rank)]
    return found

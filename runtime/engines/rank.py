"""One rank: an engine with its contexts, the memory that is bound to it, and its steps.

B batch, S sequence, L visible cache positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archwright.runtime.engines.binding import HIDDEN, BindingTable, differences
from archwright.runtime.engines.device import Device, Peers, Place
from archwright.spec import ArchwrightError
from archwright.spec.models import Profile

Array = NDArray[Any]
Key = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One step of all ranks: the graphs' index inputs. visible: L."""

    ids_BS: Array
    positions_BS: Array
    write_index_B: Array
    visible: int
    logit_index_B: Array

    @property
    def sizes(self) -> dict[str, int]:
        batch, sequence = self.ids_BS.shape
        return {"batch": batch, "sequence": sequence, "positions": self.visible}

    def arrays(self) -> dict[str, Array]:
        """By the names of the inputs."""
        return {
            "input_ids": self.ids_BS,
            "position_ids": self.positions_BS,
            "write_index": self.write_index_B,
            "kv_positions": np.arange(self.visible),
            "logit_index": self.logit_index_B,
        }


def choose_profile(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """The profile with the shortest sequences of those that hold a step: for one token the one made for decoding.

    Raises ArchwrightError RUN047 where there is none.
    """
    fitting = [
        (profile.sequence.max, index)
        for index, profile in enumerate(profiles)
        if all(getattr(profile, name).min <= size <= getattr(profile, name).max for name, size in sizes.items())
    ]
    if fitting:
        return min(fitting)[1]
    asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
    raise ArchwrightError(
        "RUN047",
        f"no profile of the engines holds a step of {asked}",
        help="build again with a profile in `build.profiles` that does; by default there are two that hold every step",
    )


class _Context:
    """An execution context with its profile, and the last step that was captured as a CUDA graph.

    A captured graph goes with the shapes and addresses that its context has at that moment, so each context keeps one.
    """

    def __init__(self, context: Any) -> None:
        self.context = context
        self.seen: Key | None = None
        self.replay: Any = None


class Rank:
    """Runs the steps of one rank. Its calls are those of TensorRT 11 (ICudaEngine, IExecutionContext)."""

    def __init__(
        self,
        *,
        place: Place,
        table: BindingTable,
        engine: Any,
        device: Device,
        peers: Peers,
        profiles: Sequence[Profile],
    ) -> None:
        """Raises ArchwrightError RUN046 where the engine's tensors are not the graph's.

        Collective where a stage has several ranks: `set_communicator` waits until each has called it.
        """
        self.place, self.table = place, table
        self._device, self._peers, self._profiles = device, peers, profiles
        self._caches: dict[int, dict[str, Any]] = {}
        self._buffers: dict[str, Any] = {}
        found = list(differences(table, engine))
        if engine.num_optimization_profiles != len(profiles):
            found.append(f"it has {engine.num_optimization_profiles} profiles, the manifest says {len(profiles)}")
        if found:
            help = "build the artifact again; its engine and its graph are of different builds"
            raise ArchwrightError("RUN046", "; ".join(found), where=f"rank{place.rank}", help=help)
        self._engine = engine  # contexts need it to live
        communicator = peers.communicator(place.group) if place.per_stage > 1 else None
        self._contexts: list[_Context] = []
        for index in range(len(profiles)):
            context = engine.create_execution_context()
            self._accepted(context is not None, "create_execution_context")
            self._accepted(context.set_optimization_profile_async(index, device.stream), f"profile {index}")
            if communicator is not None:
                self._accepted(context.set_communicator(communicator), "set_communicator")
            self._contexts.append(_Context(context))

    def new_cache(self, number: int, batch: int) -> None:
        """Memory for the caches of `batch` rows; steps name it by `number`."""
        self._caches[number] = {
            past: self._device.allocate(self.table.bindings[past].num_bytes({"batch": batch}))
            for past in self.table.caches
        }

    def free_cache(self, number: int) -> None:
        """Its memory is used no more."""
        del self._caches[number]
        for each in self._contexts:
            if each.seen is not None and each.seen[0] == number:
                each.seen, each.replay = None, None

    def step(self, number: int, inputs: StepInputs) -> None:
        """Compute a step on the cache `number`; what the stage gives goes to the next one, or stays for `output`.

        Raises ArchwrightError RUN047 to RUN049.
        """
        sizes = inputs.sizes
        self._check_room(number, inputs)
        chosen = self._contexts[choose_profile(self._profiles, sizes)]
        addresses = self._feed(number, inputs, sizes)
        self._shape(chosen.context, sizes, addresses)
        key: Key = (number, tuple(sizes.values()), tuple(addresses.values()))
        if chosen.seen != key:  # the first step of a shape is not captured: TensorRT still prepares it
            chosen.seen, chosen.replay = key, None
            self._enqueue(chosen.context)
        elif sizes["sequence"] == 1 and self._capturable(chosen.context):
            if chosen.replay is None:
                chosen.replay = self._device.capture(lambda: self._enqueue(chosen.context))
            chosen.replay()
        else:
            self._enqueue(chosen.context)
        if self.place.after is not None:
            given = self.table.given
            self._peers.send(self._buffers[given.name], given.num_bytes(sizes), self.place.after)

    def _capturable(self, context: Any) -> bool:
        """Not every engine of TensorRT for RTX is, and it says so; a library without the question is not asked."""
        asked = getattr(context, "is_stream_capturable", None)
        return asked is None or asked(self._device.stream)

    def output(self, inputs: StepInputs) -> Array:
        """What the stage gave in its last step, in float32."""
        given = self.table.given
        array = self._device.read(self._buffers[given.name], given.shape(inputs.sizes), given.dtype)
        return array.astype(np.float32)

    def _check_room(self, number: int, inputs: StepInputs) -> None:
        """TensorRT drops what is written outside a cache, without a word."""
        capacity = self.table.capacity
        end = int(inputs.write_index_B.max()) + inputs.ids_BS.shape[1]
        rows = self._caches[number][next(iter(self.table.caches))].num_bytes
        fits = rows == self.table.bindings[next(iter(self.table.caches))].num_bytes(inputs.sizes)
        if not fits or inputs.write_index_B.min() < 0 or end > capacity or not 1 <= inputs.visible <= capacity:
            raise ArchwrightError(
                "RUN049",
                f"a step of {len(inputs.ids_BS)} rows that writes up to position {end} and sees {inputs.visible} does "
                f"not fit its cache of {capacity}",
                help="generate fewer tokens, or build with a larger build.max_positions",
            )

    def _feed(self, number: int, inputs: StepInputs, sizes: Mapping[str, int]) -> dict[str, int]:
        """Fill the inputs, and give the address of every tensor. A cache has one, coming in and going out."""
        arrays = inputs.arrays()
        addresses: dict[str, int] = {}
        for name, binding in self.table.bindings.items():
            if name in self.table.caches:
                addresses[name] = addresses[self.table.caches[name]] = self._caches[number][name].address
            elif name not in self.table.caches.values():
                memory = self._buffer(name, binding.num_bytes(sizes))
                addresses[name] = memory.address
                if name == HIDDEN and binding.is_input:
                    assert self.place.before is not None, "a stage that takes `hidden` has one before it"
                    self._peers.receive(memory, binding.num_bytes(sizes), self.place.before)
                elif binding.is_input:
                    self._device.write(memory, np.ascontiguousarray(arrays[name], binding.dtype))
        return addresses

    def _buffer(self, name: str, num_bytes: int) -> Any:
        """Memory of at least this size, the same as before where that is large enough."""
        if name not in self._buffers or self._buffers[name].num_bytes < num_bytes:
            self._buffers[name] = self._device.allocate(num_bytes)
        return self._buffers[name]

    def _shape(self, context: Any, sizes: Mapping[str, int], addresses: Mapping[str, int]) -> None:
        for name, binding in self.table.bindings.items():
            if binding.is_input:
                shape = binding.shape(sizes)
                self._accepted(context.set_input_shape(name, shape), f"shape {list(shape)} of `{name}`")
            self._accepted(context.set_tensor_address(name, addresses[name]), f"address of `{name}`")

    def _enqueue(self, context: Any) -> None:
        self._accepted(context.execute_async_v3(self._device.stream), "execute_async_v3")

    def _accepted(self, accepted: bool, what: str) -> None:
        if not accepted:
            help = "run `archwright verify --on-target` on the artifact; it says which rank fails"
            message = f"TensorRT refuses: {what}"
            raise ArchwrightError("RUN048", message, where=f"rank{self.place.rank}", help=help)

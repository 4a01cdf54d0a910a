"""The oracle, PyTorch and ONNX Runtime run step by step, each with the result of every operation kept.

A target computes each operation from the oracle's values of what it reads, so that errors do not add up: an operation
that differs is itself wrong. The targets' caches are their own.

B batch, S sequence, L visible cache positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from archwright.compiler.interpreters.numpy_ops import NumpyOps, make_cache
from archwright.compiler.interpreters.recording import Recording, plain
from archwright.compiler.ir import Degrees, Program, Split, Step
from archwright.compiler.ir.program import instance_of
from archwright.compiler.passes import build_passes, run_passes
from archwright.compiler.targets.merge import merge_ranks
from archwright.compiler.targets.onnx_graph import emit_graph
from archwright.compiler.targets.retype import as_float32
from archwright.compiler.weights.streaming import Weights
from archwright.runtime.artifact import Artifact
from archwright.runtime.backends.base import AnyBackend
from archwright.runtime.backends.onnxruntime_backend import bucketed, open_graphs, open_session, session_options
from archwright.spec import Spec

Array = NDArray[Any]
LOGITS = "logits"
"""The last of the names: what the whole Program gives, each operation on the values of those before it."""
CUT = "oracle/"
"""Before the names of the inputs that take the place of a graph's own values."""


@dataclass(frozen=True)
class Call:
    """S more tokens in each of B rows, as in `Backend.forward`.

    new_cache: positions of an empty cache to begin with; 0 goes on with the last call's.
    """

    name: str
    ids_BS: Array
    positions_BS: Array
    write_index_B: Array
    visible: int
    new_cache: int = field(default=0, kw_only=True)


def operation_names(spec: Spec, *, degree: int) -> tuple[str, ...]:
    """The name of every operation of a spec's Program, in order: those of the nodes that the exporter would write."""
    plan = run_passes(spec, Degrees(tensor=degree), passes=build_passes(spec))
    graph = emit_graph(plan.local, precision=spec.build.precision, capacity=1, degrees={"tensor": degree})
    return (*graph.operations, LOGITS)


class OracleRun:
    """NumPy in float64."""

    def __init__(self, program: Program, weights: Weights) -> None:
        self._program = program
        self._arrays = {name: weights.read(name) for name in program.params()}
        self._cache: dict[tuple[str, str], Array] = {}

    def run(self, call: Call) -> list[Array]:
        """The value of each operation, then the logits."""
        if call.new_cache:
            self._cache = make_cache(self._program, batch=len(call.ids_BS), positions=call.new_cache)
        step = Step(
            positions_BS=call.positions_BS, write_index_B=call.write_index_B, kv_positions_L=np.arange(call.visible)
        )
        recording: Any = Recording(NumpyOps(self._arrays, self._cache))
        logits = plain(self._program.run(instance_of(self._program, recording), call.ids_BS, step))
        return [*recording.results, logits]


class Recorder(ABC):
    """Runs the calls on a target, each operation on the oracle's values of what it reads.

    backend: runs the model as a user does; its logits stand behind the operations' values.
    """

    def __init__(self, backend: AnyBackend) -> None:
        self.backend = backend
        self._backend_cache: Any = None

    def adapted(self, call: Call) -> Call:
        """The call as this target makes it: it may hand itself more cache rows than are visible."""
        return call

    def run(self, call: Call, expected: Sequence[Array]) -> list[Sequence[Array | None]]:
        """The value of each operation, then the logits, on each rank, or once where the ranks share it.

        expected: what `OracleRun.run` gave. None stands for a value that the target does not have.
        """
        if call.new_cache:
            self._backend_cache = self.backend.new_cache(len(call.ids_BS), call.new_cache)
        logits = self.backend.forward(
            self._backend_cache, call.ids_BS, call.positions_BS, call.write_index_B, call.visible
        )
        return [*self.operations(call, expected[:-1]), (logits,)]

    @abstractmethod
    def operations(self, call: Call, expected: Sequence[Array]) -> Iterator[Sequence[Array | None]]:
        """The values of the operations alone."""


class TorchRun(Recorder):
    """PyTorch in float32 on the CPU, as `open_model` runs a model folder there."""

    def __init__(self, program: Program, weights: Weights) -> None:
        import torch  # an artifact is compared where PyTorch is not installed, too

        from archwright.compiler.interpreters.torch_module import TorchProgram
        from archwright.compiler.interpreters.torch_ops import TorchOps
        from archwright.compiler.module import as_torch
        from archwright.runtime.backends.torch_backend import TorchBackend

        self._torch = torch
        ops = TorchOps(dtype=torch.float32)
        self._recording: Any = Recording(ops)
        plainly, self._module = (
            TorchProgram(program, each, dtype=torch.float32, device="cpu").requires_grad_(False)
            for each in (ops, self._recording)
        )
        for module in (plainly, self._module):
            for name, parameter in module.named_parameters():
                parameter.copy_(as_torch(weights.read(name)))
        super().__init__(TorchBackend(plainly, f"PyTorch {torch.__version__}, float32, cpu"))

    def operations(self, call: Call, expected: Sequence[Array]) -> Iterator[Sequence[Array]]:
        with self._torch.inference_mode():
            if call.new_cache:
                self._module.bind_cache(self._module.make_cache(batch=len(call.ids_BS), positions=call.new_cache))
            self._recording.begin([self._torch.from_numpy(_as_fed(value)) for value in expected])
            ids_BS, positions_BS, write_index_B = (
                self._torch.from_numpy(np.array(x, np.int64))
                for x in (call.ids_BS, call.positions_BS, call.write_index_B)
            )
            self._module(ids_BS, positions_BS=positions_BS, write_index_B=write_index_B, visible=call.visible)
        return ((value.numpy(),) for value in self._recording.results)


class OnnxRun(Recorder):
    """The joined rank graphs of an artifact, every operation's value among their outputs, and cut behind each: what
    reads it reads a graph input instead.
    """

    def __init__(self, artifact: Artifact, names: Sequence[str]) -> None:
        self._ranks = len(artifact.graphs)
        super().__init__(
            open_graphs(artifact.path, ranks=self._ranks, precision=artifact.precision, max_batch=artifact.max_batch)
        )
        model = as_float32(merge_ranks(artifact.path))
        made = {name for node in model.graph.node for name in node.output}
        self._values = [_on_ranks(name, made, self._ranks) for name in names if name != LOGITS]
        self._shapes = _cut(model.graph, {name for each in self._values for name in each if name is not None})
        options = session_options()
        options.log_severity_level = 3  # a run without bound outputs copies the caches, and says so each time
        folder = str(artifact.path.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        self._session = open_session(model.SerializeToString(), options, artifact.path)
        self._caches: dict[str, Array] = {}

    def adapted(self, call: Call) -> Call:
        capacity = self.backend.capacity
        return replace(call, visible=bucketed(call.visible, capacity), new_cache=bucketed(call.new_cache, capacity))

    def operations(self, call: Call, expected: Sequence[Array]) -> Iterator[Sequence[Array | None]]:
        if call.new_cache:
            shapes = {item.name: item.shape[1:] for item in self._session.get_inputs() if "past." in item.name}
            self._caches = {name: np.zeros([len(call.ids_BS), *rest], np.float32) for name, rest in shapes.items()}
        integers = {
            "input_ids": call.ids_BS,
            "position_ids": call.positions_BS,
            "write_index": call.write_index_B,
            "kv_positions": np.arange(call.visible),
        }
        feeds = {name: np.ascontiguousarray(array, np.int64) for name, array in integers.items()} | self._caches
        for names, whole in zip(self._values, expected, strict=True):
            for rank, name in enumerate(names):
                if name is not None:
                    part = rank_part(whole, self._shapes[name], rank, self._ranks)
                    feeds[CUT + name] = np.ascontiguousarray(_as_fed(part))
        presents = {name: name.replace("past.", "present.") for name in self._caches}
        outputs = [*self._shapes, *presents.values()]
        found = dict(zip(outputs, self._session.run(outputs, feeds), strict=True))
        self._caches = {name: found[present] for name, present in presents.items()}
        return ([None if name is None else found[name] for name in names] for names in self._values)


def _as_fed(value: Array) -> Array:
    """The oracle's value in the target's type: indices stay integers."""
    return value.astype(np.int64 if np.issubdtype(value.dtype, np.integer) else np.float32)


def _on_ranks(name: str, made: set[str], ranks: int) -> tuple[str | None, ...]:
    """The joined graph's names of a value: one where a collective gave it to all ranks, None where it is missing."""
    if name in made:
        return (name,)
    return tuple(each if (each := f"rank{rank}/{name}") in made else None for rank in range(ranks))


def _cut(graph: onnx.GraphProto, names: Set[str]) -> dict[str, Sequence[int | None]]:
    """Make outputs of values, and inputs of their readers; the values' sizes, None for those that a call decides."""
    for node in graph.node:
        node.input[:] = [CUT + name if name in names else name for name in node.input]
    infos = [value for value in graph.value_info if value.name in names]
    for value in infos:
        graph.output.append(value)
        graph.input.append(value)
        graph.input[-1].name = CUT + value.name
    return {value.name: [dim.dim_value or None for dim in value.type.tensor_type.shape.dim] for value in infos}


def rank_part(whole: Array, shape: Sequence[int | None], rank: int, degree: int) -> Array:
    """What a rank has of a value, by the one dim in which its own `shape` is smaller; the whole where none fits."""
    dims = [dim for dim, (size, full) in enumerate(zip(shape, whole.shape, strict=False)) if size not in (None, full)]
    if len(shape) != whole.ndim or len(dims) != 1:
        return whole
    (dim,) = dims
    size = shape[dim]
    if not size or whole.shape[dim] % size or degree % (whole.shape[dim] // size):
        return whole
    split = Split(mesh_axis="tensor", dim=dim, degree=degree, parts=whole.shape[dim] // size)
    return whole[split.slices(whole.shape, rank)]

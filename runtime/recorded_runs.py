"""The oracle, PyTorch and ONNX Runtime run step by step, each with the result of every operation kept.

A target computes each operation from the oracle's values of what it reads, so that errors do not add up: an operation
that differs is itself wrong. The targets' caches are their own.

B batch, S sequence, L visible cache positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from archwright.compiler.interpreters.numpy_ops import NumpyOps, make_cache
from archwright.compiler.interpreters.recording import Recording, plain
from archwright.compiler.ir import Plan, Program, Split, Step
from archwright.compiler.ir.program import instance_of
from archwright.compiler.targets.merge import merge_ranks
from archwright.compiler.targets.onnx_graph import emit_stage
from archwright.compiler.targets.portable_form import as_portable
from archwright.compiler.targets.retype import as_float32
from archwright.compiler.targets.stages import HIDDEN, IDS, LOGIT_INDEX, GraphOptions, stages_of
from archwright.compiler.weights.streaming import Weights
from archwright.runtime.artifact import Artifact
from archwright.runtime.backends.base import AnyBackend
from archwright.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, bucketed, open_artifact_graphs
from archwright.runtime.backends.onnxruntime_sessions import open_session, session_options
from archwright.spec import Spec

Array = NDArray[Any]
LOGITS = "logits"
"""The last of the names: what the whole Program gives, each operation on the values of those before it."""
CUT = "oracle/"
"""Before the names of the inputs that take the place of a graph's own values."""


@dataclass(frozen=True)
class Call:
    """S more tokens in each of B rows, as in `Backend.forward`.

    new_cache: positions of an empty cache to begin with; 0 goes on with the last call's. index_B: which token of each
    row the logits are of; None: of all.
    """

    name: str
    ids_BS: Array
    positions_BS: Array
    write_index_B: Array
    visible: int
    new_cache: int = field(default=0, kw_only=True)
    index_B: Array | None = field(default=None, kw_only=True)


def operation_names(plan: Plan, spec: Spec, options: GraphOptions) -> list[tuple[str, ...]]:
    """Of each stage the name of every operation, in order: those of the nodes that the exporter would write.

    "" stands for a value that the graphs do not have. Where matrices are fused, their parts of the product stand for
    the products of the canonical ones.
    """
    found: list[tuple[str, ...]] = []
    for stage in stages_of(plan):
        graph = next(emit_stage(plan, stage, precision=spec.build.precision, capacity=1, options=options))
        joined = tuple(f"{name.rpartition('.')[0]}/" for name, parts in graph.weights.items() if len(parts) > 1)
        found.append(tuple(name for name in graph.operations if not name.startswith(joined)))
    return found


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
            positions_BS=call.positions_BS,
            write_index_B=call.write_index_B,
            kv_positions_L=np.arange(call.visible),
            logit_index_B=call.index_B,
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
        """The call as this target makes it: with more cache rows than are visible, for the logits of fewer tokens."""
        return call

    def run(self, call: Call, expected: Sequence[Array]) -> list[Sequence[Array | None]]:
        """The value of each operation, then the logits, on each rank, or once where the ranks share it.

        expected: what `OracleRun.run` gave. None stands for a value that the target does not have.
        """
        if call.new_cache:
            self._backend_cache = self.backend.new_cache(len(call.ids_BS), call.new_cache)
        given = (self._backend_cache, call.ids_BS, call.positions_BS, call.write_index_B, call.visible)
        if call.index_B is None:
            logits = self.backend.forward(*given)
        else:
            logits = self.backend.forward_last(*given, call.index_B)[:, None]
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
    """The joined rank graphs of each stage of an artifact, every operation's value among their outputs, and cut behind
    each: what reads it reads a graph input instead.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.graphs: OnnxRuntimeBackend = open_artifact_graphs(artifact)
        super().__init__(self.graphs)
        names = operation_names(artifact.plan, artifact.spec, artifact.options)
        self._stages = [_StageRun(artifact, stage, own) for stage, own in enumerate(names)]
        self._asks_one = artifact.options.logits == "last"

    def adapted(self, call: Call) -> Call:
        capacity, (batch, length) = self.backend.capacity, call.ids_BS.shape
        # Another token in each row, so that rows are told apart.
        index_B = (length - 1 - np.arange(batch)) % length if self._asks_one else None
        return replace(
            call,
            visible=self.graphs.num_handed(length, call.write_index_B, call.visible),
            new_cache=bucketed(call.new_cache, capacity),
            index_B=index_B,
        )

    def operations(self, call: Call, expected: Sequence[Array]) -> Iterator[Sequence[Array | None]]:
        start = 0
        for stage in self._stages:
            stop = start + stage.num_operations
            yield from stage.operations(call, expected[start:stop], expected[start - 1] if start else None)
            start = stop


class _StageRun:
    """One stage of `OnnxRun`."""

    def __init__(self, artifact: Artifact, stage: int, names: Sequence[str]) -> None:
        self._tensor = artifact.plan.degrees.tensor
        self.num_operations = len(names)
        ranks = artifact.plan.stage_ranks(stage)
        model = as_float32(as_portable(merge_ranks(artifact.path, stage=stage, ranks=ranks)))
        made = {name: node.op_type for node in model.graph.node for name in node.output}
        self._values = [_on_ranks(name, made, ranks) for name in names]
        self._shapes = _cut(model.graph, {name for each in self._values for name in each if name is not None})
        options = session_options()
        options.log_severity_level = 3  # a run without bound outputs copies the caches, and says so each time
        folder = str(artifact.path.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        self._session = open_session(model.SerializeToString(), options, artifact.path)
        self._inputs = {item.name: item.shape for item in self._session.get_inputs()}
        self._caches: dict[str, Array] = {}

    def operations(
        self, call: Call, expected: Sequence[Array], hidden: Array | None
    ) -> Iterator[Sequence[Array | None]]:
        """hidden: what the oracle's stage before gave."""
        if call.new_cache:
            shapes = {name: shape[1:] for name, shape in self._inputs.items() if "past." in name}
            self._caches = {name: np.zeros([len(call.ids_BS), *rest], np.float32) for name, rest in shapes.items()}
        given = {
            IDS: call.ids_BS,
            "position_ids": call.positions_BS,
            "write_index": call.write_index_B,
            "kv_positions": np.arange(call.visible),
            LOGIT_INDEX: call.index_B,
            HIDDEN: hidden,
        }
        feeds = {
            name: np.ascontiguousarray(_as_fed(np.asarray(value)))
            for name, value in given.items()
            if name in self._inputs
        } | self._caches
        for names, whole in zip(self._values, expected, strict=True):
            for index, name in enumerate(names):
                if name is not None:
                    part = rank_part(whole, self._shapes[name], index % self._tensor, self._tensor)
                    feeds[CUT + name] = np.ascontiguousarray(_as_fed(part))
        presents = {name: name.replace("past.", "present.") for name in self._caches}
        outputs = [*self._shapes, *presents.values()]
        found = dict(zip(outputs, self._session.run(outputs, feeds), strict=True))
        self._caches = {name: found[present] for name, present in presents.items()}
        return ([None if name is None else found[name] for name in names] for names in self._values)


def _as_fed(value: Array) -> Array:
    """The oracle's value in the target's type: indices stay integers."""
    return value.astype(np.int64 if np.issubdtype(value.dtype, np.integer) else np.float32)


def _on_ranks(name: str, made: Mapping[str, str], ranks: Sequence[int]) -> tuple[str | None, ...]:
    """The joined graph's names of a value: one where a collective gave it to all ranks, None where it is missing; none
    at all of an operation that is a part of a larger one there.

    made: name → operator. Of a group's sum the first rank has the name, which stands for those behind it.
    """
    if not name:
        return ()
    if name in made:
        return (name,)
    found: list[str | None] = []
    for rank in ranks:
        each: str | None = f"rank{rank}/{name}"
        if each not in made:
            before = found[-1] if found else None
            each = before if before is not None and made[before] == "Sum" else None
        found.append(each)
    return tuple(found)


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

"""Artifacts through ONNX Runtime, on the CPU or on one GPU.

B batch, S sequence, L visible cache positions, V vocabulary, K key/value heads, P cache capacity, H head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from archwright.compiler.targets.merge import merge_ranks
from archwright.compiler.targets.onnx_graph import graph_path
from archwright.compiler.targets.portable_form import as_portable
from archwright.compiler.targets.retype import as_float32
from archwright.compiler.targets.stages import HIDDEN, IDS, LOGIT_INDEX, LOGITS, result_name
from archwright.runtime.artifact import Artifact
from archwright.runtime.backends.base import Backend, Ids, Logits
from archwright.runtime.backends.onnxruntime_sessions import (
    CPU,
    ELEMENTS,
    Place,
    cuda_problem,
    load_onnxruntime,
    open_joined,
    open_session,
    session_options,
)
from archwright.spec import ArchwrightError

BUCKET = 64
"""The visible positions L grow in these steps: a decode step costs O(L), and shapes rarely change."""


@dataclass
class OrtCache:
    """Caches bound as input and as output of their stage's graph, so that it updates them where they lie.

    Two different OrtValues would make ONNX Runtime copy every cache at every step. bindings: of each stage.
    """

    bindings: tuple[Any, ...]
    values: dict[str, Any]
    """Input name (`past.0.key`), of all stages → OrtValue [B, K, P, H]."""
    bound: int | None = -1
    """The row that the inputs are bound to, None for all; -1 before the first call."""

    def pointers(self) -> dict[str, int]:
        """Addresses of the caches: they never change."""
        return {name: value.data_ptr() for name, value in self.values.items()}


class OnnxRuntimeBackend(Backend[OrtCache]):
    """A session for each pipeline stage, run one behind the other: the graph of one rank, or of all ranks of the stage
    joined.
    """

    def __init__(
        self,
        sessions: Sequence[Any],
        *,
        max_batch: int | None,
        description: str,
        gathered_bytes: int = 0,
        grouped: bool = False,
        place: Place = CPU,
        more: Sequence[Sequence[str]] = (),
    ) -> None:
        """gathered_bytes: what the graphs copy of experts' weights for each token of a call. grouped: they have
        GroupQueryAttention. more: of each stage the outputs that `_seen` is told of besides.
        """
        self._ort = load_onnxruntime()
        self._sessions = tuple(sessions)
        self._inputs = [{item.name: item for item in session.get_inputs()} for session in sessions]
        self._caches = [{name: item for name, item in each.items() if "past." in name} for each in self._inputs]
        self._takes_index = LOGIT_INDEX in self._inputs[-1]
        self._gathered_bytes = gathered_bytes
        self._grouped = grouped
        self._place = place
        self._more = more or [()] * len(self._sessions)
        (logits,) = (output for output in sessions[-1].get_outputs() if output.name == LOGITS)
        self.vocab_size = logits.shape[2]
        self.capacity = next(iter(self._caches[0].values())).shape[2]
        self.max_batch = max_batch
        self.description = description

    @property
    def token_bytes(self) -> int:
        return self._gathered_bytes + (0 if self._takes_index else 4 * self.vocab_size)

    def new_cache(self, batch: int, positions: int) -> OrtCache:
        assert positions <= self.capacity, "the caches of a graph have one size"
        values: dict[str, Any] = {}
        for caches in self._caches:
            for name, item in caches.items():
                # Zeros, not fresh memory: a masked position has weight 0, but 0 · NaN would be NaN.
                values[name] = self._place.zeros((batch, *item.shape[1:]), item.type)
        return OrtCache(tuple(session.io_binding() for session in self._sessions), values)

    def forward(self, cache: OrtCache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int) -> Logits:
        """Graphs that give the logits of one token a row are run token by token here."""
        batch, length = ids_BS.shape
        size = length
        if self._takes_index:
            size = 1
        elif self._gathered_bytes:
            size = self.call_tokens(batch)
        if length > size:
            return self.in_pieces(cache, ids_BS, positions_BS, write_index_B, visible, size)
        return self._run(cache, ids_BS, positions_BS, write_index_B, visible, np.zeros(batch, np.int64))

    def forward_last(
        self, cache: OrtCache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int, index_B: Ids
    ) -> Logits:
        if not self._takes_index:
            return super().forward_last(cache, ids_BS, positions_BS, write_index_B, visible, index_B)
        return self._run(cache, ids_BS, positions_BS, write_index_B, visible, index_B)[:, 0]

    def num_handed(self, length: int, write_index_B: Ids, visible: int) -> int:
        """L: the cache rows that a step of `length` tokens is handed, at least the visible ones. GroupQueryAttention
        knows several rows that begin by L = S.
        """
        if self._grouped and length > 1 and len(write_index_B) > 1:
            return length
        return bucketed(visible, self.capacity)

    def _run(
        self, cache: OrtCache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int, index_B: Ids
    ) -> Logits:
        """GroupQueryAttention takes later pieces of several tokens row by row."""
        batch, length = ids_BS.shape
        if not (self._grouped and batch > 1 and length > 1 and write_index_B.any()):
            return self._call(cache, None, ids_BS, positions_BS, write_index_B, visible, index_B)
        each = [slice(row, row + 1) for row in range(batch)]
        rows = [
            self._call(cache, row, ids_BS[at], positions_BS[at], write_index_B[at], visible, index_B[at])
            for row, at in enumerate(each)
        ]
        return np.concatenate(rows)

    def _call(
        self,
        cache: OrtCache,
        row: int | None,
        ids_BS: Ids,
        positions_BS: Ids,
        write_index_B: Ids,
        visible: int,
        index_B: Ids,
    ) -> Logits:
        """One call of every stage, for one row of the cache or all of them."""
        feeds = {
            IDS: ids_BS,
            "position_ids": positions_BS,
            "write_index": write_index_B,
            "kv_positions": np.arange(self.num_handed(ids_BS.shape[1], write_index_B, visible)),
            LOGIT_INDEX: index_B,
        }
        self._begin_call(row or 0, positions_BS, index_B)
        last = len(self._sessions) - 1
        rebind, cache.bound = cache.bound != row, row
        result: Any = None
        for number, (session, binding, inputs) in enumerate(
            zip(self._sessions, cache.bindings, self._inputs, strict=True)
        ):
            for name in feeds.keys() & inputs.keys():
                binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name], np.int64))
            if HIDDEN in inputs:
                binding.bind_ortvalue_input(HIDDEN, result)
            # Bound anew in each call, since its shape changes; the first, so that it is the first of the outputs.
            place = CPU if number == last else self._place
            binding.bind_output(result_name(number, last + 1), place.kind, place.index)
            for name in self._more[number]:
                binding.bind_output(name)
            if rebind:
                for item in self._caches[number].values():
                    self._bind_cache(binding, item, cache.values[item.name], row)
            session.run_with_iobinding(binding)
            outputs = binding.get_outputs_as_ortvaluevector()
            result, *more = (self._ort.OrtValue(outputs[index]) for index in range(1 + len(self._more[number])))
            self._seen(number, more)
        return result.numpy()

    def _bind_cache(self, binding: Any, item: Any, value: Any, row: int | None) -> None:
        """Bind the memory of a cache, or of one row of it, as input and as its own update."""
        shape, pointer = value.shape(), value.data_ptr()
        if row is not None:
            pointer += row * (value.tensor_size_in_bytes() // shape[0])
            shape = [1, *shape[1:]]
        described = (self._place.kind, self._place.index, ELEMENTS[item.type], shape, pointer)
        binding.bind_input(item.name, *described)
        binding.bind_output(item.name.replace("past.", "present."), *described)

    def _begin_call(self, first_row: int, positions_BS: Ids, index_B: Ids) -> None:
        """Told of a call before it is made, of the rows of the cache from `first_row` on."""

    def _seen(self, stage: int, values: Sequence[Any]) -> None:
        """Told of what a stage gave of its `more` outputs."""


def open_onnxruntime(artifact: Artifact, device: str, precision: str) -> OnnxRuntimeBackend:
    """Open the graphs of an artifact.

    device: auto | cpu | cuda | cuda:N; auto is the GPU where ONNX Runtime can use one and has kernels for all of the
    graphs' operators, else the CPU. Raises ArchwrightError RUN016, RUN021 to RUN023, RUN025.
    """
    if precision not in ("auto", artifact.precision):
        help = f"leave the precision out, or build with build.precision={precision}"
        message = f"the artifact is {artifact.precision}, not {precision}"
        raise ArchwrightError("RUN022", message, where=str(artifact.path), help=help)
    if device == "cpu":
        return open_artifact_graphs(artifact)
    if device == "auto":
        if cuda_problem() is not None:
            return open_artifact_graphs(artifact)
        try:
            return open_artifact_graphs(artifact, Place(gpu=0))
        except ArchwrightError as error:
            if error.code != "RUN025":
                raise
            opened = open_artifact_graphs(artifact)
            opened.description += f"; not on the GPU: {error.message}"
            return opened
    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()) or device.endswith(":"):
        help = "use auto, cpu, cuda or cuda:N"
        raise ArchwrightError("RUN021", f"artifacts do not run on `{device}`", where=str(artifact.path), help=help)
    problem = cuda_problem(int(number or 0))
    if problem is not None:
        message = f"artifacts do not run on `{device}` here: {problem}"
        raise ArchwrightError("RUN021", message, where=str(artifact.path), help="use auto or cpu")
    return open_artifact_graphs(artifact, Place(gpu=int(number or 0)))


def open_artifact_graphs(artifact: Artifact, place: Place = CPU) -> OnnxRuntimeBackend:
    """The same without questions of device and precision: also for a folder that has only the graphs."""
    return open_graphs(
        artifact.path,
        ranks=len(artifact.graphs),
        stages=artifact.num_stages,
        precision=artifact.precision,
        max_batch=artifact.max_batch,
        gathered_bytes=artifact.gathered_bytes,
        target=artifact.dialect.target,
        place=place,
    )


def open_graphs(
    folder: Path,
    *,
    ranks: int,
    precision: str,
    stages: int = 1,
    max_batch: int | None = None,
    gathered_bytes: int = 0,
    target: str = "portable",
    place: Place = CPU,
) -> OnnxRuntimeBackend:
    """Open the rank graphs in `folder`: of each stage one rank as the file itself, anything else as one joined graph.

    A CPU computes in float32, whatever the precision of the weights; a GPU computes as the graph says. ranks: in all;
    each of the `stages` has equally many. gathered_bytes: see `OnnxRuntimeBackend`. target: of their dialect; what only
    TensorRT has is said in ONNX Runtime's words (`targets.portable_form`).
    """
    ort = load_onnxruntime()
    title = f"ONNX Runtime {ort.__version__}, {place}, {ranks} rank{'s' if ranks > 1 else ''}"
    each = ranks // stages
    title += f" in {stages} stages" if stages > 1 else ""
    title += " joined" if each > 1 else ""
    widened = place == CPU and precision != "float32"
    title += f", {precision} weights computed in float32" if widened else f", {precision}"
    rewritten = target == "tensorrt"
    title += ", TensorRT's operators in portable form" if rewritten else ""
    sessions: list[Any] = []
    for stage in range(stages):
        if each == 1 and not widened and not rewritten:
            sessions.append(open_session(str(graph_path(folder, stage, stage)), session_options(), folder, place))
            continue
        joined = as_portable(merge_ranks(folder, stage=stage, ranks=range(stage * each, (stage + 1) * each)))
        joined = as_float32(joined) if widened else joined
        sessions.append(open_joined(joined.SerializeToString(), folder, place))
    return OnnxRuntimeBackend(
        sessions,
        max_batch=max_batch,
        description=title,
        gathered_bytes=gathered_bytes,
        grouped=target == "onnxruntime",
        place=place,
    )


def bucketed(visible: int, capacity: int) -> int:
    """`visible` in steps of BUCKET."""
    return min(capacity, -(-visible // BUCKET) * BUCKET)
